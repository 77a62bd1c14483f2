"""k-means of the compiled library. :mod:`anyquant.clustering` checks the arguments; here they only become pointers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anyquant.runtime import native


def kmeans_errors(
    values: NDArray[np.float32], weights: NDArray[np.float32] | None, ks: NDArray[np.int32]
) -> NDArray[np.float64]:
    """The compiled :func:`anyquant.clustering.kmeans_errors`: arrays in C order, at least one row and column."""
    rows, n = values.shape
    errors = np.empty((rows, ks.size), np.float64)
    workspace = _workspace(n)
    native.call(
        "aq_kmeans_errors", _about(values), values.ctypes.data, values.size, *_weights(weights), rows, n,
        ks.ctypes.data, ks.size, errors.ctypes.data, errors.size, workspace.ctypes.data, workspace.nbytes,
    )  # fmt: skip
    return errors


def kmeans(values: NDArray[np.float32], weights: NDArray[np.float32] | None, k: int) -> NDArray[np.float64]:
    """The compiled :func:`anyquant.clustering.kmeans`: arrays in C order, at least one row and column."""
    rows, n = values.shape
    centroids = np.empty((rows, k), np.float64)
    workspace = _workspace(n)
    native.call(
        "aq_kmeans", _about(values), values.ctypes.data, values.size, *_weights(weights), rows, n, k,
        centroids.ctypes.data, centroids.size, workspace.ctypes.data, workspace.nbytes,
    )  # fmt: skip
    return centroids


def assign(values: NDArray[np.float32], codebook: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The compiled :func:`anyquant.clustering.assign`: arrays in C order."""
    codes = np.empty(values.shape, np.uint8)
    native.call(
        "aq_assign", _about(values), values.ctypes.data, values.size, *values.shape,
        codebook.ctypes.data, codebook.size, codebook.shape[1], codes.ctypes.data, codes.size,
    )  # fmt: skip
    return codes


def _about(values: NDArray[np.float32]) -> str:
    return f"{values.shape[0]} rows of {values.shape[1]} values"


def _weights(weights: NDArray[np.float32] | None) -> tuple[int | None, int]:
    return (None, 0) if weights is None else (weights.ctypes.data, weights.size)


def _workspace(n: int) -> NDArray[np.float64]:
    """Memory for one row at a time; doubles, because it must be aligned for them."""
    return np.empty(-(-native.library().aq_kmeans_workspace(n) // 8), np.float64)
