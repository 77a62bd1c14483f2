"""Exact weighted k-means in one dimension, many rows at a time.

The least error of a row over all ways to place k centroids, not a local one. Sorted values, prefix sums, and the
convexity of the least error in k make it fast; ``kernels/core/kmeans.cpp`` says how, with the sources. It is exact up
to rounding: about 1e-15 of the row's spread about its mean, or about the means of parts that lie far apart.

The compiled library does the work where there is one, else NumPy does the same steps in the same order: the bytes
are the same. Pure functions of their arguments, each row by itself; the compiled ones release the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from anyquant.clustering import fallback
from anyquant.runtime import native, native_kmeans

MOST_CENTROIDS = 256
"""The most centroids of a row: codes are bytes."""


def kmeans_errors(
    values: NDArray[np.float32], weights: NDArray[np.float32] | None, ks: Sequence[int]
) -> NDArray[np.float64]:
    """The least weighted squared error of each row, for several numbers of centroids at about the cost of one.

    Args:
        values: float32 [rows, n], n > 0, finite.
        weights: float32 [n] for all rows or [rows, n], finite, not negative; None for 1 everywhere. An element of
            weight 0 takes no part. A row whose weights are all 0 counts as unweighted.
        ks: numbers of centroids within 1..256, strictly ascending.

    Returns:
        float64 [rows, len(ks)]: the least sum over the row of weight * (value - nearest centroid)**2.

    Raises:
        ValueError: another shape, dtype or number; says which and where.
    """
    values, weights = _checked(values, weights)
    wanted = np.array([_number(k) for k in ks], np.int32)
    if (np.diff(wanted) <= 0).any():
        raise ValueError(f"numbers of centroids must ascend, each one larger than the one before, not {list(ks)}")
    if not values.shape[0] or not wanted.size:
        return np.zeros((values.shape[0], wanted.size))
    run = native_kmeans.kmeans_errors if native.available() else fallback.kmeans_errors
    return run(values, weights, wanted)


def kmeans(values: NDArray[np.float32], weights: NDArray[np.float32] | None, k: int) -> NDArray[np.float64]:
    """The centroids with the least weighted squared error of each row.

    Args:
        values: float32 [rows, n], as in :func:`kmeans_errors`.
        weights: None or float32 [n] or [rows, n], as there.
        k: centroids per row, 1..256.

    Returns:
        float64 [rows, k], ascending; where a row has fewer distinct values than k, those, the last one repeated.

    Raises:
        ValueError: another shape, dtype or number; says which and where.
    """
    values, weights = _checked(values, weights)
    if not values.shape[0]:
        return np.zeros((0, _number(k)))
    run = native_kmeans.kmeans if native.available() else fallback.kmeans
    return run(values, weights, _number(k))


def assign(values: NDArray[np.float32], codebook: NDArray[np.float16] | NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest codebook entry of each value, by comparing with the entries' midpoints in float64.

    Args:
        values: float32 [rows, n], finite.
        codebook: float16 or float32 [rows, k], k of 1..256, each row ascending; entries may repeat.

    Returns:
        uint8 [rows, n]; ties and equal entries go to the lowest code.

    Raises:
        ValueError: another shape or dtype, NaN or Inf, or a row of the codebook that does not ascend.
    """
    values = _matrix("values", values, (np.dtype(np.float32),))
    codebook = _matrix("codebook", codebook, (np.dtype(np.float16), np.dtype(np.float32)))
    rows, k = codebook.shape
    if rows != values.shape[0]:
        raise ValueError(f"values has {values.shape[0]} rows, the codebook {rows}: one codebook row belongs to each")
    _number(k)
    if not (codebook[:, 1:] >= codebook[:, :-1]).all():
        row = int(np.flatnonzero((codebook[:, 1:] < codebook[:, :-1]).any(axis=1))[0])
        raise ValueError(f"row {row} of the codebook does not ascend: sort it")
    if not values.size:
        return np.zeros(values.shape, np.uint8)
    run = native_kmeans.assign if native.available() else fallback.assign
    return run(values, codebook.astype(np.float32))


def _number(k: int) -> int:
    """A number of centroids, if it is one."""
    if not 1 <= k <= MOST_CENTROIDS:
        raise ValueError(f"the number of centroids must be 1..{MOST_CENTROIDS}, not {k}")
    return int(k)


def _matrix(name: str, array: NDArray[np.floating], dtypes: tuple[np.dtype[np.floating], ...]) -> NDArray[np.floating]:
    """The array in C order, if it is [rows, n] of one of the dtypes, and finite."""
    if array.ndim != 2 or array.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} must be {wanted} [rows, n], not {array.dtype} of shape {list(array.shape)}")
    _finite(name, array)
    return np.ascontiguousarray(array)


def _finite(name: str, array: NDArray[np.floating]) -> None:
    """Raise if there is a NaN or Inf."""
    bad = ~np.isfinite(array)
    if bad.any():
        first = [int(i) for i in np.argwhere(bad)[0]]
        raise ValueError(f"{name} holds {bad.sum()} non-finite numbers, the first at index {first}")


def _checked(
    values: NDArray[np.float32], weights: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Values and weights in C order, if they are what :func:`kmeans_errors` asks for."""
    values = _matrix("values", values, (np.dtype(np.float32),))
    rows, n = values.shape
    if n == 0:
        raise ValueError(f"values has {rows} rows of no element: there is nothing to cluster")
    if weights is None:
        return values, None
    if weights.dtype != np.float32 or weights.shape not in ((n,), (rows, n)):
        raise ValueError(
            f"weights must be float32 of shape [{n}] or [{rows}, {n}], not {weights.dtype} of shape "
            f"{list(weights.shape)}"
        )
    _finite("weights", weights)
    if (weights < 0).any():
        first = [int(i) for i in np.argwhere(weights < 0)[0]]
        raise ValueError(f"weights holds a negative number, {weights[tuple(first)]}, at index {first}")
    return values, np.ascontiguousarray(weights)
