"""The GGUF container, version 3, little-endian: header in, header out.

Key-values are carried as the bytes they are, so that a copy has the same types, empty and nested arrays
included. Everything read from a file is checked against its end before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from anyquant.errors import CorruptFileError, InputError
from anyquant.ir import GGML_TYPES

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32

# ggml's numbers of the types that the IR and the layouts hold.
TYPE_IDS: dict[str, int] = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "BF16": 30,
}
TYPE_NAMES = {number: name for name, number in TYPE_IDS.items()}
_ELEMENTS: dict[str, tuple[int, int]] = {**GGML_TYPES, "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)}

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_MAX_DEPTH = 4
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file; ``shape`` is in NumPy's order, ``offset`` counts from the data section."""

    name: str
    type_id: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Header:
    """Key-values (type number and payload, as stored), tensors, and where their data starts."""

    values: dict[str, bytes]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_start: int

    def get(self, key: str, default: Any = None) -> Any:
        """Decode the value of a key: int, float, bool, str or list; ``default`` where it is absent."""
        return decode(self.values[key]) if key in self.values else default


def nbytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this type and shape, padding not counted."""
    length, size = _ELEMENTS[type_name]
    return prod(shape) // length * size


def padded(size: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // alignment) * alignment


def string_value(text: str) -> bytes:
    """A string as key-value bytes."""
    return struct.pack("<I", _STRING) + _string(text)


def uint32_value(number: int) -> bytes:
    """An unsigned 32-bit integer as key-value bytes."""
    return struct.pack("<II", _UINT32, number)


def bool_value(flag: bool) -> bytes:
    """A truth value as key-value bytes."""
    return struct.pack("<IB", _BOOL, flag)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def header_bytes(
    values: Mapping[str, bytes], tensors: Iterable[tuple[str, str, tuple[int, ...]]], alignment: int = ALIGNMENT
) -> bytes:
    """Everything before the tensor data, padded; tensors are (name, type, shape in NumPy's order)."""
    listed = list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(listed), len(values))]
    parts += [_string(key) + value for key, value in values.items()]
    offset = 0
    for name, type_name, shape in listed:
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts.append(_string(name) + dimensions + struct.pack("<IQ", TYPE_IDS[type_name], offset))
        offset += padded(nbytes(type_name, shape), alignment)
    data = b"".join(parts)
    return data.ljust(padded(len(data), alignment), b"\0")


class _Cursor:
    """A position in a buffer that may end anywhere."""

    def __init__(self, data: Any, name: str) -> None:
        self.data, self.name, self.at, self.end = data, name, 0, len(data)

    def skip(self, size: int, what: str) -> int:
        """Move on by ``size`` bytes; return where they start."""
        start = self.at
        if size > self.end - start:
            raise CorruptFileError(
                f"{self.name}: ends at byte {self.end:,}, inside {what}, which needs {size:,} bytes from byte "
                f"{start:,}. The file is truncated or damaged: copy or download it again."
            )
        self.at = start + size
        return start

    def number(self, format_: str, what: str) -> int:
        start = self.skip(struct.calcsize(format_), what)
        return int(struct.unpack_from(format_, self.data, start)[0])

    def text(self, what: str) -> str:
        start = self.skip(self.number("<Q", what), what)
        try:
            return bytes(self.data[start : self.at]).decode()
        except UnicodeDecodeError:
            raise CorruptFileError(f"{self.name}: {what} at byte {start:,} is not UTF-8") from None

    def value(self, kind: int, what: str, depth: int = 0) -> None:
        """Step over one value."""
        if kind in _SCALARS:
            self.skip(struct.calcsize(_SCALARS[kind]), what)
        elif kind == _STRING:
            self.skip(self.number("<Q", what), what)
        elif kind == _ARRAY and depth < _MAX_DEPTH:
            item, count = self.number("<I", what), self.number("<Q", what)
            if item in _SCALARS:
                self.skip(count * struct.calcsize(_SCALARS[item]), what)
                return
            # Every item takes bytes of its own, so the end of the file bounds a hostile count.
            for _ in range(count):
                self.value(item, what, depth + 1)
        else:
            raise CorruptFileError(f"{self.name}: {what} has the unknown or too deeply nested type {kind}")


def decode(raw: bytes) -> Any:
    """Decode key-value bytes to int, float, bool, str or list."""
    cursor = _Cursor(raw, "value")
    return _decode(cursor, cursor.number("<I", "a value"))


def _decode(cursor: _Cursor, kind: int) -> Any:
    if kind == _STRING:
        start = cursor.skip(cursor.number("<Q", "a string"), "a string")
        # Tokens of byte-level vocabularies need not be whole characters.
        return bytes(cursor.data[start : cursor.at]).decode(errors="replace")
    if kind == _ARRAY:
        item, count = cursor.number("<I", "an array"), cursor.number("<Q", "an array")
        return [_decode(cursor, item) for _ in range(count)]
    start = cursor.skip(struct.calcsize(_SCALARS[kind]), "a number")
    value = struct.unpack_from(_SCALARS[kind], cursor.data, start)[0]
    return bool(value) if kind == _BOOL else value


def parse(data: Any, name: str, only: Collection[str] | None = None) -> Header:
    """Read the header of a GGUF file.

    Args:
        data: the file's bytes (bytes or mmap).
        name: the file, for messages.
        only: names of the tensors to keep, where the others are of no interest whatever their type.

    Raises:
        InputError: not a GGUF file, or one of a version or byte order that is not supported.
        CorruptFileError: truncated, or a count, type, name or offset is out of range.
    """
    cursor = _Cursor(data, name)
    if bytes(data[:4]) != MAGIC:
        raise InputError(f"{name}: does not start with 'GGUF', so it is not a GGUF file")
    cursor.skip(4, "the header")
    version = cursor.number("<I", "the header")
    if version not in (2, VERSION):
        raise InputError(f"{name}: GGUF version {version} (or big-endian); only 2 and {VERSION} are supported")
    tensor_count, value_count = cursor.number("<Q", "the header"), cursor.number("<Q", "the header")
    values: dict[str, bytes] = {}
    for index in range(value_count):
        key = cursor.text(f"the name of key-value {index}")
        start = cursor.at
        cursor.value(cursor.number("<I", key), f"the value of {key!r:.80}")
        if key in values:
            raise CorruptFileError(f"{name}: the key {key!r:.80} occurs twice")
        values[key] = bytes(data[start : cursor.at])
    tensors = tuple(_tensor(cursor, index) for index in range(tensor_count))
    if len({t.name for t in tensors}) < len(tensors):
        raise CorruptFileError(f"{name}: a tensor name occurs twice")
    if only is not None:
        tensors = tuple(tensor for tensor in tensors if tensor.name in only)
    alignment = decode(values["general.alignment"]) if "general.alignment" in values else ALIGNMENT
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise CorruptFileError(f"{name}: general.alignment is {alignment!r:.40}, must be a power of two")
    header = Header(values, tensors, alignment, padded(cursor.at, alignment))
    for tensor in tensors:
        _check_extent(tensor, header.data_start, cursor.end, name)
    return header


def _tensor(cursor: _Cursor, index: int) -> TensorInfo:
    name = cursor.text(f"the name of tensor {index}")
    what = f"the description of tensor {name!r:.80}"
    dimensions = cursor.number("<I", what)
    if dimensions > _MAX_DIMENSIONS:
        raise CorruptFileError(f"{cursor.name}: {what} has {dimensions} dimensions, more than {_MAX_DIMENSIONS}")
    shape = tuple(reversed([cursor.number("<Q", what) for _ in range(dimensions)]))
    return TensorInfo(name, cursor.number("<I", what), shape, cursor.number("<Q", what))


def _check_extent(tensor: TensorInfo, data_start: int, end: int, name: str) -> None:
    """Refuse a tensor of a known type whose rows are not whole blocks or whose data lies beyond the file."""
    type_name = TYPE_NAMES.get(tensor.type_id)
    if type_name is None:
        raise InputError(
            f"{name}: tensor {tensor.name!r:.80} has the ggml type {tensor.type_id}, which is not among "
            f"{', '.join(TYPE_IDS)}"
        )
    length = _ELEMENTS[type_name][0]
    if tensor.shape and tensor.shape[-1] % length:
        raise CorruptFileError(f"{name}: rows of {tensor.name!r:.80} are not whole blocks of {type_name}")
    last = data_start + tensor.offset + nbytes(type_name, tensor.shape)
    if last > end:
        raise CorruptFileError(
            f"{name}: the data of {tensor.name!r:.80} would end at byte {last:,}, but the file has {end:,}. "
            "It is truncated or damaged: copy or download it again."
        )
