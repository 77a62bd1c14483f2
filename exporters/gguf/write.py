"""Writing the file: encoded tensors one after another under a temporary name, renamed when it is whole."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from anyquant import ir
from anyquant.errors import AnyquantError, MachineError, UsageError
from anyquant.exporters.gguf import custom, stock
from anyquant.exporters.gguf.layout import Piece, chunks
from anyquant.gguf_container import padded


def refuse_existing(path: Path) -> None:
    """Refuse to write over what is there.

    Raises:
        UsageError: the path exists, also as a link, a device or a folder.
    """
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder; -o needs the name of a file, such as {path / 'model.gguf'}")
    if os.path.lexists(path):
        raise UsageError(f"{path} exists. Choose another -o, or remove it first.")


def encoded(tensor: ir.Tensor, piece: Piece, rounding: bool) -> Iterator[np.ndarray]:
    """Yield the data of one tensor in parts, rows in the file's order.

    Every array is C-contiguous and little-endian; together they have ``piece.nbytes`` bytes.

    Raises:
        stock.NotExact: a value does not fit, or would be rounded where ``rounding`` does not allow it.
    """
    if piece.type in custom.TYPES:
        ordered = tensor if piece.order is None else ir.with_rows(tensor, piece.order)
        yield custom.encode(piece.gguf, ordered, piece.type)
        return
    if piece.order is None:
        yield from _parts(tensor, piece, rounding)
        return
    whole = np.concatenate(list(_parts(tensor, piece, rounding)))
    yield np.ascontiguousarray(whole[piece.order])


def _parts(tensor: ir.Tensor, piece: Piece, rounding: bool) -> Iterator[np.ndarray]:
    spec = tensor.spec
    if isinstance(spec, ir.GGMLSpec):
        yield np.ascontiguousarray(tensor.arrays[".blocks"])
    elif isinstance(spec, ir.DenseSpec) and spec.dtype == piece.type and not piece.offset:
        yield np.ascontiguousarray(tensor.arrays[".dense"])
    elif piece.type == "F16":
        for rows in chunks(spec):
            values = ir.dequantize(tensor, rows)
            with np.errstate(over="ignore"):
                half = values.astype("<f2")
            if not np.isfinite(half).all() or not (rounding or (half == values).all()):
                raise stock.NotExact("values that are no FP16")
            yield np.ascontiguousarray(half)
    elif piece.type == "F32":
        for rows in chunks(spec):
            values = ir.dequantize(tensor, rows)
            if piece.offset:
                values = values + np.float32(piece.offset)
            yield np.ascontiguousarray(values, "<f4")
    else:
        for rows in ir.row_chunks(spec.shape):
            yield stock.encode(tensor, piece.type, rows)


def write_file(
    path: Path, header: bytes, tensors: Iterable[tuple[str, int, Iterable[np.ndarray]]], alignment: int, total: int
) -> None:
    """Write header and tensors, and rename.

    Args:
        path: the file to make.
        header: everything before the data, padded.
        tensors: (name, bytes, parts) in the header's order.
        alignment: each tensor is padded to a multiple of it.
        total: bytes that the file must have in the end.

    Raises:
        UsageError: the path exists.
        MachineError: the disk is full, or the place cannot be written. Nothing is left there.
    """
    temporary = path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _require_space(path, total)
        file = temporary.open("xb")
        try:
            with file:
                _write(file, header, tensors, alignment, total, path.name)
            refuse_existing(path)  # it may have been made meanwhile
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise MachineError(
            f"cannot write {path}: {error.strerror or error}. {total:,} bytes are needed; nothing was left there."
        ) from error


def _write(
    file: BinaryIO,
    header: bytes,
    tensors: Iterable[tuple[str, int, Iterable[np.ndarray]]],
    alignment: int,
    total: int,
    label: str,
) -> None:
    file.write(header)
    for name, size, parts in tensors:
        start = file.tell()
        for part in parts:
            file.write(part.data)
        written = file.tell() - start
        if written != size:
            raise AnyquantError(f"{name}: became {written} bytes, promised were {size}")
        file.write(bytes(padded(size, alignment) - size))
    if file.tell() != total:
        raise AnyquantError(f"{label}: became {file.tell()} bytes, promised were {total}")
    file.flush()
    os.fsync(file.fileno())


def _require_space(path: Path, total: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < total:
        raise MachineError(
            f"cannot write {path}: {total:,} bytes are needed and {free:,} are free there. "
            "Free some space, or choose another disk with -o."
        )
