"""The header of a GGUF file: scalar metadata and tensor types, whatever the types are.

Written for validation: unlike the usual readers it does not stop at tensor types it has never heard of, and it
shares no code with the exporter that it helps to check.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyquant.errors import CorruptFileError, InputError

_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_TENSORS = 1 << 24


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: shape as in the file (fastest first) and ggml type number."""

    shape: tuple[int, ...]
    type: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata without arrays, and tensors, in file order."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        if length > len(self.data) - self.at:
            raise ValueError(f"a string of {length} bytes goes beyond the end")
        text = self.data[self.at : self.at + length]
        self.at += length
        return text.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            self.skip_array()
            return None
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        return self.scalar(_SCALARS[kind])

    def skip_array(self) -> None:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind in _SCALARS:
            self.at += struct.calcsize(_SCALARS[kind]) * count
        elif kind == _STRING:
            for _ in range(count):
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
        else:
            raise ValueError(f"an array of type {kind}")


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read a header.

    Raises:
        InputError: the file cannot be opened.
        CorruptFileError: not a GGUF file of version 2 or 3, or truncated.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CorruptFileError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (struct.error, ValueError, OverflowError) as error:
        raise CorruptFileError(f"{path}: damaged GGUF header ({error}). Export it again.") from None


def _parse(cursor: _Cursor) -> GGUFHeader:
    cursor.at = 4
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise ValueError(f"version {version}")
    tensors_count, metadata_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    if tensors_count > _MAX_TENSORS or metadata_count > _MAX_TENSORS:
        raise ValueError(f"{tensors_count} tensors and {metadata_count} keys")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        value = cursor.value(cursor.scalar("<I"))
        if value is not None:
            metadata[key] = value
    tensors = {}
    for _ in range(tensors_count):
        name = cursor.string()
        dimensions = cursor.scalar("<I")
        if dimensions > 8:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(cursor.scalar("<Q") for _ in range(dimensions))
        tensors[name] = GGUFTensor(shape, cursor.scalar("<I"))
        cursor.scalar("<Q")
    return GGUFHeader(metadata, tensors)
