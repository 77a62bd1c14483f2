"""Safetensors files: written as a stream, read lazily through the safetensors library.

The library writes only what is whole in memory; a model is not. Sizes are known from specs beforehand,
so the header goes first and the arrays follow one by one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from anyquant.errors import AnyquantError, CorruptFileError, InputError, MachineError
from anyquant.ir.json_io import quoted

Entry = tuple[str, np.dtype[Any], tuple[int, ...]]
"""(key, dtype, shape) of one array."""

_NAMES = {"u1": "U8", "i1": "I8", "u2": "U16", "u4": "U32", "f2": "F16", "f4": "F32", "f8": "F64"}


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return _NAMES[dtype.str[1:]]


@lru_cache(1 << 12)  # layers repeat, and a search for a size asks for hundreds of headers
def _form(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[str, int]:
    """The part of an array's JSON object that says its form, and its bytes."""
    text = json.dumps({"dtype": _dtype_name(dtype), "shape": list(shape)}, separators=(",", ":"))
    return text[1:-1], dtype.itemsize * prod(shape)


def _header(entries: Sequence[Entry], metadata: dict[str, str] | None) -> tuple[bytes, int]:
    """The header, and the bytes of the arrays that follow it."""
    parts = [f'"__metadata__":{json.dumps(metadata, separators=(",", ":"))}'] if metadata else []
    offset = 0
    for key, dtype, shape in entries:
        form, size = _form(dtype, shape)
        parts.append(f'{quoted(key)}:{{{form},"data_offsets":[{offset},{offset + size}]}}')
        offset += size
    text = f"{{{','.join(parts)}}}".encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def file_size(entries: Sequence[Entry], metadata: dict[str, str] | None = None) -> int:
    """Bytes of the file that :func:`write_safetensors` makes of these entries."""
    header, nbytes = _header(entries, metadata)
    return len(header) + nbytes


def write_safetensors(
    path: Path, entries: Sequence[Entry], arrays: Iterable[np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write arrays, taken one at a time in the order of ``entries``, to a new safetensors file.

    The file is synced before this returns. The caller chooses a temporary name and renames.

    Raises:
        AnyquantError: an array differs from its entry, or their number does (a fault of the caller).
        MachineError: the disk is full or the folder cannot be written.
    """
    with _writing(path, entries, metadata):
        file = path.open("xb")
    with file:
        with _writing(path, entries, metadata):
            file.write(_header(entries, metadata)[0])
        # Only the writing is guarded: an array's producer has its own errors.
        for (key, dtype, shape), array in zip(entries, arrays, strict=True):
            if array.dtype != dtype or array.shape != shape:
                raise AnyquantError(f"{key}: is {array.dtype} {array.shape}, promised was {dtype} {shape}")
            with _writing(path, entries, metadata):
                file.write(np.ascontiguousarray(array).data)
        with _writing(path, entries, metadata):
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def _writing(path: Path, entries: Sequence[Entry], metadata: dict[str, str] | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"cannot write {path.name}: {error.strerror or error}. It needs {file_size(entries, metadata):,} bytes "
            f"in {path.parent}; free some space or choose another folder."
        ) from error


class SafetensorsReader:
    """Arrays of one safetensors file, read by key; opening reads the header alone."""

    def __init__(self, path: Path) -> None:
        """Open and check the header.

        Raises:
            CorruptFileError: truncated, overlapping or lying header; names the file and what is wrong.
            InputError: the file is missing.
        """
        from safetensors import SafetensorError, safe_open

        self.path = path
        if not path.exists():
            raise InputError(f"{path.name} is missing in {path.parent}")
        if not path.is_file():
            raise CorruptFileError(f"{path.name} in {path.parent} is not a regular file")
        try:
            self._state = self._stat()
            untyped: Any = safe_open
            self._file = untyped(path, framework="numpy")
            self.entries: dict[str, tuple[str, tuple[int, ...]]] = {}
            for key in self._file.keys():  # noqa: SIM118 (not a dict)
                part = self._file.get_slice(key)
                self.entries[key] = (str(part.get_dtype()), tuple(part.get_shape()))
        except (SafetensorError, ValueError, OSError) as error:
            raise CorruptFileError(
                f"{path.name} is not a whole safetensors file ({error}). It is truncated or edited: write it again."
            ) from error

    def expect(self, key: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        """Check that the header has this array.

        Raises:
            CorruptFileError: the array is missing, or has another dtype or shape.
        """
        if key not in self.entries:
            raise CorruptFileError(f"{key} is missing in {self.path.name}")
        if self.entries[key] != (_dtype_name(dtype), shape):
            found, at = self.entries[key]
            raise CorruptFileError(
                f"{key} in {self.path.name} is {found} {list(at)}, must be {_dtype_name(dtype)} {list(shape)}"
            )

    def _stat(self) -> tuple[int, int, int]:
        found = self.path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def read(self, key: str) -> np.ndarray:
        """The array of this key.

        Raises:
            CorruptFileError: the file was changed after it was opened.
        """
        # The library maps the file: reading what was cut off since would end the process.
        try:
            changed = self._stat() != self._state
        except OSError:
            changed = True
        if changed:
            raise CorruptFileError(f"{self.path.name} was changed or removed while it was being read")
        array: np.ndarray = self._file.get_tensor(key)
        return array
