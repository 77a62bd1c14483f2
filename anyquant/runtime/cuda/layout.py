"""Codebook matrices as the CUDA kernels multiply with them; the layout is described in kernels/cuda/packed.cuh.

It depends on the version of the kernels and belongs into no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant.ir import CodebookSpec, Tensor, dequantize
from anyquant.ir.packing import code_offsets, entry_offsets, pack, row_bytes, unpack

MAGIC = 0x3144554374726D61
TILE = 32
"""Rows of a tile: lanes of a warp."""
GROUP = 128
"""Columns whose codes a lane reads at a time."""
NO_COLUMN = 0xFFFFFFFF
_LANE_BYTES = 16  # that a lane reads at a time
_ALIGNMENT = 256
_COLUMN_TASKS = 512  # blocks that a product with columns is cut into at least, where it is long enough

_HEADER = np.dtype(
    [
        *((name, "<u8") for name in ("magic", "bytes")),
        *((name, "<u4") for name in ("rows", "cols", "axis", "tasks")),
        *((name, "<u4") for name in ("order_len", "outliers", "index_bytes", "widths")),
        *(
            (name, "<u8")
            for name in ("task", "codes", "tables", "order", "scale", "indptr", "index", "value", "delta")
        ),
    ]
)  # fmt: skip
_TASK = np.dtype(
    [*((name, "<u4") for name in ("bits", "first", "count", "stride")), ("codes", "<u8"), ("tables", "<u8")]
)
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """What a launch has to know of a packed matrix.

    Attributes:
        shape: [out, in].
        axis: whether rows (0) or columns (1) have codebooks.
        widths: bit b is set where there are channels of b bits.
        tasks: tiles of rows, or pieces of the columns.
        stride: columns of prepared activations, a multiple of 128.
        outliers: how many.
    """

    shape: tuple[int, int]
    axis: int
    widths: int
    tasks: int
    stride: int
    outliers: int


def pack_codebook(tensor: Tensor) -> tuple[Layout, Bytes]:
    """Repack a codebook tensor, as :meth:`anyquant.ir.Tensor.check` finds it good.

    Returns:
        The layout, and the packed matrix, uint8.

    Raises:
        TypeError: it is of another kind.
    """
    spec = tensor.spec
    if not isinstance(spec, CodebookSpec):
        raise TypeError(f"only codebook matrices are packed for the GPU, not those of the kind {spec.kind}")
    rows, columns = spec.shape
    bits = tensor.arrays[".bits"]
    parts = _rows(spec, tensor) if spec.axis == 0 else _columns(spec, tensor)
    if spec.input_scale:
        parts.arrays["scale"] = tensor.arrays[".input_scale"]
    if spec.outliers:
        for name in ("indptr", "index", "value"):
            parts.arrays[name] = tensor.arrays[f".outlier_{name}"]
        parts.arrays["delta"] = _deltas(spec, tensor)
    header = np.zeros((), _HEADER)
    header["magic"], header["rows"], header["cols"], header["axis"] = MAGIC, rows, columns, spec.axis
    header["tasks"], header["order_len"] = len(parts.tasks), len(parts.arrays["order"])
    header["outliers"], header["index_bytes"] = spec.outliers, 2 if columns <= 65536 else 4
    widths = int(np.bitwise_or.reduce(1 << bits.astype(np.uint32)))
    header["widths"] = widths
    stride = -(-columns // GROUP) * GROUP if spec.axis == 0 else len(parts.arrays["order"])
    layout = Layout((rows, columns), spec.axis, widths, len(parts.tasks), stride, spec.outliers)
    return layout, _assemble(header, parts)


@dataclass
class _Parts:
    """Pieces of a packed matrix; offsets of tasks count from the beginning of codes and tables."""

    tasks: NDArray[Any]
    arrays: dict[str, NDArray[Any]]


def _assemble(header: NDArray[Any], parts: _Parts) -> Bytes:
    """One piece of memory, with offsets from its beginning."""
    arrays = {"task": parts.tasks} | parts.arrays
    offset = _HEADER.itemsize
    for name, array in arrays.items():
        offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
        header[name] = offset
        offset += array.nbytes
    header["bytes"] = offset
    for name in ("codes", "tables"):
        parts.tasks[name] += header[name]
    packed = np.zeros(offset, np.uint8)
    packed[: _HEADER.itemsize] = np.frombuffer(header.tobytes(), np.uint8)
    for name, array in arrays.items():
        begin = int(header[name])
        packed[begin : begin + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()
    return packed


def _tiles(streams: Bytes, bits: int, columns: int) -> Bytes:
    """Streams [rows, row_bytes] of codes to [tile, group, bits, row of the tile, 16]."""
    tiles, groups = -(-len(streams) // TILE), -(-columns // GROUP)
    padded = np.zeros((tiles * TILE, groups * bits * _LANE_BYTES), np.uint8)
    padded[: len(streams), : streams.shape[1]] = streams
    return padded.reshape(tiles, TILE, groups, bits, _LANE_BYTES).transpose(0, 2, 3, 1, 4)


def _sorted_channels(bits: NDArray[np.uint8]) -> list[tuple[int, NDArray[np.int64]]]:
    """(width, its channels), the widest first, so that what takes longest is not left to the end."""
    return [(width, np.flatnonzero(bits == width)) for width in sorted(set(bits.tolist()), reverse=True)]


def _rows(spec: CodebookSpec, tensor: Tensor) -> _Parts:
    bits, stream, codebook = (tensor.arrays[name] for name in (".bits", ".codes", ".codebook"))
    offsets, starts = code_offsets(bits, spec.shape[1]), entry_offsets(bits)
    tasks, codes, tables, order, code_bytes, table_bytes, place = [], [], [], [], 0, 0, 0
    for width, rows in _sorted_channels(bits):
        taken = stream[offsets[rows, None] + np.arange(row_bytes(spec.shape[1], width))]
        entries = codebook[starts[rows, None] + np.arange(1 << width)]
        tiled = _tiles(taken, width, spec.shape[1])
        padded = np.zeros((len(tiled) * TILE, 1 << width), np.float16)
        padded[: len(rows)] = entries
        of_tiles = padded.reshape(len(tiled), TILE, 1 << width).transpose(0, 2, 1)
        for tile in range(len(tiled)):
            count = min(TILE, len(rows) - tile * TILE)
            tasks.append((width, place, count, 0, code_bytes, table_bytes))
            place += count
            code_bytes += tiled[tile].nbytes
            table_bytes += of_tiles[tile].nbytes
        codes.append(tiled.ravel())
        tables.append(of_tiles.ravel())
        order.append(rows)
    arrays: dict[str, NDArray[Any]] = {"codes": np.concatenate(codes), "tables": np.concatenate(tables)}
    arrays["order"] = np.concatenate(order).astype(np.uint32)
    return _Parts(np.array(tasks, _TASK), arrays)


def _columns(spec: CodebookSpec, tensor: Tensor) -> _Parts:
    bits, stream, codebook = (tensor.arrays[name] for name in (".bits", ".codes", ".codebook"))
    length = spec.shape[0]
    offsets, starts, tiles = code_offsets(bits, length), entry_offsets(bits), -(-length // TILE)
    sections = _sorted_channels(bits)
    all_groups = sum(-(-len(columns) // GROUP) for _, columns in sections)
    most = max(1, all_groups * tiles // 8 // _COLUMN_TASKS)  # groups of a task; a block has up to 8 tiles
    order: list[NDArray[np.uint32]] = []
    tasks, codes, tables, code_bytes, table_bytes = [], [], [], 0, 0
    for width, columns in sections:
        taken = unpack(stream[offsets[columns, None] + np.arange(row_bytes(length, width))], length, width)
        groups = -(-len(columns) // GROUP)
        tiled = _tiles(pack(np.ascontiguousarray(taken.T), width), width, len(columns))
        padded = np.zeros((groups * GROUP, 1 << width), np.float16)
        padded[: len(columns)] = codebook[starts[columns, None] + np.arange(1 << width)]
        places = np.full(groups * GROUP, NO_COLUMN, np.uint32)
        places[: len(columns)] = columns
        first = sum(len(each) for each in order)
        group_bytes, group_table = width * TILE * _LANE_BYTES, GROUP * padded[0].nbytes
        tasks += [
            (width, first + g * GROUP, min(most, groups - g), groups, code_bytes + g * group_bytes,
             table_bytes + g * group_table)
            for g in range(0, groups, most)
        ]  # fmt: skip
        code_bytes += tiled.nbytes
        table_bytes += padded.nbytes
        codes.append(tiled.ravel())
        tables.append(padded.ravel())
        order.append(places)
    arrays: dict[str, NDArray[Any]] = {"codes": np.concatenate(codes), "tables": np.concatenate(tables)}
    arrays["order"] = np.concatenate(order)
    return _Parts(np.array(tasks, _TASK), arrays)


def _deltas(spec: CodebookSpec, tensor: Tensor) -> NDArray[np.float32]:
    """What each outlier is more than its code and scale say, FP32 [outliers]."""
    arrays = {name: array for name, array in tensor.arrays.items() if not name.startswith(".outlier")}
    without = CodebookSpec(spec.shape, spec.axis, spec.code_bytes, spec.codebook_entries, spec.input_scale)
    plain, deltas = Tensor(without, arrays), np.empty(spec.outliers, np.float32)
    indptr, index = tensor.arrays[".outlier_indptr"].astype(np.int64), tensor.arrays[".outlier_index"]
    value = tensor.arrays[".outlier_value"].astype(np.float32)
    step = max(1, (1 << 22) // spec.shape[1])
    for begin in range(0, spec.shape[0], step):  # some rows at a time: FP32 takes many times the room of codes
        end = min(begin + step, spec.shape[0])
        chosen = slice(indptr[begin], indptr[end])
        rows = np.repeat(np.arange(end - begin), np.diff(indptr[begin : end + 1]))
        deltas[chosen] = value[chosen] - dequantize(plain, slice(begin, end))[rows, index[chosen]]
    return deltas
