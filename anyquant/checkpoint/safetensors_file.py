"""A safetensors file opened from its header alone; values are views into a memory map.

The header is checked against the file before anything is allocated, and nothing in it is trusted: sizes,
offsets, overlaps, duplicate names. The safetensors library, through which the IR reads its own files, is not used
because its NumPy side has no BF16 and gives copies instead of views.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from anyquant.errors import CorruptFileError, InputError
from anyquant.ir import DENSE_DTYPES

_MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library
_AGAIN = "Download or copy the file again."
_OTHER_DTYPES = {
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "BOOL": 8, "U8": 8, "I8": 8,
    "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One entry of the header: ``offset`` is absolute in the file, ``nbytes`` the stored bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """A file's header and a lazily opened memory map.

    Attributes:
        path: the file.
        tensors: name -> StoredTensor, as the header lists them.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            CorruptFileError: truncated, or the header contradicts itself or the file's size.
            InputError: a dtype that no dense tensor can hold.
        """
        self.path = path
        self._map: np.ndarray | None = None
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise CorruptFileError(
                    f"{path.name}: is {size} bytes, too short for its header of {length} bytes. {_AGAIN}"
                )
            if length > _MAX_HEADER:
                raise CorruptFileError(
                    f"{path.name}: claims a header of {length} bytes, the format allows {_MAX_HEADER}. "
                    "It is not a safetensors file."
                )
            header = file.read(length)
        self.tensors = _parse(path.name, header, 8 + length, size)

    def view(self, name: str) -> np.ndarray:
        """Return a read-only view of a stored tensor: uint16 bit patterns for BF16, else its own dtype."""
        if self._map is None:
            self._map = np.memmap(self.path, np.uint8, mode="r")
        stored = self.tensors[name]
        dtype = DENSE_DTYPES[stored.dtype]
        # frombuffer keeps the map alive and accepts offsets that are not aligned.
        flat = np.frombuffer(self._map, dtype, prod(stored.shape), stored.offset)
        return flat.reshape(stored.shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _parse(file: str, header: bytes, start: int, size: int) -> dict[str, StoredTensor]:
    """Turn the JSON header into checked entries; ``start`` is where data begin, ``size`` the file's bytes."""
    try:
        entries = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{file}: its header is not valid JSON ({error}). {_AGAIN}") from error
    if not isinstance(entries, dict):
        raise CorruptFileError(f"{file}: its header is not a JSON object. {_AGAIN}")
    entries.pop("__metadata__", None)
    tensors = {name: _entry(file, name, entry, start) for name, entry in entries.items()}
    end = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != end:
            what = "overlaps another tensor" if stored.offset < end else "leaves a hole before it"
            raise CorruptFileError(f"{file}: {name} at byte {stored.offset} {what} (expected {end}). {_AGAIN}")
        end += stored.nbytes
    if end > size:
        raise CorruptFileError(f"{file}: truncated: its header promises {end} bytes, the file has {size}. {_AGAIN}")
    if end < size:
        raise CorruptFileError(f"{file}: has {size - end} bytes beyond the {end} its header describes. {_AGAIN}")
    return tensors


def _integers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _entry(file: str, name: str, entry: object, start: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise CorruptFileError(f"{file}: the entry of {name!r} is not an object. {_AGAIN}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and _integers(shape) and _integers(offsets) and len(offsets) == 2):
        raise CorruptFileError(f"{file}: the entry of {name!r} lacks a proper dtype, shape or data_offsets. {_AGAIN}")
    begin, end = offsets
    if dtype in DENSE_DTYPES:
        bits = 8 * DENSE_DTYPES[dtype].itemsize
    elif dtype in _OTHER_DTYPES:
        bits = _OTHER_DTYPES[dtype]
    else:
        raise InputError(f"{file}: {name} has the unknown dtype {dtype!r}. Save the model as F32, F16 or BF16.")
    if (end - begin) * 8 != prod(shape) * bits:
        raise CorruptFileError(
            f"{file}: {name} is {dtype} {shape}, {prod(shape) * bits // 8} bytes, "
            f"but its data_offsets span {end - begin}. {_AGAIN}"
        )
    return StoredTensor(dtype, tuple(shape), start + begin, end - begin)
