"""Error feedback against the textbook: one column after the other eliminated from the inverse of the moment."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from anyquant.errors import InputError
from anyquant.feedback import GROUPS, activation_order, inverse_factor, with_feedback

STEP = np.float32(0.25)
SIZES = [1, 2, 15, 16, 17, 75, 128, 129, 300]


def correlated(columns: int, seed: int = 0, tokens: int = 2000) -> np.ndarray:
    """The moment of inputs that have a few causes in common, float32."""
    rng = np.random.default_rng(seed)
    causes = rng.standard_normal((tokens, max(1, columns // 3)))
    inputs = causes @ rng.standard_normal((causes.shape[1], columns)) + 0.3 * rng.standard_normal((tokens, columns))
    inputs *= np.exp2(rng.uniform(-3, 3, columns))
    moment: np.ndarray = (inputs.T @ inputs / tokens).astype(np.float32)
    return moment


def weights(rows: int, columns: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def nearest(_: int, values: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = np.rint(values / STEP) * STEP
    return rounded


def output_error(difference: np.ndarray, moment: np.ndarray) -> float:
    return float(np.einsum("ij,jk,ik->", difference.astype(np.float64), moment.astype(np.float64), difference))


def damped(moment: np.ndarray, damping: float) -> np.ndarray:
    """H + damping mean(diag H) I where inputs are alive, the identity where they are dead."""
    whole = moment.astype(np.float64)
    diagonal = np.diag(whole).copy()
    alive = diagonal > 0
    whole += np.diag(np.where(alive, damping * (diagonal[alive].mean() if alive.any() else 0), 1.0))
    return whole


def eliminate(
    weight: np.ndarray,
    moment: np.ndarray,
    quantize: Callable[[int, np.ndarray], np.ndarray],
    order: np.ndarray,
    damping: float,
) -> np.ndarray:
    """Optimal brain quantization: the update of all columns left, then one step of Gauss on the inverse."""
    inverse = np.linalg.inv(damped(moment, damping))
    current, result = weight.astype(np.float64), np.zeros(weight.shape)
    left = list(order)
    while left:
        column = left.pop(0)
        result[:, column] = quantize(int(column), current[:, column].astype(np.float32))
        error = (current[:, column] - result[:, column]) / inverse[column, column]
        for other in left:
            current[:, other] -= error * inverse[column, other]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return result


@pytest.mark.parametrize("columns", SIZES)
def test_the_factor_is_that_of_the_inverse(columns: int) -> None:
    moment = correlated(columns)
    factor = inverse_factor(moment)
    assert factor.dtype == np.float64
    assert np.array_equal(factor, np.triu(factor))
    assert (np.diag(factor) > 0).all()
    wanted = np.linalg.inv(damped(moment, 0.01))
    assert np.allclose(factor.T @ factor, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())


def test_dead_columns_are_independent() -> None:
    moment = correlated(20)
    dead = [0, 7, 19]
    moment[dead, :] = moment[:, dead] = 0
    factor = inverse_factor(moment)
    assert np.allclose(factor.T @ factor, np.linalg.inv(damped(moment, 0.01)))
    assert np.array_equal(factor[dead], np.eye(20)[dead])
    assert np.array_equal(factor[:, dead], np.eye(20)[:, dead])
    assert np.array_equal(inverse_factor(np.zeros((5, 5), np.float32)), np.eye(5))


@pytest.mark.parametrize("tokens", [1, 3, 10])
def test_a_singular_moment_is_damped_until_it_is_not(tokens: int) -> None:
    inputs = np.random.default_rng(tokens).standard_normal((tokens, 24))
    moment = (inputs.T @ inputs / tokens).astype(np.float32)
    factor = inverse_factor(moment, damping=0.0)
    found = [
        exponent
        for exponent in range(-6, 3)
        if np.allclose(factor.T @ factor, np.linalg.inv(damped(moment, 10.0**exponent)), rtol=1e-3)
    ]
    assert len(found) == 1
    assert 10.0 ** found[0] <= 1e-5  # no more than FP32's rounding calls for


def test_a_moment_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"\[2, 2\], is not positive even with a damping of 100"):
        inverse_factor(np.array([[1, 1000], [1000, 1]], np.float32))
    with pytest.raises(InputError, match=r"\[2, 2\], is not finite"):
        inverse_factor(np.array([[1, np.nan], [np.nan, 1]], np.float32))


def test_a_slightly_indefinite_moment_is_repaired() -> None:
    moment = correlated(30).astype(np.float64)
    values, vectors = np.linalg.eigh(moment)
    values[:3] = -0.05 * values.mean()
    factor = inverse_factor((vectors * values) @ vectors.T)
    assert np.isfinite(factor).all()
    assert (np.diag(factor) > 0).all()


@pytest.mark.parametrize("ordering", ["ascending", "activation", "random"])
@pytest.mark.parametrize("columns", SIZES)
def test_as_the_textbook_has_it(columns: int, ordering: str) -> None:
    weight, moment = weights(7, columns), correlated(columns)
    order = {
        "ascending": np.arange(columns),
        "activation": activation_order(np.diag(moment)),
        "random": np.random.default_rng(5).permutation(columns),
    }[ordering]
    # A rounding that is smooth, so that the two do not part where one of them is on the other side of a threshold.
    seen: list[int] = []

    def smooth(column: int, values: np.ndarray) -> np.ndarray:
        seen.append(column)
        return (values + np.float32(0.05) * np.sin(values * (column % 5 + 1))).astype(np.float32)

    found = with_feedback(weight, moment, smooth, order=None if ordering == "ascending" else order)
    assert seen == order.tolist()
    assert found.dtype == np.float32
    wanted = eliminate(weight, moment, smooth, order, 0.01)
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()


@pytest.mark.parametrize("columns", [1, 17, 75, 300])
def test_it_makes_up_for_errors(columns: int) -> None:
    weight, moment = weights(33, columns), correlated(columns)
    found = with_feedback(weight, moment, nearest, order=activation_order(np.diag(moment)))
    assert np.array_equal(found, nearest(0, found))  # what quantize returned, in its place
    without, with_it = output_error(nearest(0, weight) - weight, moment), output_error(found - weight, moment)
    assert with_it <= without * (0.5 if columns > 1 else 1.0)


def test_independent_inputs_give_nothing_to_make_up_with() -> None:
    weight, moment = weights(9, 140), np.diag(np.linspace(0.1, 3, 140)).astype(np.float32)
    assert np.array_equal(with_feedback(weight, moment, nearest), nearest(0, weight))


def test_dead_columns_are_left_alone_or_zero() -> None:
    weight, moment = weights(4, 40), correlated(40)
    dead = np.array([3, 39])
    moment[dead, :] = moment[:, dead] = 0
    kept = with_feedback(weight, moment, lambda _, values: values.copy())
    assert np.array_equal(kept, weight)
    zeroed = with_feedback(weight, moment, lambda _, values: values.copy(), zero_dead=True)
    assert not zeroed[:, dead].any()
    alive = np.setdiff1d(np.arange(40), dead)
    assert np.array_equal(zeroed[:, alive], weight[:, alive])


def test_a_factor_at_hand_is_used() -> None:
    weight, moment = weights(5, 50), correlated(50)
    order = np.arange(50)[::-1].copy()
    factor = inverse_factor(moment[np.ix_(order, order)], 0.5)
    wanted = with_feedback(weight, moment, nearest, order=order, damping=0.5)
    assert np.array_equal(with_feedback(weight, moment, nearest, order=order, factor=factor), wanted)
    assert not np.array_equal(with_feedback(weight, moment, nearest, order=order), wanted)


@pytest.mark.parametrize("columns", [1, 16, 40, 130, 300])
@pytest.mark.parametrize("group", GROUPS)
def test_groups_are_seen_as_their_columns_will_be_before_the_first(group: int, columns: int) -> None:
    weight, moment = weights(6, columns), correlated(columns)
    order = np.random.default_rng(3).permutation(columns)
    seen: dict[int, np.ndarray] = {}

    def begin(place: int, values: np.ndarray) -> None:
        seen[place] = values.copy()

    taken: list[tuple[int, int]] = []

    def quantize(column: int, values: np.ndarray) -> np.ndarray:
        taken.append((column, max(seen)))
        return nearest(column, values)

    found = with_feedback(weight, moment, quantize, order=order, group=group, begin=begin)
    assert sorted(seen) == list(range(0, columns, group))
    assert [start for _, start in taken] == [place // group * group for place in range(columns)]
    for start, values in seen.items():
        stop = min(start + group, columns)
        # What the group is then: as if all columns before it were quantized and those of the group kept as they come.
        done = dict(zip(order[:start].tolist(), found[:, order[:start]].T, strict=True))

        def replay(column: int, values: np.ndarray, done: dict[int, np.ndarray] = done) -> np.ndarray:
            return done.get(column, values).copy()

        wanted = with_feedback(weight, moment, replay, order=order)[:, order[start:stop]].T
        assert values.shape == (stop - start, 6)
        assert np.abs(values - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_groups_have_lengths_that_updates_are_made_at() -> None:
    with pytest.raises(ValueError, match="groups of 48 columns"):
        with_feedback(weights(2, 96), correlated(96), nearest, group=48)


def test_activation_order_keeps_ties_in_their_order() -> None:
    assert activation_order(np.array([1, 3, 1, 3, 0], np.float32)).tolist() == [1, 3, 0, 2, 4]


def test_the_same_every_time_and_nothing_changed() -> None:
    weight, moment = weights(20, 90), correlated(90)
    copies = weight.copy(), moment.copy()
    first = with_feedback(weight, moment, nearest)
    assert np.array_equal(first, with_feedback(weight, moment, nearest))
    assert np.array_equal(weight, copies[0])
    assert np.array_equal(moment, copies[1])
