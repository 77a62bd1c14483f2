"""No partition is better: oracles that try everything, and other packages."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyquant import clustering
from anyquant.clustering import fallback
from anyquant.runtime import native, native_kmeans

WIDTHS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
Example = Callable[[str, str, int, int, int], tuple[np.ndarray, np.ndarray | None]]

HOSTILE = ["heavy tails", "equally spaced", "integers", "blocks of sixteen levels", "far from zero", "large"]
HOSTILE += ["many scales", "two far groups", "one far outlier"]

needs_library = pytest.mark.skipif(not native.available(), reason=f"no compiled library: {native.why_not()}")


def best_of_all(values: np.ndarray, weights: np.ndarray, k: int) -> float:
    """The least error over every way to cut the sorted values into at most k clusters, in exact arithmetic."""
    order = np.argsort(values, kind="stable")
    x, w = [Fraction(float(values[i])) for i in order], [Fraction(float(weights[i])) for i in order]

    def error(start: int, end: int) -> Fraction:
        mass = sum(w[start:end], Fraction(0))
        if not mass:
            return Fraction(0)
        mean = sum((a * b for a, b in zip(w[start:end], x[start:end], strict=True)), Fraction(0)) / mass
        return sum((a * (b - mean) ** 2 for a, b in zip(w[start:end], x[start:end], strict=True)), Fraction(0))

    n, parts = len(x), {}
    for start, end in itertools.combinations(range(n + 1), 2):
        parts[start, end] = error(start, end)
    ways = itertools.combinations(range(1, n), min(k, n) - 1)
    return float(min(sum(parts[c] for c in itertools.pairwise((0, *inner, n))) for inner in ways))


def full_programme(values: np.ndarray, weights: np.ndarray, ks: list[int]) -> np.ndarray:
    """The least errors by the plain dynamic programme over all starts, costs added up without cancellation."""
    order = np.argsort(values, kind="stable")
    x, w = values[order].astype(np.float64), weights[order].astype(np.float64)
    n = x.size
    cost = np.full((n + 1, n + 1), np.inf)
    for start in range(n):
        tail, mass = x[start:] - x[start], np.cumsum(w[start:])
        mean = np.cumsum(w[start:] * tail) / mass
        mass_before, mean_before = np.concatenate([[0], mass[:-1]]), np.concatenate([[0], mean[:-1]])
        cost[start, start + 1 :] = np.cumsum(w[start:] * mass_before / mass * (tail - mean_before) ** 2)
    best, errors = np.full(n + 1, np.inf), {}
    best[0] = 0
    for k in range(1, min(max(ks), n) + 1):
        best = (best[:, None] + cost).min(axis=0)
        errors[k] = float(best[n])
    return np.array([errors.get(k, 0.0) for k in ks])


def error_of(values: np.ndarray, weights: np.ndarray, centroids: np.ndarray) -> float:
    nearest = np.abs(values[:, None].astype(np.float64) - centroids).min(axis=1)
    return float((weights * nearest**2).sum())


@st.composite
def small_rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    n = draw(st.integers(1, 9))
    values = draw(st.lists(st.floats(-8, 8, width=16), min_size=n, max_size=n))
    weights = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 1.5, 40.0]), min_size=n, max_size=n))
    return np.array(values, np.float32), np.array(weights, np.float32), draw(st.integers(1, 10))


@pytest.mark.parametrize("run", [pytest.param("compiled", marks=needs_library), "numpy"])
@settings(max_examples=200, deadline=None)
@given(small_rows())
def test_no_partition_is_better(run: str, case: tuple[np.ndarray, np.ndarray, int]) -> None:
    values, weights, k = case
    module = native_kmeans if run == "compiled" else fallback
    [[error]] = module.kmeans_errors(values[None], weights, np.array([k], np.int32))
    assert error == pytest.approx(
        best_of_all(values, weights if weights.any() else weights + 1, k), rel=1e-12, abs=1e-12
    )


@needs_library
def test_a_thousand_random_rows_reach_the_full_programme() -> None:
    rng = np.random.default_rng(1)
    ks, worst = [1, 2, 3, 5, 8, 13], 0.0
    for n in rng.integers(20, 49, 100):
        weights = rng.lognormal(0, 1.5, n).astype(np.float32)
        values = rng.standard_normal((10, n)).astype(np.float32)
        errors = clustering.kmeans_errors(values, weights, ks)
        expected = np.stack([full_programme(row, weights, ks) for row in values])
        worst = max(worst, float(np.abs(errors / expected - 1).max()))
    assert worst < 1e-9


@pytest.mark.parametrize("kind", HOSTILE)
def test_adversarial_rows_reach_the_full_programme(kind: str, backend: str, example: Example) -> None:
    for seed, n in enumerate([1, 2, 7, 33, 100]):
        values, weights = example(kind, "mild", 2, n, seed)
        assert weights is not None
        errors = clustering.kmeans_errors(values, weights, WIDTHS)
        expected = np.stack([full_programme(row, weights, WIDTHS) for row in values])
        np.testing.assert_allclose(errors, expected, rtol=1e-9, atol=1e-20 * float(expected.max()))


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "integers", "two far groups", "one far outlier"])
def test_never_worse_than_scikit_learn(kind: str, backend: str, example: Example) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    values, weights = example(kind, "mild", 2, 120, 3)
    assert weights is not None
    for k in (2, 5, 16):
        ours = clustering.kmeans_errors(values, weights, [k])[:, 0]
        for row, error in zip(values, ours, strict=True):
            model = cluster.KMeans(k, n_init=10, random_state=0)
            model.fit(row[:, None].astype(np.float64), sample_weight=weights)
            theirs = error_of(row, weights, np.sort(model.cluster_centers_[:, 0]))
            assert error <= theirs * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "equally spaced", "far from zero", "two far groups"])
def test_never_worse_than_ckmeans(kind: str, backend: str, example: Example) -> None:
    ckmeans = pytest.importorskip("ckmeans")
    values, _ = example(kind, "none", 2, 150, 4)
    for k in (2, 5, 16, 64):
        ours = clustering.kmeans_errors(values, None, [k])[:, 0]
        for row, error in zip(values, ours, strict=True):
            parts = ckmeans.ckmeans(row.astype(np.float64), k)
            assert error <= sum(((part - part.mean()) ** 2).sum() for part in parts) * (1 + 1e-9)
