"""A GGUF file opened from its header alone, every length checked against the file before it is used.

The gguf package has a reader too, but it trusts counts and lengths: a damaged file makes it loop for hours or
read zeros, and it gives up on the whole file at the first unknown tensor type. So the header is parsed here, and
the key-value section can be copied byte for byte.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from anyquant.errors import CorruptFileError, InputError, MissingDependency

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4
_MAX_DIMS = 4
_AGAIN = "Download or copy the file again."


@dataclass(frozen=True)
class Field:
    """One key-value pair: its GGUF type ids (outermost first) and the bytes [start, end) of its value."""

    types: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: ggml type name, shape with the longest-strided axis first, bytes in the file."""

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    block: int
    block_bytes: int


def ggml_types() -> dict[int, tuple[str, int, int]]:
    """Return type id -> (name, elements per block, bytes per block), as the gguf package knows them.

    Raises:
        MissingDependency: the gguf package is not installed.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise MissingDependency("gguf", "gguf", "reading a GGUF file") from error
    return {int(t): (t.name, *GGML_QUANT_SIZES[t]) for t in GGML_QUANT_SIZES}


class _Cursor:
    """Reads the header front to back and never beyond the end of the file."""

    def __init__(self, data: np.ndarray, file: str) -> None:
        self.data, self.file, self.at = memoryview(data.data), file, 0

    def skip(self, count: int, what: str) -> int:
        """Step over bytes and return where they began."""
        start = self.at
        if count > len(self.data) - start:
            raise CorruptFileError(
                f"{self.file}: truncated or damaged: {what} at byte {start} needs {count} bytes, the file ends at "
                f"{len(self.data)}. {_AGAIN}"
            )
        self.at += count
        return start

    def unpack(self, code: str, what: str) -> Any:
        start = self.skip(struct.calcsize("<" + code), what)
        return struct.unpack_from("<" + code, self.data, start)[0]

    def text(self, what: str) -> str:
        length = self.unpack("Q", f"the length of {what}")
        start = self.skip(length, what)
        try:
            return str(self.data[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise CorruptFileError(f"{self.file}: {what} at byte {start} is not UTF-8. {_AGAIN}") from error

    def value(self, kind: int, what: str, depth: int = 0) -> tuple[int, ...]:
        """Step over a value and return its types, outermost first."""
        if kind in _SCALARS:
            self.skip(struct.calcsize("<" + _SCALARS[kind]), what)
            return (kind,)
        if kind == _STRING:
            self.skip(self.unpack("Q", f"the length of {what}"), what)
            return (kind,)
        if kind != _ARRAY or depth == _MAX_DEPTH:
            raise CorruptFileError(f"{self.file}: {what} has the unknown value type {kind} at byte {self.at}. {_AGAIN}")
        item, count = self.unpack("I", what), self.unpack("Q", what)
        if item in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[item]), what)
            return (kind, item)
        # Every string or inner array takes at least 8 bytes: refuse a count before looping over it.
        if count > (len(self.data) - self.at) // 8:
            self.skip(8 * count, what)
        types: tuple[int, ...] = (item,)
        for _ in range(count):
            types = self.value(item, what, depth + 1)
        return (kind, *types)


class GGUFFile:
    """The header of a GGUF file (version 2 or 3, little-endian) and a memory map of it.

    Attributes:
        path: the file.
        fields: key -> Field, in file order.
        tensors: GGUF name -> GGUFTensor, in file order.
    """

    def __init__(self, path: Path) -> None:
        """Parse and check the header.

        Raises:
            CorruptFileError: truncated, or the header contradicts itself or the file's size.
            InputError: big-endian, version 1, one part of a split file, or a tensor type that gguf does not know.
            MissingDependency: the gguf package is not installed.
        """
        types = ggml_types()
        self.path = path
        if path.stat().st_size == 0:
            raise CorruptFileError(f"{path.name}: is empty. {_AGAIN}")
        self.data: np.ndarray = np.memmap(path, np.uint8, mode="r")
        cursor = _Cursor(self.data, path.name)
        if cursor.unpack("I", "the magic") != 0x46554747:
            raise CorruptFileError(f"{path.name}: does not begin with 'GGUF': it is no GGUF file. Check the path.")
        self.version: int = cursor.unpack("I", "the version")
        if self.version & 0xFFFF == 0 and self.version:
            raise InputError(f"{path.name}: is a big-endian GGUF. Convert it with gguf's gguf-convert-endian.")
        if self.version not in (2, 3):
            raise InputError(f"{path.name}: GGUF version {self.version} is not 2 or 3. Convert the model again.")
        tensors, pairs = cursor.unpack("Q", "the tensor count"), cursor.unpack("Q", "the number of key-values")
        self._pairs = pairs
        self._first = cursor.at
        self.fields: dict[str, Field] = {}
        for _ in range(pairs):
            key = cursor.text("a key")
            kind = cursor.unpack("I", f"the type of {key}")
            start = cursor.at
            if key in self.fields:
                raise CorruptFileError(f"{path.name}: the key {key} appears twice. {_AGAIN}")
            self.fields[key] = Field(cursor.value(kind, key), start, cursor.at)
        self._last = cursor.at
        entries = [self._entry(cursor, types) for _ in range(self._checked(tensors, cursor))]
        self.alignment = self._alignment()
        self.tensors = self._place(entries, -(-cursor.at // self.alignment) * self.alignment)
        if self.get("split.count", int, 0) > 1:
            raise InputError(
                f"{path.name}: is one part of {self.get('split.count', int, 0)}. Join them first: "
                "llama-gguf-split --merge FIRST_PART OUTPUT."
            )

    def _checked(self, count: int, cursor: _Cursor) -> int:
        if count > (len(self.data) - cursor.at) // 24:
            cursor.skip(24 * count, f"the list of {count} tensors")
        return count

    def _alignment(self) -> int:
        value: int = self.get("general.alignment", int, 32)
        if value < 8 or value > 1 << 20 or value & (value - 1):
            raise CorruptFileError(f"{self.path.name}: general.alignment {value} is not a power of two. {_AGAIN}")
        return value

    def _entry(self, cursor: _Cursor, types: dict[int, tuple[str, int, int]]) -> tuple[str, GGUFTensor]:
        """Parse one tensor's entry; its offset is still relative to the data section."""
        name = cursor.text("a tensor's name")
        count = cursor.unpack("I", f"the dimensions of {name}")
        if not 1 <= count <= _MAX_DIMS:
            raise CorruptFileError(
                f"{cursor.file}: {name} has {count} dimensions, 1 to {_MAX_DIMS} are possible. {_AGAIN}"
            )
        dims = [cursor.unpack("Q", f"the shape of {name}") for _ in range(count)]
        kind, offset = cursor.unpack("I", f"the type of {name}"), cursor.unpack("Q", f"the offset of {name}")
        if kind not in types:
            raise InputError(
                f"{cursor.file}: {name} has the tensor type {kind}, which the installed gguf package does not know: a "
                "private type of a fork, or a newer one. Upgrade gguf, or start from a file in a stock type."
            )
        type_name, block, block_bytes = types[kind]
        if 0 in dims or dims[0] % block:
            raise CorruptFileError(
                f"{cursor.file}: {name} has the shape {dims[::-1]}, but {type_name} is stored in blocks of {block}. "
                f"{_AGAIN}"
            )
        nbytes = prod(dims) // block * block_bytes
        return name, GGUFTensor(type_name, tuple(dims[::-1]), offset, nbytes, block, block_bytes)

    def _place(self, entries: list[tuple[str, GGUFTensor]], start: int) -> dict[str, GGUFTensor]:
        """Turn relative offsets into absolute ones; check bounds, overlaps and duplicates."""
        file, size = self.path.name, len(self.data)
        tensors: dict[str, GGUFTensor] = {}
        for name, t in entries:
            end = start + t.offset + t.nbytes
            if name in tensors:
                raise CorruptFileError(f"{file}: the tensor {name} appears twice. {_AGAIN}")
            if t.offset % self.alignment:
                raise CorruptFileError(
                    f"{file}: {name} begins at {t.offset}, not a multiple of {self.alignment}. {_AGAIN}"
                )
            if end > size:
                raise CorruptFileError(
                    f"{file}: truncated or damaged: {name} ({t.type} {list(t.shape)}) ends at byte {end}, the file "
                    f"at {size}. {_AGAIN}"
                )
            tensors[name] = GGUFTensor(t.type, t.shape, start + t.offset, t.nbytes, t.block, t.block_bytes)
        before, last = "", start
        for name, t in sorted(tensors.items(), key=lambda item: item[1].offset):
            if t.offset < last:
                raise CorruptFileError(f"{file}: {name} overlaps {before} at byte {t.offset}. {_AGAIN}")
            before, last = name, t.offset + t.nbytes
        return tensors

    def value(self, key: str) -> Any:
        """Decode a value: int, float, bool, str, or a (nested) list of those.

        Raises:
            CorruptFileError: a string that is not UTF-8.
        """
        cursor = _Cursor(self.data, self.path.name)
        cursor.at = self.fields[key].start
        return _decode(cursor, self.fields[key].types[0], key)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Return the value of a key if it is there.

        Args:
            key: key.
            kind: what the value must be: int, float (an int will do), bool, str or list.
            default: returned when the key is missing.

        Raises:
            CorruptFileError: the value is of another type.
        """
        if key not in self.fields:
            return default
        value = self.value(key)
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise CorruptFileError(f"{self.path.name}: {key} is {value!r:.60}, expected {kind.__name__}. {_AGAIN}")
        return value

    def blocks(self, name: str) -> np.ndarray:
        """Return a read-only uint8 view [..., row bytes] of a tensor's data."""
        t = self.tensors[name]
        flat = self.data[t.offset : t.offset + t.nbytes]
        return flat.reshape(*t.shape[:-1], t.shape[-1] // t.block * t.block_bytes)

    def header_only(self) -> bytes:
        """Return a GGUF file that has every key-value of this one, byte for byte, and no tensors."""
        head = struct.pack("<4sIQQ", b"GGUF", self.version, 0, self._pairs)
        body = head + self.data[self._first : self._last].tobytes()
        return body + bytes(-len(body) % self.alignment)


def _decode(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind in _SCALARS:
        return cursor.unpack(_SCALARS[kind], key)
    if kind == _STRING:
        return cursor.text(key)
    item, count = cursor.unpack("I", key), cursor.unpack("Q", key)
    if item in _SCALARS:
        code = f"<{count}{_SCALARS[item]}"
        return list(struct.unpack_from(code, cursor.data, cursor.skip(struct.calcsize(code), key)))
    return [_decode(cursor, item, key) for _ in range(count)]
