"""Bit streams: the one on-disk encoding of codes.

Element i of a row occupies bits [i*b, i*b+b), least significant bit first; each row is padded to a byte
with zeros. The NumPy functions here define the encoding; a compiled library with the same bytes may be
plugged in with :func:`set_backend`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]

_CHUNK = 1 << 18  # elements packed, dequantized or checked at a time


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row of ``columns`` codes of ``bits`` bits."""
    return (columns * bits + 7) // 8


def code_offsets(bits: np.ndarray, length: int) -> NDArray[np.int64]:
    """Byte offsets int64 [channels + 1] of the channels of a codebook tensor, each ``length`` codes long."""
    sizes = (length * bits.astype(np.int64) + 7) // 8
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])


def entry_offsets(bits: np.ndarray) -> NDArray[np.int64]:
    """Offsets int64 [channels + 1] of the codebooks of channels of these widths among all entries."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(1 << bits.astype(np.int64))])


def row_chunks(shape: tuple[int, ...], least: int = 1) -> Iterator[slice]:
    """Slices of the first axis that cover this shape, each of a quarter of a million weights or ``least`` rows."""
    if not shape:
        yield slice(None)
        return
    step = max(least, _CHUNK // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def pack_numpy(values: Codes, bits: int) -> Codes:
    """Pack uint8 codes [rows, columns], each below 2**bits, into uint8 [rows, row_bytes]."""
    rows, columns = values.shape
    packed = np.zeros((rows, row_bytes(columns, bits)), np.uint8)
    for part in row_chunks((rows, columns)) if packed.size else ():
        packed[part] = _from_words(_join(_groups(values[part], 8), bits), bits, 8)[:, : packed.shape[1]]
    return packed


def unpack_numpy(codes: Codes, columns: int, bits: int) -> Codes:
    """Inverse of :func:`pack_numpy`: uint8 [rows, row_bytes] to uint8 [rows, columns]."""
    rows = codes.shape[0]
    values = np.zeros((rows, columns), np.uint8)
    for part in row_chunks((rows, columns)) if codes.size else ():
        values[part] = _from_words(_join(_groups(codes[part], bits), 8), 8, bits)[:, :columns]
    return values


# Eight codes of b bits are b bytes, and both are one 64-bit word: the codes' bits, first code lowest, and the bytes',
# first byte lowest, are the same.


def _groups(row_major: Codes, length: int) -> Codes:
    """[rows, n] to [rows, ceil(n / length), length], padded with zeros."""
    rows, columns = row_major.shape
    groups = -(-columns // length)
    if groups * length != columns:
        padded = np.zeros((rows, groups * length), np.uint8)
        padded[:, :columns] = row_major
        row_major = padded
    return row_major.reshape(rows, groups, length)


def _join(fields: Codes, bits: int) -> NDArray[np.uint64]:
    """[rows, groups, n] fields of ``bits`` bits to words [rows, groups], the first field lowest."""
    words = np.zeros(fields.shape[:2], np.uint64)
    for i in range(fields.shape[2]):
        words |= fields[:, :, i].astype(np.uint64) << np.uint64(i * bits)
    return words


def _from_words(words: NDArray[np.uint64], count: int, bits: int) -> Codes:
    """Words [rows, groups] to ``count`` fields of ``bits`` bits each: uint8 [rows, groups * count]."""
    fields = np.empty((*words.shape, count), np.uint8)
    for i in range(count):
        fields[:, :, i] = (words >> np.uint64(i * bits)) & np.uint64((1 << bits) - 1)
    return fields.reshape(len(words), -1)


_pack: Callable[[Codes, int], Codes] = pack_numpy
_unpack: Callable[[Codes, int, int], Codes] = unpack_numpy


def set_backend(pack: Callable[[Codes, int], Codes], unpack: Callable[[Codes, int, int], Codes]) -> None:
    """Replace the NumPy functions by others that give the same bytes."""
    global _pack, _unpack
    _pack, _unpack = pack, unpack


def pack(values: Codes, bits: int) -> Codes:
    """Pack uint8 codes [rows, columns] of 0..8 bits into uint8 [rows, row_bytes].

    Raises:
        ValueError: bits outside 0..8, or a code that does not fit.
    """
    if not 0 <= bits <= 8:
        raise ValueError(f"bits must be 0..8, not {bits}")
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"codes must be integers [rows, columns], not {values.dtype} {values.shape}")
    # Before the cast to uint8, which would wrap.
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < 1 << bits:
        raise ValueError(f"codes {int(values.min())}..{int(values.max())} do not fit in {bits} bits")
    return _pack(np.ascontiguousarray(values, np.uint8), bits)


def unpack(codes: Codes, columns: int, bits: int) -> Codes:
    """Unpack uint8 [rows, row_bytes] into uint8 codes [rows, columns] of 0..8 bits.

    Raises:
        ValueError: bits outside 0..8, or rows of another length than ``columns`` needs.
    """
    if not 0 <= bits <= 8:
        raise ValueError(f"bits must be 0..8, not {bits}")
    codes = np.ascontiguousarray(codes, np.uint8)
    if codes.ndim != 2 or codes.shape[1] != row_bytes(columns, bits):
        raise ValueError(
            f"{columns} codes of {bits} bits need rows of {row_bytes(columns, bits)} bytes, not an array {codes.shape}"
        )
    return _unpack(codes, columns, bits)
