"""NumPy does the compiled library's work with the same bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyquant.clustering import fallback
from anyquant.runtime import native, native_kmeans

WIDTHS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
Example = Callable[[str, str, int, int, int], tuple[np.ndarray, np.ndarray | None]]

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no compiled library: {native.why_not()}")


def check_same_bytes(values: np.ndarray, weights: np.ndarray | None, ks: np.ndarray, names: list[str]) -> None:
    compiled, numpy = (module.kmeans_errors(values, weights, ks) for module in (native_kmeans, fallback))
    different = (compiled.view(np.int64) != numpy.view(np.int64)).any(axis=1)
    assert [names[row] for row in np.flatnonzero(different)] == []
    compiled, numpy = (module.kmeans(values, weights, int(ks[-1])) for module in (native_kmeans, fallback))
    different = (compiled.view(np.int64) != numpy.view(np.int64)).any(axis=1)
    assert [names[row] for row in np.flatnonzero(different)] == []


@pytest.mark.parametrize("n", [1, 2, 3, 11, 64, 270])
def test_numpy_gives_the_same_bytes(n: int, example: Example, kinds: list[str], weightings: list[str]) -> None:
    names, values, weights = [], [], []
    for kind, weighting in itertools.product(kinds, weightings):
        row, weight = example(kind, weighting, 1, n, len(names))
        names.append(f"{kind}, weights {weighting}")
        values.append(row[0])
        weights.append(np.ones(n, np.float32) if weight is None else weight)
    check_same_bytes(np.array(values), np.array(weights), np.array(WIDTHS, np.int32), names)


@pytest.mark.parametrize("weighting", ["none", "mild"])
def test_long_rows_give_the_same_bytes(weighting: str, example: Example, kinds: list[str]) -> None:
    values = np.concatenate([example(kind, "none", 1, 1500, 5)[0] for kind in kinds])
    weights = example("normal", weighting, 1, 1500, 5)[1]
    check_same_bytes(values, weights, np.array([2, 8, 90], np.int32), kinds)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.sets(st.integers(1, 256), min_size=1, max_size=3))
def test_numpy_gives_the_same_bytes_for_any_row(
    example: Example, kinds: list[str], seed: int, n: int, ks: set[int]
) -> None:
    names = [kind for kind in kinds for _ in range(5)]
    values = np.concatenate([example(kind, "none", 5, n, seed)[0] for kind in kinds])
    weights = np.random.default_rng(seed).lognormal(0, 3, values.shape).astype(np.float32)
    check_same_bytes(values, weights, np.array(sorted(ks), np.int32), names)


@pytest.mark.parametrize("k", [1, 2, 5, 16, 200, 256])
def test_numpy_gives_the_same_codes(k: int, example: Example, kinds: list[str]) -> None:
    for kind in kinds:
        values, _ = example(kind, "none", 3, 300, k)
        codebook = native_kmeans.kmeans(values, None, k).astype(np.float32)
        np.testing.assert_array_equal(native_kmeans.assign(values, codebook), fallback.assign(values, codebook))
