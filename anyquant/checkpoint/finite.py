"""Values to float32, and the check that all of them are finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import numpy as np

from anyquant.errors import NonFiniteError

_CHUNK = 1 << 20  # elements looked at together: a few MB of temporaries


def to_float32(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Convert stored values to a new float32 array in C order.

    Args:
        stored: any shape; float64, float32, float16, or uint16 bit patterns of BF16.
        dtype: "F64", "F32", "F16" or "BF16".
    """
    if dtype == "BF16":
        wide = np.zeros(stored.shape, np.uint32)
        np.left_shift(stored, 16, out=wide, dtype=np.uint32, casting="safe")
        return wide.view(np.float32)
    with np.errstate(all="ignore"):  # F64 beyond float32 becomes Inf, which the check below names
        return stored.astype(np.float32, order="C")


def is_finite(values: np.ndarray) -> bool:
    """Say whether every value of a C-contiguous float32 array is finite."""
    flat = values.reshape(-1)
    return all(bool(np.isfinite(flat[i : i + _CHUNK]).all()) for i in range(0, flat.size, _CHUNK))


def raise_nonfinite(name: str, shape: tuple[int, ...], chunks: Iterable[np.ndarray], where: str) -> NoReturn:
    """Raise NonFiniteError for a tensor that is known to hold NaN or Inf.

    Args:
        name: tensor's name, for the message.
        shape: of the whole tensor.
        chunks: all of its values in C order, cut anywhere.
        where: file, for the message.
    """
    first, count, start = -1, 0, 0
    for chunk in chunks:
        bad = ~np.isfinite(chunk.reshape(-1))
        found = int(np.count_nonzero(bad))
        if found and first < 0:
            first = start + int(bad.argmax())
        count += found
        start += bad.size
    index = tuple(int(i) for i in np.unravel_index(max(first, 0), shape))
    raise NonFiniteError(name, index, count, where)
