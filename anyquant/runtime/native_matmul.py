"""Products with quantized matrices by the compiled library, without dequantizing them."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant.ir import AffineSpec, BlockSpec, CodebookSpec, Tensor, dequantize
from anyquant.ir.packing import pack
from anyquant.runtime import native

_ALIGNMENT = 64
BAND = 16
"""Rows of a band: AQ_BAND."""
_CODEBOOK = ("bits", "codes", "codebook", "input_scale", "outlier_indptr", "outlier_index", "outlier_value")
_BLOCKS = ("codes", "recode", "table", "scale", "zero")
_SIDES = [("rows", ctypes.c_uint64), ("cols", ctypes.c_uint64)]
_ARRAY = (("", ctypes.c_void_p), ("_len", ctypes.c_size_t))
Arrays = dict[str, NDArray[Any]]

KINDS = (CodebookSpec, BlockSpec, AffineSpec)
"""Kinds of tensors that can be packed."""


class Level(IntEnum):
    """Instructions that products are done with."""

    BEST = 0
    SCALAR = 1
    AVX2 = 2
    AVX512 = 3


class _CodebookMatrix(ctypes.Structure):
    """aq_codebook_matrix of anyquant_matmul.h."""

    _fields_ = [
        *_SIDES,
        ("axis", ctypes.c_int32),
        ("index_bytes", ctypes.c_int32),
        ("in_bands", ctypes.c_int32),
        *((f"{name}{end}", kind) for name in _CODEBOOK for end, kind in _ARRAY),
    ]


class _BlockMatrix(ctypes.Structure):
    """aq_block_matrix of anyquant_matmul.h."""

    _fields_ = [
        *_SIDES,
        ("bits", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("bfloat", ctypes.c_int32),
        ("in_bands", ctypes.c_int32),
        *((f"{name}{end}", kind) for name in _BLOCKS for end, kind in _ARRAY),
    ]


def best_level() -> Level:
    """The best that this processor has.

    Raises:
        MachineError: the library is not available.
    """
    return Level(native.library().aq_matmul_level())


class PackedMatrix:
    """A quantized matrix in the layout of the kernels, which is about as large as the tensor.

    Attributes:
        shape: [out, in].
        packed: uint8, from the border of a cache line on.
    """

    def __init__(self, tensor: Tensor, *, in_bands: bool = False) -> None:
        """Repack a tensor, which is not needed after that.

        Args:
            tensor: of the kind codebook, block or affine, as :meth:`anyquant.ir.Tensor.check` finds it good.
            in_bands: for hosts that ask for one row after the other, as llama.cpp does: for
                :meth:`multiply_in_bands` alone where codebooks do not belong to columns.

        Raises:
            TypeError: it is of another kind.
            ValueError: its arrays do not fit together.
            MachineError: the library is not available.
        """
        spec = tensor.spec
        matrix: _CodebookMatrix | _BlockMatrix
        if isinstance(spec, CodebookSpec):
            matrix, arrays = _codebook(spec, tensor)
            size, function = native.library().aq_matmul_bytes, "aq_matmul_pack"
        elif isinstance(spec, BlockSpec | AffineSpec):
            matrix, arrays = _affine(spec, tensor) if isinstance(spec, AffineSpec) else _block(spec, tensor)
            size, function = native.library().aq_matmul_block_bytes, "aq_matmul_pack_blocks"
        else:
            raise TypeError(f"matrices of the kind {spec.kind} cannot be packed")
        self.shape = matrix.rows, matrix.cols = spec.shape[0], spec.shape[1]
        matrix.in_bands = in_bands
        for name, array in arrays.items():
            setattr(matrix, name, array.ctypes.data)
            setattr(matrix, f"{name}_len", array.size)
        pointer = ctypes.addressof(matrix)
        nbytes = size(pointer)
        if not nbytes:
            raise ValueError(f"the arrays of a matrix {list(self.shape)} of the kind {spec.kind} do not fit together")
        self.packed = _aligned(nbytes)
        native.call(function, f"a matrix {list(self.shape)}", pointer, self.packed.ctypes.data, nbytes)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.packed.nbytes

    def multiply(self, x: NDArray[np.float32], *, parts: int = 1, level: Level = Level.BEST) -> NDArray[np.float32]:
        """x times the transposed matrix, in FP32, in this thread.

        Args:
            x: float32 [batch, in].
            parts: that it is done in; the result does not depend on it.
            level: the instructions to do it with.

        Returns:
            float32 [batch, out].

        Raises:
            ValueError: another shape or dtype, or instructions that the processor does not have.
        """
        if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != self.shape[1]:
            raise ValueError(f"expected float32 [batch, {self.shape[1]}], not {x.dtype} {list(x.shape)}")
        x = np.ascontiguousarray(x)
        y = np.empty((len(x), self.shape[0]), np.float32)
        about, packed = f"{len(x)} rows by a matrix {list(self.shape)}", self.packed.ctypes.data
        workspace = _aligned(native.library().aq_matmul_workspace(packed, len(x)))
        native.call(
            "aq_matmul_prepare", about, packed, x.ctypes.data, len(x), workspace.ctypes.data, workspace.nbytes
        )  # fmt: skip
        for part in range(parts):
            native.call(
                "aq_matmul_run", about, packed, len(x), workspace.ctypes.data, y.ctypes.data, part, parts, level
            )  # fmt: skip
        return y

    def multiply_in_bands(self, x: NDArray[np.float32], level: Level = Level.BEST) -> NDArray[np.float32]:
        """The same, done as for llama.cpp: a band of sixteen rows for one or two rows of activations at a time.

        Args:
            x: float32 [batch, in].
            level: instructions to use.

        Returns:
            float32 [batch, out].
        """
        library, about = native.library(), f"bands of a matrix {list(self.shape)}"
        workspace = _aligned(library.aq_matmul_band_workspace(self.packed.ctypes.data))
        workspace[:_ALIGNMENT] = 0
        bands = -(-self.shape[0] // BAND)
        y = np.empty((len(x), bands * BAND), np.float32)
        found = np.empty((2, BAND), np.float32)
        for first in range(0, len(x), 2):
            some = np.array([each.ctypes.data for each in x[first : first + 2]], np.uint64)
            for band in range(bands):
                native.call(
                    "aq_matmul_band", about, self.packed.ctypes.data, band, some.ctypes.data, len(some),
                    workspace.ctypes.data, workspace.nbytes, found.ctypes.data, level,
                )  # fmt: skip
                y[first : first + 2, band * BAND : (band + 1) * BAND] = found[: len(some)]
        return y[:, : self.shape[0]]


def _codebook(spec: CodebookSpec, tensor: Tensor) -> tuple[_CodebookMatrix, Arrays]:
    arrays = {
        name: np.ascontiguousarray(tensor.arrays[f".{name}"]) for name in _CODEBOOK if f".{name}" in tensor.arrays
    }
    wide = "outlier_index" in arrays and arrays["outlier_index"].itemsize == 4
    return _CodebookMatrix(axis=spec.axis, index_bytes=4 if wide else 2), arrays


def _affine(spec: AffineSpec, tensor: Tensor) -> tuple[_BlockMatrix, Arrays]:
    arrays = {name: np.ascontiguousarray(tensor.arrays[f".{name}"]) for name in ("codes", "scale", "zero")}
    return _BlockMatrix(bits=spec.bits, block=spec.block), arrays


def _block(spec: BlockSpec, tensor: Tensor) -> tuple[_BlockMatrix, Arrays]:
    """Scales are powers of two. Codes of bfp become numbers above a zero; other formats have a table."""
    codes, exponents = (np.ascontiguousarray(tensor.arrays[name]) for name in (".codes", ".exponents"))
    arrays: Arrays = {"codes": codes}
    every, sign, least = np.arange(1 << spec.width), 1 << (spec.width - 1), 0
    if spec.format == "bfp":
        magnitude = every & (sign - 1)
        arrays["recode"] = np.where(every & sign, sign - magnitude, sign + magnitude).astype(np.uint8)
        arrays["zero"] = np.full(exponents.size, sign, np.uint8)
        least = 1 - spec.width
    else:
        # What the codes stand for beside an exponent of 0, a row of all of them.
        one = replace(spec, shape=(1, every.size))
        stored = pack(np.resize(every.astype(np.uint8), (1, one.blocks * one.block)), spec.width)
        zeros = np.zeros((1, one.blocks), np.int8)
        arrays["table"] = dequantize(Tensor(one, {".codes": stored, ".exponents": zeros}))
    powers = np.ldexp(np.float32(1), exponents.astype(np.int32) + least)
    arrays["scale"] = (powers.view(np.uint32) >> 16).astype(np.uint16)
    return _BlockMatrix(bits=spec.width, block=spec.block, bfloat=1), arrays


def _aligned(nbytes: int) -> NDArray[np.uint8]:
    """Memory that begins at the border of a cache line."""
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes]
