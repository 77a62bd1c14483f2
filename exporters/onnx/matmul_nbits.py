"""The exact mapping of IR matrices to integers, zero points and scales per block, in 4-bit planes.

Every matrix that maps is ``(u - zero) * scale`` per block along ``in`` with u unsigned of 4 or 8 bits. ONNX Runtime
multiplies by 4-bit blocks in FP32 quickly, but by 8-bit blocks, unless it may round activations, through a path that
takes 25 times as long (4096 x 4096, one row, 2 threads: 67 ms against 2.6 ms for two 4-bit products). So 8 bits are
stored as two 4-bit planes, u = 16 * high + low, and

    W = (high - zero_high) * (16 * scale) + (low - zero_low) * scale

whose terms and sum are exact in FP32: the products of the significant bits of the scale (1 for BFP, 11 for FP16,
18 for Q6_K) and of the integer (9, or 6 for Q6_K) fit into 24.

Scales are stored in one of three ways: "exponent", one byte e + 128 that stands for the step 2**(e - width + 1) of a
BFP block and holds every exponent; "f16"; "f32".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant import ir
from anyquant.ir.ggml_blocks import _IQ4_NL
from anyquant.ir.packing import unpack

# Types of ggml whose values are an integer times a scale: bits of the container, block length, how scales are stored.
_GGML: dict[str, tuple[int, int, str]] = {
    "Q4_0": (4, 32, "f16"),
    "Q5_0": (8, 32, "f16"),
    "Q8_0": (8, 32, "f16"),
    "IQ4_NL": (8, 32, "f16"),
    "Q6_K": (8, 16, "f32"),
}


@dataclass(frozen=True)
class Form:
    """How a matrix is held, known from its spec.

    Attributes:
        bits: 4, or 8 for two planes of 4.
        block: weights along ``in`` that share a scale; 16, 32, 64, 128 or 256.
        scale: "exponent", "f16" or "f32".
        zero: whether zero points are stored; otherwise they are 2**(bits - 1).
        width: element width of BFP, by which exponents become scales; 0 otherwise.
    """

    bits: int
    block: int
    scale: str
    zero: bool = False
    width: int = 0

    @property
    def label(self) -> str:
        """For the user."""
        return "MatMulNBits 4-bit" if self.bits == 4 else "MatMulNBits 2 x 4-bit"


@dataclass(frozen=True)
class IntegerMatrix:
    """A matrix [rows, columns] in a form.

    Attributes:
        codes: uint8 [rows, blocks, block], below 2**bits; padding has the value of the zero point.
        scale: [rows, blocks], uint8 (exponent), float16 or float32.
        zero: uint8 [rows, blocks], or None for 2**(bits - 1).
    """

    form: Form
    codes: NDArray[np.uint8]
    scale: np.ndarray
    zero: NDArray[np.uint8] | None

    def arrays(self) -> dict[str, np.ndarray]:
        """Suffix -> array as stored: the layouts of MatMulNBits, a nibble pair's first element in the low half."""
        arrays: dict[str, np.ndarray] = {}
        zero = _pair_up(self.zero) if self.zero is not None else None
        if self.form.bits == 8:
            arrays[".high"] = pack_nibbles(self.codes >> 4)
            if zero is not None:
                arrays[".zero_high"] = pack_nibbles(zero >> 4)
        arrays[".low"] = pack_nibbles(self.codes & 15)
        if zero is not None:
            arrays[".zero_low"] = pack_nibbles(zero & 15)
        arrays[".scale"] = self.scale
        return arrays

    def values(self, columns: int) -> NDArray[np.float32]:
        """FP32 [rows, columns]; what the arrays stand for, computed without splitting into planes."""
        zero = np.int16(1 << (self.form.bits - 1)) if self.zero is None else self.zero[:, :, None].astype(np.int16)
        by_byte = self.form.scale == "exponent"
        scale = scale_table(self.form.width)[self.scale] if by_byte else self.scale.astype(np.float32)
        values = (self.codes.astype(np.int16) - zero).astype(np.float32) * scale[:, :, None]
        return values.reshape(len(values), -1)[:, :columns]


def array_shapes(form: Form, rows: int, columns: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of what :meth:`IntegerMatrix.arrays` gives."""
    blocks = -(-columns // form.block)
    u8 = np.dtype(np.uint8)
    shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    for suffix in (".high", ".low") if form.bits == 8 else (".low",):
        shapes[suffix] = (u8, (rows, blocks, form.block // 2))
        if form.zero:
            shapes[suffix.replace(".", ".zero_")] = (u8, (rows, -(-blocks // 2)))
    shapes[".scale"] = (np.dtype({"exponent": "u1", "f16": "<f2", "f32": "<f4"}[form.scale]), (rows, blocks))
    return shapes


def scale_table(width: int) -> NDArray[np.float32]:
    """FP32 [256]: the step that each exponent byte stands for, 2**(c - 128 - width + 1); the least are subnormal."""
    return np.ldexp(np.float32(1), np.arange(256) - 128 - width + 1).astype(np.float32)


def pack_nibbles(values: np.ndarray) -> NDArray[np.uint8]:
    """Pairs along the last axis, of even length, to bytes, the first of a pair in the low half."""
    packed: NDArray[np.uint8] = values[..., 0::2] | (values[..., 1::2] << 4)
    return np.ascontiguousarray(packed)


def _pair_up(zero: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.pad(zero, ((0, 0), (0, zero.shape[1] % 2)))


def form_of(spec: ir.Spec) -> Form | None:
    """The form that holds every tensor of this spec exactly, or None."""
    if isinstance(spec, ir.BlockSpec) and spec.format == "bfp":
        return Form(4 if spec.width <= 4 else 8, spec.block, "exponent", width=spec.width)
    if isinstance(spec, ir.AffineSpec):
        return Form(8 if spec.bits == 8 else 4, spec.block, "f16", zero=True)
    if isinstance(spec, ir.GGMLSpec) and spec.type in _GGML:
        bits, block, scale = _GGML[spec.type]
        return Form(bits, block, scale)
    return None


def integer_matrix(tensor: ir.Tensor, rows: slice) -> IntegerMatrix:
    """The rows of a tensor whose spec has a form.

    Raises:
        TypeError: the spec has no form (a fault of the caller).
    """
    spec = tensor.spec
    form = form_of(spec)
    if form is None:
        raise TypeError(f"no integer form for {spec}")
    if isinstance(spec, ir.BlockSpec):
        codes = _blocked(ir.block_integers(tensor, rows), form.block) + (1 << (form.bits - 1))
        exponents = tensor.arrays[".exponents"][rows].view(np.uint8) ^ np.uint8(128)  # to offset binary
        return IntegerMatrix(form, codes.astype(np.uint8), exponents, None)
    if isinstance(spec, ir.AffineSpec):
        return _affine(tensor, spec, form, rows)
    assert isinstance(spec, ir.GGMLSpec)
    return _ggml(tensor.arrays[".blocks"][rows], spec.type, form)


def _blocked(values: np.ndarray, block: int) -> np.ndarray:
    """[rows, columns] to [rows, blocks, block], zeros appended."""
    pad = -values.shape[1] % block
    return np.pad(values, ((0, 0), (0, pad))).reshape(len(values), -1, block)


def _affine(tensor: ir.Tensor, spec: ir.AffineSpec, form: Form, rows: slice) -> IntegerMatrix:
    codes = unpack(tensor.arrays[".codes"][rows], spec.blocks * spec.block, spec.bits)
    codes = codes.reshape(len(codes), spec.blocks, spec.block)
    return IntegerMatrix(form, codes, tensor.arrays[".scale"][rows], tensor.arrays[".zero"][rows])


def _ggml(raw: NDArray[np.uint8], type_name: str, form: Form) -> IntegerMatrix:
    """Stock blocks, uint8 [rows, row bytes]; layouts from ggml-common.h."""
    size = ir.GGML_TYPES[type_name][1]
    b = np.ascontiguousarray(raw).reshape(len(raw), -1, size)
    if type_name == "Q6_K":
        return _q6_k(b, form)
    codes: NDArray[np.uint8]
    if type_name == "Q8_0":
        codes = b[..., 2:] ^ np.uint8(128)  # two's complement to offset binary
    elif type_name == "Q5_0":
        fifth = np.unpackbits(b[..., 2:6], axis=-1, bitorder="little")
        codes = (_halves(b[..., 6:]) | (fifth << np.uint8(4))) + np.uint8(128 - 16)
    elif type_name == "IQ4_NL":
        codes = (_IQ4_NL[_halves(b[..., 2:])] + 128).astype(np.uint8)
    else:
        codes = _halves(b[..., 2:])
    scale = np.ascontiguousarray(b[..., :2]).view("<f2")[..., 0]
    return IntegerMatrix(form, codes, scale, None)


def _halves(quants: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Low nibbles are the first half of a block, high nibbles the second."""
    return np.concatenate([quants & 15, quants >> 4], axis=-1)


def _q6_k(b: NDArray[np.uint8], form: Form) -> IntegerMatrix:
    """Superblocks of 256 in 16 groups of 16; group g's scale is d * sc[g], exact in FP32 (11 by 8 bits)."""
    rows, superblocks, _ = b.shape
    # Each half of 128: byte j of 64 holds elements j (low nibble) and 64 + j (high nibble).
    nibbles = b[..., :128].reshape(rows, superblocks, 2, 1, 64)
    low = np.concatenate([nibbles & 15, nibbles >> 4], axis=3).reshape(rows, superblocks, 256)
    pairs = b[..., 128:192].reshape(rows, superblocks, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    top = ((pairs >> shifts) & np.uint8(3)).reshape(rows, superblocks, 256)
    codes: NDArray[np.uint8] = (low | (top << 4)) + np.uint8(128 - 32)
    d = np.ascontiguousarray(b[..., 208:210]).view("<f2").astype(np.float32)
    scale = d * np.ascontiguousarray(b[..., 192:208]).view(np.int8).astype(np.float32)
    return IntegerMatrix(form, codes.reshape(rows, -1, form.block), scale.reshape(rows, -1), None)
