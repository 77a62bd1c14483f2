"""Writing the GGUF container, version 3, little-endian: types, values and the header as bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from anyquant.exporters.gguf import custom
from anyquant.gguf_container import ALIGNMENT, opening, padded, string
from anyquant.ir import GGML_TYPES

# ggml's numbers of the types that the IR and the layouts hold.
TYPE_IDS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21,
    "IQ2_S": 22, "IQ4_XS": 23, "IQ1_M": 29, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39,
    **{name: number for name, (number, _) in custom.TYPES.items()},
}  # fmt: skip
_ELEMENTS: dict[str, tuple[int, int]] = {
    **GGML_TYPES, "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    **{name: (custom.BLOCK, size) for name, (_, size) in custom.TYPES.items()},
}  # fmt: skip
TYPES = {number: (name, *_ELEMENTS[name]) for name, number in TYPE_IDS.items()}
"""Type number -> (name, elements per block, bytes per block)."""


def nbytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this type and shape, padding not counted."""
    length, size = _ELEMENTS[type_name]
    return prod(shape) // length * size


def string_value(text: str) -> bytes:
    """A string as key-value bytes."""
    return struct.pack("<I", 8) + string(text)


def uint32_value(number: int) -> bytes:
    """An unsigned 32-bit integer as key-value bytes."""
    return struct.pack("<II", 4, number)


def bool_value(flag: bool) -> bytes:
    """A truth value as key-value bytes."""
    return struct.pack("<IB", 7, flag)


def array_value(kind: int, items: Sequence[object]) -> bytes:
    """A list as key-value bytes; ``kind`` is GGUF's number: 5 for integers, 6 for floats, 8 for strings."""
    if kind == 8:
        data = b"".join(string(str(item)) for item in items)
    else:
        data = struct.pack(f"<{len(items)}{'i' if kind == 5 else 'f'}", *items)
    return struct.pack("<IIQ", 9, kind, len(items)) + data


def header_bytes(
    values: Mapping[str, bytes], tensors: Iterable[tuple[str, str, tuple[int, ...]]], alignment: int = ALIGNMENT
) -> bytes:
    """Everything before the tensor data, padded; tensors are (name, type, shape in NumPy's order)."""
    listed = list(tensors)
    parts, offset = [opening(values, len(listed))], 0
    for name, type_name, shape in listed:
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts.append(string(name) + dimensions + struct.pack("<IQ", TYPE_IDS[type_name], offset))
        offset += padded(nbytes(type_name, shape), alignment)
    data = b"".join(parts)
    return data.ljust(padded(len(data), alignment), b"\0")
