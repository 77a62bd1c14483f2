"""The oracle: NumPy dequantization of every kind to FP32, and the digest of the result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from anyquant.ir.ggml_blocks import dequantize_blocks
from anyquant.ir.packing import code_offsets, entry_offsets, row_bytes, row_chunks, unpack
from anyquant.ir.spec import AffineSpec, BlockSpec, CodebookSpec, DenseSpec, GGMLSpec
from anyquant.ir.tensor import Tensor

__all__ = ["block_integers", "dequantize", "digest", "row_chunks", "tensor_digest"]

Floats = NDArray[np.float32]


def dequantize(tensor: Tensor, rows: slice | None = None) -> Floats:
    """FP32 values [out, in] of a tensor, or of a slice of its rows (the first axis of a dense tensor).

    BFP is exact; a codebook value is float32(entry) * float32(input_scale), rounded once, then outliers
    replace it; affine is (q - zero) * scale.
    """
    spec = tensor.spec
    if isinstance(spec, DenseSpec):
        return _dense(tensor, spec, rows if rows is not None else slice(None))
    chosen = range(*(rows or slice(None)).indices(spec.shape[0]))
    values = np.empty((len(chosen), spec.shape[1]), np.float32)
    for part in row_chunks(values.shape):  # the intermediate integers take several times the room of the result
        values[part] = _matrix(tensor, chosen[part])
    return values


def _matrix(tensor: Tensor, chosen: range) -> Floats:
    """The chosen rows, a non-empty range."""
    spec = tensor.spec
    last = chosen[-1] + chosen.step
    rows = slice(chosen[0], last if last >= 0 else None, chosen.step)
    if isinstance(spec, GGMLSpec):
        return dequantize_blocks(tensor.arrays[".blocks"][rows], spec.type)
    if isinstance(spec, BlockSpec):
        return _block(tensor, spec, rows)
    if isinstance(spec, AffineSpec):
        return _affine(tensor, spec, rows)
    assert isinstance(spec, CodebookSpec)
    return _codebook(tensor, spec, chosen)


def _dense(tensor: Tensor, spec: DenseSpec, rows: slice) -> Floats:
    stored = tensor.arrays[".dense"]
    values = stored[rows] if stored.ndim else stored
    if spec.dtype == "BF16":
        return (values.astype(np.uint32, order="C") << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # Tensor.check finds what is not finite
        return np.array(values, np.float32, order="C")


def block_integers(tensor: Tensor, rows: slice | None = None) -> NDArray[np.int16]:
    """Signed integers k [out, in] of a BFP tensor: value = k * 2**(e - width + 1), e the block's exponent."""
    spec = tensor.spec
    if not isinstance(spec, BlockSpec) or spec.format != "bfp":
        raise TypeError("block_integers is for BFP tensors")
    codes = unpack(tensor.arrays[".codes"][rows or slice(None)], spec.blocks * spec.block, spec.width)
    return _signed(codes, spec.width)[:, : spec.shape[1]]


def _signed(codes: NDArray[np.uint8], width: int) -> NDArray[np.int16]:
    sign = 1 << (width - 1)
    magnitude = (codes & (sign - 1)).astype(np.int16)
    return np.where(codes & sign, -magnitude, magnitude)


def _block(tensor: Tensor, spec: BlockSpec, rows: slice) -> Floats:
    codes = unpack(tensor.arrays[".codes"][rows], spec.blocks * spec.block, spec.width)
    exponent = np.repeat(tensor.arrays[".exponents"][rows].astype(np.int32), spec.block, axis=1)
    top = spec.width - 1
    magnitude = (codes & ((1 << top) - 1)).astype(np.int32)
    if spec.format == "bfp":
        significand, power = magnitude, exponent - top
    elif spec.format == "log":
        significand, power = np.ones_like(magnitude), exponent + magnitude - ((1 << top) - 1)
    else:
        # IEEE-like with subnormals; the largest exponent field stands for the shared exponent.
        mantissa_bits = top - spec.exponent_width
        field = magnitude >> mantissa_bits
        mantissa = magnitude & ((1 << mantissa_bits) - 1)
        significand = np.where(field > 0, mantissa + (1 << mantissa_bits), mantissa)
        power = np.maximum(field, 1) - ((1 << spec.exponent_width) - 1) + exponent - mantissa_bits
    values = np.ldexp(significand.astype(np.float32), power)
    np.negative(values, out=values, where=(codes >> top) != 0)
    return np.ascontiguousarray(values[:, : spec.shape[1]])


def _affine(tensor: Tensor, spec: AffineSpec, rows: slice) -> Floats:
    codes = unpack(tensor.arrays[".codes"][rows], spec.blocks * spec.block, spec.bits).astype(np.float32)
    zero = np.repeat(tensor.arrays[".zero"][rows].astype(np.float32), spec.block, axis=1)
    scale = np.repeat(tensor.arrays[".scale"][rows].astype(np.float32), spec.block, axis=1)
    return np.ascontiguousarray(((codes - zero) * scale)[:, : spec.shape[1]])


def _codebook(tensor: Tensor, spec: CodebookSpec, chosen: range) -> Floats:
    values = _entries_by_row(tensor, spec, chosen) if spec.axis == 0 else _entries_by_column(tensor, spec, chosen)
    if spec.input_scale:
        values *= tensor.arrays[".input_scale"].astype(np.float32)[None, :]
    if spec.outliers:
        replace_outliers(values, tensor, chosen)
    return values


def replace_outliers(values: Floats, tensor: Tensor, rows: Iterable[int]) -> None:
    """Put the outliers of some rows of a codebook tensor that has any into their values, float32 [rows, in]."""
    indptr = tensor.arrays[".outlier_indptr"].astype(np.int64)
    for place, row in enumerate(rows):
        part = slice(indptr[row], indptr[row + 1])
        values[place, tensor.arrays[".outlier_index"][part]] = tensor.arrays[".outlier_value"][part]


def _entries(tensor: Tensor, spec: CodebookSpec, channels: NDArray[np.int64], first: int, length: int) -> Floats:
    """Codebook entries [channels, length] that codes first..first+length-1 stand for; ``first`` is a multiple of 8."""
    bits, stream = tensor.arrays[".bits"], tensor.arrays[".codes"]
    offsets = code_offsets(bits, spec.shape[1 - spec.axis])
    starts = entry_offsets(bits)
    values = np.empty((len(channels), length), np.float32)
    for width in np.unique(bits[channels]).tolist():  # channels of one width are unpacked together
        which = np.flatnonzero(bits[channels] == width)
        chosen = channels[which]
        begin = offsets[chosen] + first * width // 8
        codes = unpack(stream[begin[:, None] + np.arange(row_bytes(length, width))], length, width)
        values[which] = tensor.arrays[".codebook"][starts[chosen, None] + codes]
    return values


def _entries_by_row(tensor: Tensor, spec: CodebookSpec, chosen: range) -> Floats:
    return _entries(tensor, spec, np.array(chosen, np.int64), 0, spec.shape[1])


def _entries_by_column(tensor: Tensor, spec: CodebookSpec, chosen: range) -> Floats:
    # Every eighth code begins a byte at any width: unpack from there to the last row, not whole columns.
    first = min(chosen[0], chosen[-1]) // 8 * 8
    length = max(chosen[0], chosen[-1]) + 1 - first
    stop = chosen[-1] + chosen.step - first
    picked = slice(chosen[0] - first, stop if stop >= 0 else None, chosen.step)
    values = _entries(tensor, spec, np.arange(spec.channels), first, length)
    return np.ascontiguousarray(values.T[picked])


def digest(values: np.ndarray) -> str:
    """SHA-256 (hex) of FP32 bytes in C order, -0 written as +0."""
    return _hash([values])


def tensor_digest(tensor: Tensor) -> str:
    """:func:`digest` of the dequantized tensor, a few rows in memory at a time."""
    return _hash(dequantize(tensor, rows) for rows in row_chunks(tensor.spec.shape))


def _hash(parts: Iterator[Floats] | list[np.ndarray]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        patterns = np.array(part, "<f4", order="C").view("<u4")
        # On the bit patterns: arithmetic would lose subnormals where a library has set flush-to-zero.
        patterns[patterns == 0x80000000] = 0
        sha.update(patterns.data)
    return sha.hexdigest()
