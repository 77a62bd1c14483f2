"""The scaling vector against a dense solver, and against what it is for."""

from __future__ import annotations

import numpy as np
import pytest

from anyquant.scaling import best_scale, gradient_scale, stored_scale


def problem(out: int, columns: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Weights of unlike columns, codebook values that know nothing of it, a moment of correlated inputs, a scale."""
    rng = np.random.default_rng(seed)
    true = np.exp2(rng.uniform(-2, 2, columns))
    values = rng.choice([-1.5, -0.5, 0.5, 1.5], (out, columns))
    weight = (values * true + 0.05 * rng.standard_normal((out, columns))).astype(np.float32)
    x = rng.standard_normal((4 * columns, columns)) @ rng.standard_normal((columns, columns))
    return weight, values.astype(np.float32), (x.T @ x / len(x)).astype(np.float32), true


def loss(weight: np.ndarray, values: np.ndarray, moment: np.ndarray, scale: np.ndarray, rows: np.ndarray) -> float:
    """Row by row, in plain words."""
    total = 0.0
    for i in range(len(weight)):
        lost = weight[i].astype(np.float64) - values[i].astype(np.float64) * scale
        total += float(rows[i] * (lost @ moment.astype(np.float64) @ lost))
    return total


@pytest.mark.parametrize("shape", [(40, 12), (1, 5), (7, 1), (64, 33)])
def test_the_closed_form_is_the_least_squares_solution(shape: tuple[int, int]) -> None:
    weight, values, moment, _ = problem(*shape)
    rows = np.random.default_rng(1).uniform(0.5, 2, shape[0]).astype(np.float32)
    # The loss of all rows as one least-squares problem in the scale: sqrt(r_i) L^T (w_i - D_i a).
    half = np.linalg.cholesky(moment.astype(np.float64) + 1e-9 * np.eye(shape[1])).T
    system = np.concatenate([np.sqrt(r) * half * v for r, v in zip(rows, values, strict=True)])
    right = np.concatenate([np.sqrt(r) * half @ w for r, w in zip(rows, weight, strict=True)])
    expected = np.linalg.lstsq(system, right, rcond=None)[0]
    found = best_scale(weight, values, moment, np.ones(shape[1], np.float32), rows)
    if (expected > 0).all() and shape[0] > 1:
        ratio = found / expected
        np.testing.assert_allclose(ratio / ratio.mean(), 1, atol=0.05)  # ridge, FP16, and the common factor
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, found.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("shape", [(200, 16), (40, 130)])
def test_unlike_columns_are_found_and_steps_arrive_where_the_closed_form_is(shape: tuple[int, int]) -> None:
    weight, values, moment, true = problem(*shape)
    factor = np.exp(np.mean(np.log(true)))  # what the codebooks take over
    rows = np.random.default_rng(1).uniform(0.5, 2, shape[0]).astype(np.float32)
    before = np.ones(shape[1], np.float32)

    def lost(scale: np.ndarray) -> float:
        return loss(weight, values * factor, moment, scale, rows)

    closed, stepped = (solve(weight, values, moment, before, rows) for solve in (best_scale, gradient_scale))
    assert lost(closed) < 0.01 * lost(before)
    assert lost(stepped) < 1.2 * lost(closed)
    np.testing.assert_allclose(stepped, closed, rtol=0.05)


def test_columns_of_which_nothing_is_known_keep_their_scale() -> None:
    weight, values, moment, _ = problem(20, 6)
    moment[2] = moment[:, 2] = 0  # an input that was always 0
    values[:, 4] = 0  # all weights of a column are kept apart
    before = np.ones(6, np.float32)
    found = best_scale(weight, values, moment, before)
    assert np.isfinite(found).all()
    assert (found > 0).all()
    np.testing.assert_allclose(found[2] / found[4], 1, rtol=2e-3)  # both what they were, up to the common factor


def test_negative_solutions_are_not_taken() -> None:
    weight = -np.ones((3, 2), np.float32)
    values = np.ones((3, 2), np.float32)
    found = best_scale(weight, values, np.eye(2, dtype=np.float32), np.ones(2, np.float32))
    np.testing.assert_array_equal(found, np.ones(2, np.float32))


def test_nothing_at_all_leaves_the_scale() -> None:
    zero = np.zeros((3, 4), np.float32)
    found = best_scale(zero, zero, np.zeros((4, 4), np.float32), np.ones(4, np.float32))
    np.testing.assert_array_equal(found, np.ones(4, np.float32))
    found = gradient_scale(zero, zero, np.zeros((4, 4), np.float32), np.ones(4, np.float32))
    np.testing.assert_array_equal(found, np.ones(4, np.float32))


def test_what_is_stored_lies_about_one() -> None:
    stored = stored_scale(np.array([1e-9, 1e3, 1e3, 1e3, 2e3]))
    assert stored.min() >= 1 / 16
    assert stored.max() <= 16
    np.testing.assert_array_equal(stored, stored.astype(np.float16).astype(np.float32))
