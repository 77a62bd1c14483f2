"""Refinement by the compiled library. :mod:`anyquant.refinement` checks the arguments; here they become pointers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anyquant.runtime import native

Floats = NDArray[np.float32]


def refine_rows(
    moment: Floats,
    weights: Floats,
    fixed: Floats | None,
    scale: Floats | None,
    codebook: Floats,
    codes: NDArray[np.uint8],
    alternations: int,
    cycles: int,
) -> NDArray[np.float64]:
    """The compiled :func:`anyquant.refinement.fallback.refine_rows`: arrays in C order, at least one column."""
    rows, n = weights.shape
    k = codebook.shape[1]
    losses = np.empty((rows, 2), np.float64)
    workspace = np.empty(-(-native.library().aq_refine_workspace(n, k) // 8), np.float64)
    native.call(
        "aq_refine_rows", f"{rows} rows of {n} weights and {k} entries",
        moment.ctypes.data, moment.size, weights.ctypes.data, weights.size, *_optional(fixed), *_optional(scale),
        rows, n, k, alternations, cycles, codebook.ctypes.data, codebook.size, codes.ctypes.data, codes.size,
        losses.ctypes.data, losses.size, workspace.ctypes.data, workspace.nbytes,
    )  # fmt: skip
    return losses


def _optional(array: Floats | None) -> tuple[int | None, int]:
    return (None, 0) if array is None else (array.ctypes.data, array.size)
