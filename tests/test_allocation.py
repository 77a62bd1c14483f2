"""The greedy walk over convex hulls against exhaustive search."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyquant.allocation import Choice, allocate, convex_hull, upgrades

Tensors = list[list[Choice]]


def total(tensors: Tensors, chosen: list[int]) -> tuple[int, float]:
    picked = [tensor[i] for tensor, i in zip(tensors, chosen, strict=True)]
    return sum(c.nbytes for c in picked), sum(c.error for c in picked)


def best(tensors: Tensors, budget: int) -> float:
    """The least error within the budget, by trying everything."""
    assignments = itertools.product(*(range(len(t)) for t in tensors))
    return min(e for b, e in (total(tensors, list(a)) for a in assignments) if b <= budget)


def random_tensors(seed: int, count: int = 4) -> Tensors:
    rng = random.Random(seed)
    sizes = [rng.randint(1, 20) for _ in range(count)]
    return [[Choice(s * w, s * rng.uniform(0.5, 2) * 4.0**-w) for w in range(2, 6)] for s in sizes]


def test_hull_drops_what_is_never_worth_taking() -> None:
    choices = [Choice(1, 10.0), Choice(2, 9.9), Choice(3, 1.0), Choice(4, 1.0), Choice(5, 2.0), Choice(6, 0.0)]
    assert convex_hull(choices) == [0, 2, 5]
    assert convex_hull([Choice(3, 1.0)]) == [0]
    assert convex_hull([Choice(1, 1.0), Choice(1, 0.5)]) == [1]


@pytest.mark.parametrize("seed", range(20))
def test_optimal_at_every_budget_that_the_walk_meets(seed: int) -> None:
    tensors = random_tensors(seed)
    chosen, steps = upgrades(tensors)
    for step in [None, *steps]:
        if step is not None:
            chosen[step.tensor] = step.choice
        nbytes, error = total(tensors, chosen)
        assert error == pytest.approx(best(tensors, nbytes))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_never_over_budget_and_never_far_from_the_best(seed: int, share: float) -> None:
    tensors = random_tensors(seed)
    low = sum(t[0].nbytes for t in tensors)
    high = sum(t[-1].nbytes for t in tensors)
    budget = int(low + share * (high - low))
    chosen = allocate(tensors, lambda c: total(tensors, c)[0] <= budget)
    nbytes, error = total(tensors, chosen)
    assert nbytes <= budget
    # The greedy loses at most what the one step that did not fit would have saved.
    assert error <= best(tensors, budget) + max(t[0].error for t in tensors)


def test_fill_spends_what_is_left() -> None:
    tensors = [[Choice(0, 100.0), Choice(100, 0.0)], [Choice(0, 1.0), Choice(10, 0.5)]]
    assert allocate(tensors, lambda c: total(tensors, c)[0] <= 50) == [0, 1]
    assert allocate(tensors, lambda c: total(tensors, c)[0] <= 50, fill=False) == [0, 0]


def test_ties_go_to_the_first_tensor() -> None:
    tensors = [[Choice(0, 1.0), Choice(1, 0.0)]] * 3
    assert allocate(tensors, lambda c: total(tensors, c)[0] <= 2) == [1, 1, 0]
