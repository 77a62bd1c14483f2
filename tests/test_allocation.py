"""The greedy walk over convex hulls against exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyquant.allocation import Assignment, Table, allocate, walk, within


def total(tables: list[Table], chosen: Assignment) -> tuple[int, float]:
    nbytes = error = 0.0
    for table, levels in zip(tables, chosen, strict=True):
        nbytes += np.array(table.nbytes)[levels].sum()
        error += np.take_along_axis(table.errors, levels[:, None].astype(np.int64), 1).sum()
    return int(nbytes), float(error)


def best(tables: list[Table], budget: int) -> float:
    """The least error within the budget, by trying everything."""
    units = [range(len(table.nbytes)) for table in tables for _ in table.errors]
    splits = np.cumsum([len(table.errors) for table in tables])[:-1]
    found = float("inf")
    for levels in itertools.product(*units):
        nbytes, error = total(tables, np.split(np.array(levels, np.uint8), splits))
        if nbytes <= budget:
            found = min(found, error)
    return found


def random_tables(seed: int) -> list[Table]:
    """Two matrices, of one and of three units; errors that fall with the level, now and then not convex."""
    rng = np.random.default_rng(seed)
    tables = []
    for units in (1, 3):
        size = int(rng.integers(1, 20))
        errors = size * rng.uniform(0.5, 2, (units, 4)) * 4.0 ** -np.arange(2, 6)
        tables.append(Table(tuple(size * w for w in range(2, 6)), errors))
    return tables


def levels_of(chosen: Assignment) -> list[list[int]]:
    return [levels.tolist() for levels in chosen]


def test_only_levels_on_the_hull_are_taken() -> None:
    table = Table((1, 2, 3, 4, 5, 6), np.array([[10.0, 9.9, 1.0, 1.0, 2.0, 0.0]]))
    steps = walk([table])
    assert steps.previous.tolist() == [0, 2]
    assert steps.level.tolist() == [2, 5]
    assert len(walk([Table((3,), np.array([[1.0]]))]).unit) == 0


def test_levels_on_one_line_are_one_step() -> None:
    assert walk([Table((1, 2, 3), np.array([[4.0, 3.0, 2.0]]))]).level.tolist() == [2]


def test_errors_that_never_fall_leave_everything_at_the_first_level() -> None:
    table = Table((1, 2), np.zeros((3, 2)))
    assert levels_of(allocate([table], lambda chosen: True)) == [[0, 0, 0]]


@pytest.mark.parametrize("seed", range(20))
def test_optimal_at_every_budget_that_the_walk_meets(seed: int) -> None:
    tables = random_tables(seed)
    steps = walk(tables)
    for count in range(len(steps.unit) + 1):
        nbytes, error = total(tables, steps.after(count))
        assert error == pytest.approx(best(tables, nbytes))


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_never_over_budget_and_never_far_from_the_best(seed: int, share: float) -> None:
    tables = random_tables(seed)
    low = sum(t.nbytes[0] * len(t.errors) for t in tables)
    high = sum(t.nbytes[-1] * len(t.errors) for t in tables)
    budget = int(low + share * (high - low))
    chosen = allocate(tables, lambda c: total(tables, c)[0] <= budget)
    nbytes, error = total(tables, chosen)
    assert nbytes <= budget
    # The greedy loses at most what the one step that did not fit would have saved.
    assert error <= best(tables, budget) + max(t.errors.max() for t in tables)


@pytest.mark.parametrize("seed", range(10))
def test_a_budget_per_matrix_is_that_matrix_alone(seed: int) -> None:
    for table in random_tables(seed):
        steps = walk([table])
        for budget in range(len(table.errors) * table.nbytes[0], len(table.errors) * table.nbytes[-1] + 2):
            alone = allocate([table], lambda c, t=table, b=budget: total([t], c)[0] <= b, misses=0)  # type: ignore[misc]
            assert levels_of(within(steps, table.nbytes, budget)) == levels_of(alone)


def test_a_budget_counts_what_it_is_told_to_count() -> None:
    table = Table((10, 20, 30), np.array([[9.0, 1.0, 0.0], [8.0, 2.0, 0.0]]))
    assert levels_of(within(walk([table]), (0, 1, 2), 1)) == [[1, 0]]
    assert levels_of(within(walk([table]), (0, 1, 2), 99)) == [[2, 2]]


def test_fill_spends_what_is_left() -> None:
    tables = [Table((0, 100), np.array([[100.0, 0.0]])), Table((0, 10), np.array([[1.0, 0.5]]))]
    assert levels_of(allocate(tables, lambda c: total(tables, c)[0] <= 50)) == [[0], [1]]
    assert levels_of(allocate(tables, lambda c: total(tables, c)[0] <= 50, misses=0)) == [[0], [0]]


def test_ties_go_to_the_first_unit() -> None:
    tables = [Table((0, 1), np.array([[1.0, 0.0]] * 2)), Table((0, 1), np.array([[1.0, 0.0]]))]
    assert levels_of(allocate(tables, lambda c: total(tables, c)[0] <= 2)) == [[1, 1], [0]]


@pytest.mark.parametrize(
    ("nbytes", "errors", "message"),
    [
        ((1, 1), [[1.0, 0.0]], "ascend"),
        ((1, 2), [[1.0]], "do not fit"),
        ((1, 2), [[1.0, float("nan")]], "finite"),
        ((1, 2), [[1.0, -1.0]], "negative"),
    ],
)
def test_malformed_tables(nbytes: tuple[int, ...], errors: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table(nbytes, np.array(errors))
