"""Tensor types of our own: seven sizes of rows in retired numbers of ggml, and the blob that a tensor is in them.

docs/gguf-format.md says it in full. ggml gives all rows of a tensor the same bytes, so a type is a size, and what is in
it, for all rows together, is one blob: a header that names sections, and the arrays of the intermediate representation
as they are, except that exponents of blocks stand beside a table of what the codes mean.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant import ir
from anyquant.errors import CorruptFileError, MissingDependency
from anyquant.ir.packing import pack

BLOCK = 32
"""Weights of a block: rows are whole blocks."""
TYPES = {
    "ANYQUANT_2_0": (4, 8),
    "ANYQUANT_2_5": (5, 10),
    "ANYQUANT_3_0": (31, 12),
    "ANYQUANT_3_5": (32, 14),
    "ANYQUANT_4_25": (33, 17),
    "ANYQUANT_5_25": (37, 21),
    "ANYQUANT_8_5": (38, 34),
}
"""Name, by bits per weight -> (ggml's number, bytes per block), by size."""
NUMBERS = frozenset(number for number, _ in TYPES.values())
MAGIC, VERSION = b"AQTENSOR", 1
HEADER_BYTES = 256
_ALIGNMENT = 64
_HEADER = struct.Struct("<8sIIIIQQQIBBBBI4x16Q64s")
_KINDS = {"codebook": 1, "block": 2, "affine": 3}
_SECTIONS = {
    "codebook": (".bits", ".codes", ".codebook", ".input_scale", ".outlier_indptr", ".outlier_index", ".outlier_value"),
    "block": (".codes", ".exponents", "table"),
    "affine": (".codes", ".scale", ".zero"),
}
_DTYPES: dict[str, str] = {
    ".bits": "u1", ".codes": "u1", ".codebook": "<f2", ".input_scale": "<f2", ".outlier_indptr": "<u4",
    ".outlier_value": "<f2", ".exponents": "i1", "table": "<f4", ".scale": "<f2", ".zero": "u1",
}  # fmt: skip
_FORMATS = {"bfp": 1, "minifloat": 2, "log": 3}

Held = ir.CodebookSpec | ir.BlockSpec | ir.AffineSpec


def type_for(spec: Held) -> str | None:
    """The smallest type that holds a tensor, or None: its rows are no whole blocks, or it is too large for all."""
    rows, columns = spec.shape
    needed = _layout(spec)[1]
    if columns % BLOCK:
        return None
    return next((name for name, (_, size) in TYPES.items() if rows * (columns // BLOCK) * size >= needed), None)


def _layout(spec: Held) -> tuple[dict[str, tuple[int, int]], int]:
    """Name -> (offset, bytes) of every section, and the bytes of the blob."""
    sizes = {name: dtype.itemsize * prod(shape) for name, (dtype, shape) in spec.arrays().items()}
    if isinstance(spec, ir.BlockSpec):
        sizes["table"] = 4 << spec.width
    found, end = {}, HEADER_BYTES
    for name in _SECTIONS[spec.kind]:
        if name in sizes:
            found[name] = (end, sizes[name])
            end = -(-(end + sizes[name]) // _ALIGNMENT) * _ALIGNMENT
    return found, end


def table_of(spec: ir.BlockSpec) -> NDArray[np.float32]:
    """What each code of a block format stands for beside an exponent of 0: float32 [2**width]."""
    codes = np.arange(1 << spec.width, dtype=np.uint8)
    values = np.zeros(len(codes), np.float32)
    # The one code that no tensor has, a negative zero, is left out.
    valid = np.ones(len(codes), bool)
    if spec.format != "log":
        valid[1 << (spec.width - 1)] = False
    one = ir.BlockSpec((1, int(valid.sum())), spec.format, spec.width, spec.block, spec.exponent_width)
    padded = np.zeros((1, one.blocks * one.block), np.uint8)
    padded[0, : one.shape[1]] = codes[valid]
    arrays = {".codes": pack(padded, spec.width), ".exponents": np.zeros((1, one.blocks), np.int8)}
    values[valid] = ir.dequantize(ir.Tensor(one, arrays))[0]
    return values


def encode(name: str, tensor: ir.Tensor, type_name: str) -> NDArray[np.uint8]:
    """The data of a tensor in one of the types.

    Args:
        name: of the tensor in the file; the header holds its first 63 bytes, for messages.
        tensor: rows in the file's order.
        type_name: as :func:`type_for` says.

    Returns:
        uint8 [bytes of the tensor], zeros after the blob.
    """
    spec = tensor.spec
    assert isinstance(spec, Held)
    rows, columns = spec.shape
    sections, used = _layout(spec)
    stride = columns // BLOCK * TYPES[type_name][1]
    data = np.zeros(rows * stride, np.uint8)
    for section, (offset, size) in sections.items():
        array = table_of(spec) if section == "table" and isinstance(spec, ir.BlockSpec) else tensor.arrays[section]
        stored = np.ascontiguousarray(array, _dtype(section, columns))
        data[offset : offset + size] = stored.reshape(-1).view(np.uint8)
    places = [place for section in _SECTIONS[spec.kind] for place in sections.get(section, (0, 0))]
    places += [0] * (16 - len(places))
    label = name.encode()[:63]
    fields = _fields(spec)
    payload = zlib.crc32(data[HEADER_BYTES:used].data)

    def header(checksum: int) -> bytes:
        return _HEADER.pack(
            MAGIC, VERSION, HEADER_BYTES, checksum, payload, used, rows, columns, stride, *fields, *places, label
        )

    data[:HEADER_BYTES] = np.frombuffer(header(zlib.crc32(header(0))), np.uint8)
    return data


def _dtype(section: str, columns: int) -> np.dtype[Any]:
    wide = "<u2" if columns <= 65536 else "<u4"
    return np.dtype(wide if section == ".outlier_index" else _DTYPES[section])


def _fields(spec: Held) -> tuple[int, int, int, int, int]:
    """Kind, axis or format, width, exponent width, weights that share a scale."""
    if isinstance(spec, ir.CodebookSpec):
        return _KINDS["codebook"], spec.axis, 0, 0, 0
    if isinstance(spec, ir.BlockSpec):
        return _KINDS["block"], _FORMATS[spec.format], spec.width, spec.exponent_width, spec.block
    return _KINDS["affine"], 0, spec.bits, 0, spec.block


@dataclass(frozen=True)
class _Header:
    """A blob's header, checked against its checksum and its data's."""

    shape: tuple[int, int]
    kind: str
    form: int
    width: int
    exponent_width: int
    block: int
    sections: Mapping[str, bytes]


def decode(name: str, shape: tuple[int, ...], data: NDArray[np.uint8]) -> ir.Tensor:
    """Read a blob.

    Args:
        name: of the tensor, for messages.
        shape: that the file says.
        data: uint8, all of the tensor's bytes.

    Raises:
        CorruptFileError: names the tensor and what is wrong with it.
    """
    header = _read_header(name, shape, data)
    try:
        arrays = {
            section: np.frombuffer(raw, _dtype(section, header.shape[1])) for section, raw in header.sections.items()
        }
        table = arrays.pop("table", None)
        spec = _spec(header, arrays)
        expected = spec.arrays()
        if arrays.keys() != expected.keys():
            raise ValueError("not those of its kind")
        arrays = {key: arrays[key].reshape(expected[key][1]) for key in expected}
    except (KeyError, ValueError, CorruptFileError) as error:
        raise _damaged(name, f"its sections do not fit together ({error})") from None
    if isinstance(spec, ir.BlockSpec) and (table is None or not np.array_equal(table, table_of(spec))):
        raise _damaged(name, "its table is not that of its format")
    tensor = ir.Tensor(spec, arrays)
    tensor.check(name)
    return tensor


def _damaged(name: str, problem: str) -> CorruptFileError:
    return CorruptFileError(f"{name}: damaged: {problem}. Download or copy the file again.")


def _read_header(name: str, shape: tuple[int, ...], data: NDArray[np.uint8]) -> _Header:
    if data.size < HEADER_BYTES or bytes(data[:8]) != MAGIC:
        raise CorruptFileError(
            f"{name}: has one of the types that anyquant takes, but does not hold a tensor of anyquant. "
            "Another program may have used the same number: read the file with that program."
        )
    raw = bytes(data[:HEADER_BYTES])
    _, version, size, checksum, payload, used, rows, columns, stride, kind, form, width, exponent, block, *rest = (
        _HEADER.unpack(raw)
    )
    places = rest[:16]
    if version != VERSION or size != HEADER_BYTES:
        raise _damaged(name, f"version {version} of the blob is not known here, {VERSION} is")
    if zlib.crc32(raw[:16] + bytes(4) + raw[20:]) != checksum:
        raise _damaged(name, "the checksum of its header differs")
    if (rows, columns) != shape or stride * rows != data.size or not HEADER_BYTES <= used <= data.size:
        raise _damaged(name, f"its header says {rows} x {columns} in {used} bytes, the file {list(shape)}, {data.size}")
    if zlib.crc32(data[HEADER_BYTES:used].tobytes()) != payload:
        raise _damaged(name, "the checksum of its data differs")
    names = {number: key for key, number in _KINDS.items()}
    if kind not in names:
        raise _damaged(name, f"kind {kind} is not known")
    sections: dict[str, bytes] = {}
    for section, offset, length in zip(_SECTIONS[names[kind]], places[::2], places[1::2], strict=False):
        if not offset and not length:
            continue
        if offset % _ALIGNMENT or not HEADER_BYTES <= offset <= used or length > used - offset:
            raise _damaged(name, f"{section} lies at {offset}, {length} bytes, outside of its {used}")
        sections[section] = data[offset : offset + length].tobytes()
    return _Header((rows, columns), names[kind], form, width, exponent, block, sections)


def _spec(header: _Header, arrays: dict[str, np.ndarray]) -> Held:
    if header.kind == "codebook":
        return ir.CodebookSpec(
            header.shape, header.form, len(arrays[".codes"]), len(arrays[".codebook"]), ".input_scale" in arrays,
            len(arrays.get(".outlier_value", ())),
        )  # fmt: skip
    if header.kind == "block":
        formats = {number: key for key, number in _FORMATS.items()}
        return ir.BlockSpec(header.shape, formats[header.form], header.width, header.block, header.exponent_width)
    return ir.AffineSpec(header.shape, header.width, header.block)


def register() -> None:
    """Make gguf-py's reader and writer take files with these types: the numbers, and the sizes of their blocks.

    Raises:
        MissingDependency: gguf is not installed.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise MissingDependency("gguf", "gguf", "reading a GGUF file") from None
    for name, (number, size) in TYPES.items():
        if number not in GGMLQuantizationType._value2member_map_:
            member = int.__new__(GGMLQuantizationType, number)
            member._name_, member._value_ = name, number
            GGMLQuantizationType._member_map_[name] = member
            GGMLQuantizationType._value2member_map_[number] = member
            GGML_QUANT_SIZES[member] = (BLOCK, size)
