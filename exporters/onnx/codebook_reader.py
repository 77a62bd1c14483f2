"""What a CodebookMatMul or CodebookGather node stands for, in NumPy: the definition in docs/onnx-operators.md.

It shares no code with the writer or with the functions in the model, which tests hold against it bit for bit. Nothing
in the arrays is trusted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyquant.errors import CorruptFileError

_MAX_WEIGHTS = 1 << 31
_CHUNK = 1 << 22  # weights decoded at a time


@dataclass(frozen=True)
class Stored:
    """The arrays of a node, in the order of its inputs.

    Attributes:
        bits: uint8 [channels].
        planes: uint8 [rows, ceil(length / 8)].
        codebook: float16 [sum of 2**bits].
        scale: float16 [inputs], or [1] that holds 1.
        indptr: uint32 [outputs + 1], or [1] that holds 0.
        index: uint16 or uint32 [outliers].
        value: float16 [outliers].
    """

    bits: np.ndarray
    planes: np.ndarray
    codebook: np.ndarray
    scale: np.ndarray
    indptr: np.ndarray
    index: np.ndarray
    value: np.ndarray


def weights(stored: Stored, outputs: int, inputs: int, *, by_output: bool) -> NDArray[np.float32]:
    """FP32 [outputs, inputs].

    Args:
        stored: the arrays.
        outputs: rows of the matrix.
        inputs: its columns.
        by_output: whether each output owns a codebook, or each input.

    Raises:
        CorruptFileError: the arrays contradict each other or the size; says which.
    """
    channels, length = (outputs, inputs) if by_output else (inputs, outputs)
    _check(stored, channels, length)
    decoded = _decode(stored, channels, length)
    matrix = decoded if by_output else decoded.T
    if stored.scale.shape != (1,) or stored.scale[0] != 1:
        if stored.scale.shape != (inputs,):
            raise CorruptFileError(f"input_scale has the shape {stored.scale.shape} for {inputs} inputs")
        matrix *= stored.scale.astype(np.float32)
    rows, columns = _outliers(stored, outputs, inputs)
    matrix[rows, columns] = stored.value
    return matrix


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CorruptFileError(message)


def _check(stored: Stored, channels: int, length: int) -> None:
    """Types, and sizes as the widths call for."""
    types = {"bits": "u1", "planes": "u1", "codebook": "f2", "scale": "f2", "indptr": "u4", "value": "f2"}
    for name, dtype in types.items():
        array = getattr(stored, name)
        _require(array.dtype == np.dtype(dtype), f"{name} is {array.dtype}")
        _require(array.ndim == 1 + (name == "planes"), f"{name} has the shape {array.shape}")
    _require(stored.index.dtype in (np.uint16, np.uint32) and stored.index.ndim == 1, f"index is {stored.index.dtype}")
    _require(min(channels, length) > 0, f"{channels} channels of {length}")
    _require(channels * length <= _MAX_WEIGHTS, f"{channels} channels of {length} are more than any matrix of ours")
    _require(stored.bits.shape == (channels,), f"{len(stored.bits)} widths for {channels} channels")
    _require(int(stored.bits.max()) <= 8, f"a channel of {stored.bits.max()} bits")
    rows, size = stored.planes.shape
    needed = int(stored.bits.sum(dtype=np.int64))
    _require(size == (length + 7) // 8, f"planes of {size} bytes for channels of {length}")
    _require(rows >= max(1, needed), f"{rows} planes for {needed} bits")
    entries = int((1 << stored.bits.astype(np.int64)).sum())
    _require(len(stored.codebook) == entries, f"{len(stored.codebook)} codebook entries, the widths call for {entries}")
    _require(bool(np.isfinite(stored.codebook).all()), "a codebook entry is not finite")


def _decode(stored: Stored, channels: int, length: int) -> NDArray[np.float32]:
    """Entries of the codebooks that the codes stand for: FP32 [channels, length]."""
    width = stored.bits.astype(np.int64)
    entries = 1 << width
    first_row, first_entry = np.cumsum(width) - width, np.cumsum(entries) - entries
    values = stored.codebook.astype(np.float32)
    decoded = np.empty((channels, length), np.float32)
    step = max(1, _CHUNK // length)
    for start in range(0, channels, step):
        some = slice(start, min(channels, start + step))
        codes = np.zeros((some.stop - start, length), np.uint8)
        for plane in range(int(width[some].max())):
            owners = np.flatnonzero(width[some] > plane)
            packed = stored.planes[first_row[some][owners] + plane]
            codes[owners] |= np.unpackbits(packed, axis=1, count=length, bitorder="little") << plane
        np.take(values, codes + first_entry[some, None], out=decoded[some])
    return decoded


def _outliers(stored: Stored, outputs: int, inputs: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each outlier."""
    count = len(stored.value)
    _require(len(stored.index) == count, f"{len(stored.index)} outlier columns for {count} values")
    pointers = stored.indptr.astype(np.int64)
    if pointers.tolist() == [0] and not count:
        pointers = np.zeros(outputs + 1, np.int64)
    _require(len(pointers) == outputs + 1, f"{len(pointers)} outlier row pointers for {outputs} rows")
    ordered = pointers[0] == 0 and pointers[-1] == count and not (np.diff(pointers) < 0).any()
    _require(bool(ordered), f"outlier row pointers do not ascend from 0 to {count}")
    rows = np.repeat(np.arange(outputs), np.diff(pointers))
    columns = stored.index.astype(np.int64)
    _require(not (columns >= inputs).any(), f"an outlier in a column beyond {inputs}")
    again = (np.diff(rows) == 0) & (np.diff(columns) <= 0)
    _require(not again.any(), "outlier columns do not ascend in their row")
    return rows, columns
