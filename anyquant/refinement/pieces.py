"""Codebook tensors taken apart into codes and codebooks of one width each, and put together again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyquant.ir import CodebookSpec, Tensor
from anyquant.ir.dequantize import replace_outliers
from anyquant.ir.packing import code_offsets, entry_offsets, pack, row_bytes, unpack

Codes = NDArray[np.uint8]
Halves = NDArray[np.float16]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Places:
    """Where the codes and entries of each channel lie in the arrays of a tensor."""

    spec: CodebookSpec
    bits: NDArray[np.uint8]
    codes: Ints
    entries: Ints

    @classmethod
    def of(cls, tensor: Tensor, spec: CodebookSpec) -> Places:
        """Those of a tensor."""
        bits = tensor.arrays[".bits"]
        return cls(spec, bits, code_offsets(bits, spec.shape[1 - spec.axis]), entry_offsets(bits))

    def of_codes(self, channels: Ints, width: int) -> Ints:
        """Indices [channels, bytes] of the packed codes of channels of one width."""
        length = row_bytes(self.spec.shape[1 - self.spec.axis], width)
        return self.codes[channels, None] + np.arange(length)

    def of_entries(self, channels: Ints, width: int) -> Ints:
        """Indices [channels, 2**width] of their entries."""
        return self.entries[channels, None] + np.arange(1 << width)

    def parts(self, most: int, bounds: Ints | None = None) -> Iterator[tuple[Ints, int]]:
        """Channels of one width, at most ``most`` together and none across a bound, and the width."""
        for width in np.unique(self.bits).tolist():
            channels = np.flatnonzero(self.bits == width)
            for group in np.split(channels, np.searchsorted(channels, [] if bounds is None else bounds)):
                for start in range(0, len(group), most):
                    yield group[start : start + most], width


def take(tensor: Tensor, places: Places, channels: Ints, width: int) -> tuple[Codes, Halves]:
    """Codes uint8 [channels, length] and codebooks float16 [channels, 2**width] of channels of one width."""
    packed = tensor.arrays[".codes"][places.of_codes(channels, width)]
    codes = unpack(packed, places.spec.shape[1 - places.spec.axis], width)
    return codes, tensor.arrays[".codebook"][places.of_entries(channels, width)]


def put(arrays: dict[str, np.ndarray], places: Places, channels: Ints, width: int, codes: Codes, book: Halves) -> None:
    """Write what :func:`take` gives into the arrays of a tensor, in the canonical form."""
    codes, book = canonical(codes, book)
    arrays[".codes"][places.of_codes(channels, width)] = pack(codes, width)
    arrays[".codebook"][places.of_entries(channels, width)] = book


def canonical(codes: Codes, codebook: Halves) -> tuple[Codes, Halves]:
    """The same values with entries that differ, in ascending order, all used but for repeats of the last one.

    Args:
        codes: uint8 [channels, length], length > 0.
        codebook: float16 [channels, k]; entries without a code may be anything.

    Returns:
        Codes and codebooks of the same shapes.
    """
    channels, k = codebook.shape
    used = np.zeros((channels, k), np.bool_)
    np.put_along_axis(used, codes.astype(np.int64), True, axis=1)
    sortable = np.where(used, codebook.astype(np.float32), np.inf)
    order = np.argsort(sortable, axis=1, kind="stable")
    ascending = np.take_along_axis(sortable, order, axis=1)
    differs = np.ones((channels, k), np.bool_)
    differs[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    place = np.cumsum(differs, axis=1) - 1  # equal entries share one
    count = np.take_along_axis(place, used.sum(axis=1, keepdims=True) - 1, axis=1)
    book = np.zeros((channels, k), np.float32)
    np.put_along_axis(book, place[:, ::-1], ascending[:, ::-1], axis=1)
    book = np.take_along_axis(book, np.minimum(np.arange(k), count), axis=1) + np.float32(0)  # no negative zero
    rank = np.empty((channels, k), np.uint8)
    np.put_along_axis(rank, order, place.astype(np.uint8), axis=1)
    return np.take_along_axis(rank, codes.astype(np.int64), axis=1), book.astype(np.float16)


def fixed_values(tensor: Tensor, spec: CodebookSpec, rows: slice | Ints) -> NDArray[np.float32] | None:
    """Float32 [rows, in] with the outliers of these rows, NaN elsewhere; None where the tensor has none."""
    if not spec.outliers:
        return None
    chosen = np.arange(spec.shape[0])[rows]
    values = np.full((len(chosen), spec.shape[1]), np.nan, np.float32)
    replace_outliers(values, tensor, chosen)
    return values
