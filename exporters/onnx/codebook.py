"""How a codebook tensor is stored for anyquant::CodebookMatMul and CodebookGather; see docs/onnx-operators.md.

All arrays are the IR's but the codes, which standard operators decode as bit planes: row p of a channel holds bit p of
its codes, the code i in bit i % 8 of byte i // 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant import ir
from anyquant.ir.packing import code_offsets, row_bytes, row_chunks, unpack

Shapes = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]

BITS, PLANES, CODEBOOK = ".bits", ".planes", ".codebook"
NEUTRAL: dict[str, np.ndarray] = {
    ".input_scale": np.ones(1, np.float16),
    ".outlier_indptr": np.zeros(1, np.uint32),
    ".outlier_index": np.zeros(0, np.uint16),
    ".outlier_value": np.zeros(0, np.float16),
}
"""What stands in for an array that a tensor does not have."""
STORED = (BITS, PLANES, CODEBOOK, *NEUTRAL)
"""Suffixes of the arrays, in the order of the operators' inputs."""


@dataclass(frozen=True)
class CodebookForm:
    """A codebook tensor, stored as what its spec says."""

    spec: ir.CodebookSpec

    @property
    def label(self) -> str:
        """For the user."""
        return "CodebookMatMul"


def plane_rows(spec: ir.CodebookSpec) -> int:
    """Rows of the planes: as many as there are bits in all channels, and at least one.

    The spec has the bytes of the codes, not the sum of the widths. Where the length of a channel is no multiple of 8
    those may leave room for a row or so more, which then stays unused.
    """
    return max(1, 8 * spec.code_bytes // spec.shape[1 - spec.axis])


def array_shapes(spec: ir.CodebookSpec) -> Shapes:
    """Suffix -> (dtype, shape) of what :func:`stored_arrays` gives."""
    rows = (plane_rows(spec), row_bytes(spec.shape[1 - spec.axis], 1))
    return {
        (PLANES if suffix == ".codes" else suffix): (dtype, rows if suffix == ".codes" else shape)
        for suffix, (dtype, shape) in spec.arrays().items()
    }


def stored_arrays(tensor: ir.Tensor) -> dict[str, np.ndarray]:
    """Suffix -> array as stored, of a tensor whose arrays have been checked."""
    return {suffix: a for suffix, a in tensor.arrays.items() if suffix != ".codes"} | {PLANES: planes(tensor)}


def planes(tensor: ir.Tensor) -> NDArray[np.uint8]:
    """uint8 [plane_rows, ceil(length / 8)]: channel after channel, as many rows each as it has bits."""
    spec, bits = tensor.spec, tensor.arrays[BITS]
    assert isinstance(spec, ir.CodebookSpec)
    length = spec.shape[1 - spec.axis]
    offsets = code_offsets(bits, length)
    first_row = np.cumsum(bits, dtype=np.int64) - bits
    made = np.zeros((plane_rows(spec), row_bytes(length, 1)), np.uint8)
    for width in np.unique(bits[bits > 0]).tolist():  # channels of one width are unpacked together
        channels = np.flatnonzero(bits == width)
        for part in row_chunks((len(channels), length * width)):
            chosen = channels[part]
            stream = tensor.arrays[".codes"][offsets[chosen, None] + np.arange(row_bytes(length, width))]
            codes = unpack(stream, length, width)
            for plane in range(width):
                made[first_row[chosen] + plane] = np.packbits((codes >> plane) & 1, axis=1, bitorder="little")
    return made
