"""The GGUF container: the header of a file of version 2 or 3, little-endian.

Key-values are carried as the bytes they are, so that a copy has the same types, empty and nested arrays included.
Whatever a file says is checked against its end before it is used: gguf-py's reader trusts counts, so that a damaged
file makes it loop for hours or read zeros, and it gives up at the first tensor type it does not know.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from anyquant.errors import CorruptFileError, InputError

Data = bytes | mmap.mmap
ALIGNMENT = 32
_MAGIC, _VERSION = b"GGUF", 3
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH, _MAX_DIMENSIONS = 4, 4
_MAX_ALIGNMENT = 1 << 20  # tensors and copies of the header are padded to it


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header describes it.

    Attributes:
        type_id: ggml's number of its type, which may be one that nobody here knows.
        shape: in NumPy's order, the longest-strided axis first.
        offset: bytes from where the data section begins.
    """

    type_id: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a known type; bytes [offset, offset + nbytes) of the file are its data, ``block_bytes`` a block."""

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    block: int
    block_bytes: int


@dataclass(frozen=True)
class Header:
    """What stands before the tensors' data.

    Attributes:
        name: of the file, for messages.
        values: key -> type number and payload, as stored; in file order, as are tensors.
        tensors: name -> description, checked by :meth:`stored` only.
        alignment: of tensor data, in bytes.
        data_start: where tensor data begins.
        size: bytes of the file.
    """

    name: str
    values: dict[str, bytes]
    tensors: dict[str, TensorInfo]
    alignment: int
    data_start: int
    size: int

    def get(self, key: str, kind: type = object, default: Any = None) -> Any:
        """Decode a value: int, float, bool, str, or a (nested) list of those.

        Args:
            key: key.
            kind: what the value must be: int, float (an int will do), bool, str, list, or whatever it is.
            default: returned where the key is absent.

        Raises:
            CorruptFileError: the value is of another type.
        """
        if key not in self.values:
            return default
        cursor = _Cursor(self.values[key], self.name)
        value = cursor.decode(cursor.number("I", key), key)
        if kind is float and type(value) is int:
            return float(value)
        if kind is not object and type(value) is not kind:
            raise _corrupt(self.name, f"{key} is {value!r:.60}, expected {kind.__name__}")
        return value

    def stored(
        self, types: Mapping[int, tuple[str, int, int]], only: Collection[str] | None = None
    ) -> dict[str, StoredTensor]:
        """Say where the tensors' data lies: inside the file, on whole blocks, aligned, no two in the same place.

        Args:
            types: those that may occur: number -> (name, elements per block, bytes per block).
            only: names of the tensors to look at, where the others are of no interest whatever their type.

        Raises:
            InputError: a type that is not among ``types``.
            CorruptFileError: a shape or an offset is out of range.
        """
        found: dict[str, StoredTensor] = {}
        for key, tensor in self.tensors.items():
            if only is not None and key not in only:
                continue
            shown, shape = _shown(key), tensor.shape
            if tensor.type_id not in types:
                known = ", ".join(name for name, _, _ in types.values())
                raise InputError(f"{self.name}: {shown} has the ggml type {tensor.type_id}, which is not among {known}")
            name, block, block_bytes = types[tensor.type_id]
            if not shape or 0 in shape or shape[-1] % block:
                problem = f"{shown} has the shape {list(shape)}, but {name} is stored in blocks of {block}"
                raise _corrupt(self.name, problem)
            if tensor.offset % self.alignment:
                raise _corrupt(self.name, f"{shown} begins at {tensor.offset}, not a multiple of {self.alignment}")
            start, size = self.data_start + tensor.offset, prod(shape) // block * block_bytes
            if start + size > self.size:
                problem = f"{shown} ({name} {list(shape)}) ends at byte {start + size}, the file at {self.size}"
                raise _corrupt(self.name, f"truncated or damaged: {problem}")
            found[key] = StoredTensor(name, shape, start, size, block, block_bytes)
        before, last = "", 0
        for key, placed in sorted(found.items(), key=lambda item: item[1].offset):
            if placed.offset < last:
                raise _corrupt(self.name, f"{_shown(key)} overlaps {_shown(before)} at byte {placed.offset}")
            before, last = key, placed.offset + placed.nbytes
        return found


def _corrupt(name: str, problem: str) -> CorruptFileError:
    return CorruptFileError(f"{name}: {problem}. Download or copy the file again.")


def _shown(name: str) -> str:
    """A name out of a file as a message may hold it: short, on one line."""
    return repr(name[:80])[1:-1]


class _Cursor:
    """Reads front to back, and never beyond the end."""

    def __init__(self, data: Data, name: str, at: int = 0) -> None:
        self.data, self.name, self.at, self.end = data, name, at, len(data)

    def require(self, size: int, what: str) -> None:
        if size > self.end - self.at:
            problem = f"{what} at byte {self.at} needs {size} bytes, the file ends at {self.end}"
            raise _corrupt(self.name, f"truncated or damaged: {problem}")

    def skip(self, size: int, what: str) -> int:
        """Step over bytes and return where they began."""
        self.require(size, what)
        self.at += size
        return self.at - size

    def unpack(self, code: str, what: str) -> tuple[Any, ...]:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code), what))

    def number(self, code: str, what: str) -> Any:
        return self.unpack(code, what)[0]

    def text(self, what: str, errors: str = "strict") -> str:
        start = self.skip(self.number("Q", f"the length of {what}"), what)
        try:
            return str(self.data[start : self.at], "utf-8", errors)
        except UnicodeDecodeError as error:
            raise _corrupt(self.name, f"{what} at byte {start} is not UTF-8") from error

    def value(self, kind: int, what: str, depth: int = 0) -> None:
        """Step over a value."""
        if kind in _SCALARS:
            self.skip(struct.calcsize("<" + _SCALARS[kind]), what)
        elif kind == _STRING:
            self.strings(1, what)
        elif kind == _ARRAY and depth < _MAX_DEPTH:
            item, count = self.unpack("IQ", what)
            # Every string or inner array takes at least 8 bytes: refuse a count before looping over it.
            size = count * struct.calcsize("<" + _SCALARS.get(item, "Q"))
            self.require(size, what)
            if item in _SCALARS:
                self.at += size
            elif item == _STRING:
                self.strings(count, what)
            else:
                for _ in range(count):
                    self.value(item, what, depth + 1)
        else:
            problem = f"{what} has the unknown value type {kind}, or arrays too deeply nested, at byte {self.at}"
            raise _corrupt(self.name, problem)

    def strings(self, count: int, what: str) -> None:
        """Step over strings: a vocabulary has as many as the rest of the header is long, hence no call for each."""
        data, length, last = self.data, struct.Struct("<Q").unpack_from, self.end - 8
        start, at, missing = self.at, self.at, 0
        for _ in range(count):
            if at > last:
                missing = 8
                break
            start, at = at, at + 8 + length(data, at)[0]
        self.at = start
        self.skip(at - start, what)
        self.skip(missing, what)

    def decode(self, kind: int, what: str) -> Any:
        """Return a value that :meth:`value` has stepped over before."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            # Tokens of byte-level vocabularies need not be whole characters.
            return self.text(what, "replace")
        item, count = self.unpack("IQ", what)
        if item in _SCALARS:
            return list(self.unpack(f"{count}{_SCALARS[item]}", what))
        return [self.decode(item, what) for _ in range(count)]


def map_file(path: Path) -> Data:
    """Return a file's bytes, read-only, none of them read yet.

    Raises:
        InputError: it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def parse(data: Data, name: str) -> Header:
    """Read the header of a GGUF file; tensors may be of any type, and :meth:`Header.stored` checks where they lie.

    Args:
        data: the file's bytes.
        name: the file, for messages.

    Raises:
        CorruptFileError: not a GGUF file, truncated, or a count, type or name is out of range.
        InputError: a version or byte order that is not supported.
    """
    if not data:
        raise _corrupt(name, "is empty, and so not a GGUF file")
    if data[:4] != _MAGIC:
        raise CorruptFileError(f"{name}: is not a GGUF file: it does not begin with 'GGUF'. Check the path.")
    cursor = _Cursor(data, name, len(_MAGIC))
    version = cursor.number("I", "the version")
    if version and version & 0xFFFF == 0:
        raise InputError(f"{name}: is a big-endian GGUF. Convert it with gguf's gguf-convert-endian.")
    if version not in (2, _VERSION):
        raise InputError(f"{name}: GGUF version {version} is not 2 or {_VERSION}. Convert the model again.")
    tensor_count, value_count = cursor.unpack("QQ", "the numbers of tensors and key-values")
    values: dict[str, bytes] = {}
    for _ in range(value_count):
        key = cursor.text("a key")
        start, shown = cursor.at, _shown(key)
        cursor.value(cursor.number("I", f"the type of {shown}"), shown)
        if key in values:
            raise _corrupt(name, f"the key {shown} appears twice")
        values[key] = bytes(data[start : cursor.at])
    cursor.require(24 * tensor_count, f"the list of {tensor_count} tensors")
    tensors: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        key = cursor.text("a tensor's name")
        shown = _shown(key)
        count = cursor.number("I", f"the dimensions of {shown}")
        if count > _MAX_DIMENSIONS:
            raise _corrupt(name, f"{shown} has {count} dimensions, {_MAX_DIMENSIONS} are possible")
        *shape, kind, offset = cursor.unpack(f"{count}QIQ", f"the description of {shown}")
        if key in tensors:
            raise _corrupt(name, f"the tensor {shown} appears twice")
        tensors[key] = TensorInfo(kind, tuple(reversed(shape)), offset)
    header = Header(name, values, tensors, ALIGNMENT, 0, cursor.end)
    alignment = header.get("general.alignment", int, ALIGNMENT)
    if not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise _corrupt(name, f"general.alignment {alignment} is not a power of two")
    return replace(header, alignment=alignment, data_start=padded(cursor.at, alignment))


def padded(size: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // alignment) * alignment


def string(text: str) -> bytes:
    """A string as the container stores it."""
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def opening(values: Mapping[str, bytes], tensors: int) -> bytes:
    """What a file of so many tensors begins with: everything before the tensors' descriptions."""
    head = struct.pack("<4sIQQ", _MAGIC, _VERSION, tensors, len(values))
    return head + b"".join(string(key) + value for key, value in values.items())
