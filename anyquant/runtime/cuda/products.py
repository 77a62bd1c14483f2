"""What is launched for products with packed codebook matrices: on a GPU, or in an emulator of the same kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from anyquant.runtime.cuda.layout import GROUP, TILE, Layout

MOST_SHARED = 48 << 10
"""Bytes of shared memory that a block may have on any GPU without asking for more."""
MOST_ROWS = 32
"""Rows of activations that the kernels multiply with; with more of them a product of dense matrices is faster."""
MOST_EXACT_ROWS = 8
"""The same in FP32; more are done eight at a time."""
_FEW = 4  # rows of activations up to which a lane for each row is faster than tensor cores
_WARP, _BLOCK = 32, 256
_STEP = 32  # columns that are looked up at a time
_GEMM_WARPS, _EXPAND_WARPS = 4, 3


class Type(IntEnum):
    """Numbers of activations, weights and results."""

    FP32 = 0
    FP16 = 1
    BF16 = 2


@dataclass(frozen=True)
class Output:
    """Memory that a kernel writes; all else that it is given stays as it is."""

    memory: Any


class Machine(Protocol):
    """Where kernels run. Memory is whatever it takes as an argument: tensors of torch, arrays of NumPy."""

    multiprocessors: int

    def launch(
        self,
        source: str,
        macros: Mapping[str, int],
        kernel: str,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        *arguments: Any,
    ) -> None:
        """Run a kernel of a file in kernels/cuda, compiled with macros, on integers, memory, outputs and None."""

    def floats(self, count: int) -> Any:
        """Memory for FP32 numbers."""

    def halves(self, count: int) -> Any:
        """Memory for FP16 numbers."""


def table_words(axis: int, widths: int) -> int:
    """32-bit words of the largest table of some widths in shared memory, as table_words() of lookup.cuh counts them."""
    most = 0
    for bits in range(9):
        if widths >> bits & 1:
            if axis == 0:
                words = TILE << (2 * bits if bits <= 4 else bits)
            else:
                words = GROUP // 2 << 2 * bits if bits <= 2 else (GROUP if bits <= 5 else _STEP) << bits
            most = max(most, words)
    return most


def multiply(machine: Machine, layout: Layout, packed: Any, x: Any, kind: Type, batch: int, y: Any) -> None:
    """Activations times a transposed packed matrix.

    Sums are of FP32 numbers, always in the same order. FP32 activations are multiplied as they are; those of 16 bits,
    where there are more than four rows of them, as FP16 with a power of two of their own for each row.

    Args:
        machine: where to.
        layout: of the matrix.
        packed: its memory there.
        x: activations [batch, in] there.
        kind: of activations and results.
        batch: 1 to 32 rows of 16 bits, 1 to 8 of FP32.
        y: room for results [batch, out] there.
    """
    most = MOST_EXACT_ROWS if kind is Type.FP32 else MOST_ROWS
    if not 1 <= batch <= most:
        raise ValueError(f"{batch} rows of {kind.name} activations, not 1 to {most}")
    if batch <= _FEW or kind is Type.FP32:
        _gemv(machine, layout, packed, x, kind, batch, y)
    else:
        _gemm(machine, layout, packed, x, kind, batch, y)


def _macros(layout: Layout, **others: int) -> dict[str, int]:
    return {"AQ_AXIS": layout.axis, "AQ_WIDTHS": layout.widths, **others}


def _blocks(layout: Layout, warps: int) -> int:
    """Blocks whose warps have a tile of rows each."""
    return -(-layout.shape[0] // (TILE * warps))


def _room_for_batch(batch: int, least: int) -> int:
    """What kernels are compiled for: the next power of two."""
    return max(least, 1 << (batch - 1).bit_length())


def _gemv(machine: Machine, layout: Layout, packed: Any, x: Any, kind: Type, batch: int, y: Any) -> None:
    room = _room_for_batch(batch, 1)
    macros, table = _macros(layout, AQ_BATCH=room), table_words(layout.axis, layout.widths)
    if layout.axis == 0:
        # Few tiles leave multiprocessors with too few warps to hide how long memory takes.
        warps = 16 if room <= _FEW and layout.tasks < 2 * machine.multiprocessors else 8
        shared = 4 * (max(table, room * TILE) + warps * room * _WARP)
        machine.launch(
            "gemv.cu", macros, "gemv_rows", (layout.tasks, 1), warps * _WARP, shared,
            packed, x, kind, batch, None, Output(y),
        )  # fmt: skip
        return
    warps = min(8, -(-layout.shape[0] // TILE))
    partial = machine.floats(layout.tasks * batch * layout.shape[0])
    machine.launch(
        "gemv.cu", macros, "gemv_columns", (_blocks(layout, warps), layout.tasks), warps * _WARP,
        4 * (table + room * GROUP), packed, x, kind, batch, Output(partial),
    )  # fmt: skip
    _finish(machine, layout, packed, partial, None, x, kind, batch, y)


def _gemm(machine: Machine, layout: Layout, packed: Any, x: Any, kind: Type, batch: int, y: Any) -> None:
    room = _room_for_batch(batch, 8)
    macros, table = _macros(layout, AQ_BATCH=room), table_words(layout.axis, layout.widths)
    halves, factor = machine.halves(room * layout.stride), machine.floats(room)
    machine.launch(
        "gemm.cu", macros, "half_activations", (room, 1), _BLOCK, 4 * _BLOCK,
        packed, x, kind, batch, Output(halves), layout.stride, Output(factor),
    )  # fmt: skip
    tiles = _GEMM_WARPS * TILE * (_STEP // 2 + 4)
    threads = _GEMM_WARPS * _WARP
    if layout.axis == 0:
        shared = 4 * max(table + tiles, _GEMM_WARPS * TILE * room)
        machine.launch(
            "gemm.cu", macros, "gemm_rows", (layout.tasks, 1), threads, shared,
            packed, halves, layout.stride, factor, x, kind, batch, Output(y),
        )  # fmt: skip
        return
    partial = machine.floats(layout.tasks * batch * layout.shape[0])
    machine.launch(
        "gemm.cu", macros, "gemm_columns", (_blocks(layout, _GEMM_WARPS), layout.tasks), threads,
        4 * (table + tiles), packed, halves, layout.stride, batch, Output(partial),
    )  # fmt: skip
    _finish(machine, layout, packed, partial, factor, x, kind, batch, y)


def _finish(
    machine: Machine, layout: Layout, packed: Any, partial: Any, factor: Any, x: Any, kind: Type, batch: int, y: Any
) -> None:
    machine.launch(
        "finish.cu", {}, "finish_columns", (-(-layout.shape[0] // _BLOCK), batch), _BLOCK, 0,
        packed, partial, factor, x, kind, batch, None, Output(y),
    )  # fmt: skip


def expand(machine: Machine, layout: Layout, packed: Any, kind: Type, weight: Any) -> None:
    """The weights [out, in]: in FP32 to the last bit what :func:`anyquant.ir.dequantize` gives, else rounded once more.

    Args:
        machine: where to.
        layout: of the matrix.
        packed: its memory there.
        kind: of the weights.
        weight: room for them there.
    """
    table, tile = table_words(layout.axis, layout.widths), TILE * (_STEP + 1)
    rows = layout.axis == 0
    grid = (layout.tasks, 1) if rows else (_blocks(layout, _EXPAND_WARPS), layout.tasks)
    machine.launch(
        "expand.cu", _macros(layout), "expand_rows" if rows else "expand_columns", grid, _EXPAND_WARPS * _WARP,
        4 * (table + _EXPAND_WARPS * tile), packed, Output(weight), kind,
    )  # fmt: skip
    if layout.outliers:
        machine.launch(
            "expand.cu", _macros(layout), "expand_outliers", (-(-layout.shape[0] // (_BLOCK // _WARP)), 1), _BLOCK, 0,
            packed, Output(weight), kind,
        )  # fmt: skip
