"""Codebook tensors, put together channel by channel; what the methods of rows and those of columns share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from anyquant.clustering import kmeans_errors
from anyquant.errors import InputError
from anyquant.ir import FP16_MAX, CodebookSpec, Tensor
from anyquant.ir.packing import code_offsets, entry_offsets, pack, row_bytes
from anyquant.methods.protocol import Floats, LevelArray, Levels, Settings

MOST_BITS = 8
_REACH = 1.0  # of a channel's bulk beyond its quartiles, in units of their distance


def channel_bytes(length: int, width: int) -> int:
    """Bytes of a channel of some length: its width, codes and codebook."""
    return 1 + row_bytes(length, width) + 2 * (1 << width)


def offered_widths(length: int) -> tuple[int, ...]:
    """The widths 0 to 8; a codebook that makes its channel larger than FP16 is none of them, but for the first two."""
    wide = [width for width in range(2, MOST_BITS + 1) if channel_bytes(length, width) <= 2 * length]
    return (0, 1, *wide)


def clustering_errors(values: Floats, counts: Floats, widths: Sequence[int]) -> NDArray[np.float64]:
    """The least weighted squared error of channels at each width, float64 [channels, widths].

    Clustering takes weights that are all 0 for 1; a channel of removed weights alone loses nothing.

    Args:
        values: float32 [channels, length].
        counts: float32 [channels, length] or [length], what errors count; 0 where a weight was removed.
        widths: of the codes.
    """
    errors = kmeans_errors(values, counts, [1 << width for width in widths])
    errors[~counts.any(axis=-1)] = 0
    return errors


def levels_of(shape: tuple[int, int], axis: int, widths: tuple[int, ...], overhead: int) -> Levels:
    """What channels choose from.

    Args:
        shape: of the matrix, [out, in].
        axis: 0 where each row owns a codebook, 1 where each column does.
        widths: on offer, ascending.
        overhead: bytes of the matrix whatever the widths.
    """
    length = shape[1 - axis]
    nbytes = tuple(channel_bytes(length, width) for width in widths)
    return Levels(shape[axis], nbytes, tuple(row_bytes(length, width) for width in widths), overhead)


def require_fp16(weight: Floats, stored: str = "codebooks") -> None:
    """Refuse what FP16 cannot hold; ``stored`` is what is stored in it.

    Raises:
        InputError: a weight lies outside FP16; says which.
    """
    largest = np.abs(weight).max()
    if largest > FP16_MAX:
        row, column = np.unravel_index(np.abs(weight).argmax(), weight.shape)
        raise InputError(
            f"the weight {weight[row, column]} at [{row}, {column}] does not fit into FP16 (+-{FP16_MAX:.0f}), in "
            f"which {stored} are stored. The method block holds it."
        )


class CodebookBuilder:
    """The arrays of a codebook tensor in the making."""

    def __init__(self, spec: CodebookSpec, bits: LevelArray) -> None:
        """Begin with zeros; ``bits`` are the widths of the channels, uint8 [channels]."""
        self._spec, self._bits = spec, bits.astype(np.uint8)
        self._offsets = code_offsets(bits, spec.shape[1 - spec.axis])
        self._starts = entry_offsets(bits)
        self._codes = np.zeros(spec.code_bytes, np.uint8)
        self._codebook = np.zeros(spec.codebook_entries, np.float16)

    def put(self, channels: NDArray[np.int64], codes: NDArray[np.uint8], centroids: NDArray[np.float16]) -> None:
        """Fill in channels of one width.

        Args:
            channels: int64 [n], their numbers.
            codes: uint8 [n, length].
            centroids: float16 [n, 2**width], ascending.
        """
        packed = pack(codes, int(self._bits[channels[0]]))
        self._codes[self._offsets[channels][:, None] + np.arange(packed.shape[1])] = packed
        self._codebook[self._starts[channels][:, None] + np.arange(centroids.shape[1])] = centroids

    def tensor(self, values: Floats, outliers: NDArray[np.int64], input_scale: Floats | None = None) -> Tensor:
        """The tensor.

        Args:
            values: float32 [out, in]; outliers take theirs from it.
            outliers: flat indices, ascending.
            input_scale: of the columns [in], where the spec has one.
        """
        arrays: dict[str, np.ndarray] = {".bits": self._bits, ".codes": self._codes, ".codebook": self._codebook}
        if input_scale is not None:
            arrays[".input_scale"] = input_scale.astype(np.float16)
        return Tensor(self._spec, arrays | _outlier_arrays(values, outliers, self._spec))


def _outlier_arrays(values: Floats, outliers: NDArray[np.int64], spec: CodebookSpec) -> dict[str, np.ndarray]:
    if not len(outliers):
        return {}
    row, column = np.divmod(outliers, values.shape[1])
    about = spec.arrays()
    return {
        ".outlier_indptr": np.searchsorted(row, np.arange(len(values) + 1)).astype(np.uint32),
        ".outlier_index": column.astype(about[".outlier_index"][0]),
        ".outlier_value": values[row, column].astype(np.float16),
    }


def share(settings: Settings, name: str, shape: tuple[int, int]) -> int:
    """How many weights of a matrix a setting in percent stands for."""
    return round(float(settings[name]) / 100 * shape[0] * shape[1])


def excess(values: Floats) -> Floats:
    """By how much each value sticks out of its channel's bulk, which ends beyond the quartiles by their distance.

    Cf. SqueezeLLM (arXiv 2306.07629, section 4.2).

    Args:
        values: float32 [channels, length].

    Returns:
        float32 [channels, length], 0 within the bulk.
    """
    low, high = np.quantile(values, (0.25, 0.75), axis=1, keepdims=True)
    reach = _REACH * (high - low)
    beyond: Floats = np.maximum(np.maximum(values - (high + reach), (low - reach) - values), 0)
    return beyond


def largest(score: Floats, count: int) -> NDArray[np.int64]:
    """Flat indices, ascending, of the ``count`` largest scores; of equal ones those that come first."""
    flat = score.ravel()
    if count <= 0:
        return np.empty(0, np.int64)
    least = np.partition(flat, flat.size - count)[flat.size - count]
    above = np.flatnonzero(flat > least)
    return np.sort(np.concatenate([above, np.flatnonzero(flat == least)[: count - len(above)]]))
