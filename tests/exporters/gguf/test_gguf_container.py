"""The container's bytes against gguf-py, and files that are cut, edited or hostile."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType

from anyquant.errors import CorruptFileError, InputError
from anyquant.exporters.gguf import container, metadata

TENSORS = [("a.weight", "Q4_0", (3, 64)), ("b", "F32", (5,)), ("c.weight", "BF16", (2, 7))]


@pytest.fixture
def values(raw_value: Callable[[object], bytes]) -> dict[str, bytes]:
    return {
        "general.architecture": raw_value("llama"),
        "x.count": raw_value(7),
        "x.eps": raw_value(0.5),
        "x.yes": raw_value(True),
        "x.tokens": raw_value(["a", "é", ""]),
        "x.empty": raw_value([]),
    }


def _file(values: dict[str, bytes], alignment: int = 32) -> bytes:
    data = container.header_bytes(values, TENSORS, alignment)
    for number, (_, type_name, shape) in enumerate(TENSORS, 1):
        size = container.nbytes(type_name, shape)
        data += bytes([number]) * size + bytes(container.padded(size, alignment) - size)
    return data


def test_type_numbers_and_sizes_are_ggml_s() -> None:
    for name, number in container.TYPE_IDS.items():
        assert GGMLQuantizationType[name] == number
        length, size = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
        assert container.nbytes(name, (3, 2 * length)) == 6 * size


def test_file_types_are_llama_cpp_s() -> None:
    assert set(metadata.FILE_TYPES) == set(container.TYPE_IDS)
    for name, number in metadata.FILE_TYPES.items():
        expected = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"}
        assert LlamaFileType(number).name == expected.get(name, f"MOSTLY_{name}")


@pytest.mark.parametrize("alignment", [32, 64])
def test_gguf_py_reads_what_is_written(
    values: dict[str, bytes], raw_value: Callable[[object], bytes], tmp_path: Path, alignment: int
) -> None:
    if alignment != 32:
        values["general.alignment"] = raw_value(alignment)
    (tmp_path / "x.gguf").write_bytes(_file(values, alignment))
    reader = GGUFReader(tmp_path / "x.gguf")
    for key, expected in [("x.count", 7), ("x.eps", 0.5), ("x.yes", True), ("x.tokens", ["a", "é", ""])]:
        field = reader.get_field(key)
        assert field is not None
        assert field.contents() == expected
    assert [(t.name, t.tensor_type.name, tuple(reversed(t.shape.tolist()))) for t in reader.tensors] == TENSORS
    for number, tensor in enumerate(reader.tensors, 1):
        assert set(np.asarray(tensor.data).view(np.uint8).ravel().tolist()) == {number}
        assert tensor.data_offset % alignment == 0


def test_our_parser_reads_what_gguf_py_writes(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_key_value("x.nested", [[1, 2], [3]], GGUFValueType.ARRAY)
    for kind, value in [("uint8", 200), ("int8", -3), ("uint16", 9), ("int16", -9), ("int32", -5), ("uint64", 2**40)]:
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_int64("x.int64", -(2**40))
    writer.add_float64("x.float64", 0.1)
    writer.add_array("x.floats", [0.5, 1.5])
    writer.add_tensor("a.weight", np.ones((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (tmp_path / "x.gguf").read_bytes()
    header = container.parse(data, "x.gguf")
    found = {key: header.get(key) for key in header.values}
    assert found.pop("general.architecture") == "llama"
    assert found == {
        "x.nested": [[1, 2], [3]],
        "x.uint8": 200,
        "x.int8": -3,
        "x.uint16": 9,
        "x.int16": -9,
        "x.int32": -5,
        "x.uint64": 2**40,
        "x.int64": -(2**40),
        "x.float64": 0.1,
        "x.floats": [0.5, 1.5],
    }
    assert header.tensors == (container.TensorInfo("a.weight", 0, (2, 3), 0),)
    assert container.header_bytes(header.values, [("a.weight", "F32", (2, 3))]) == data[: header.data_start]


def test_a_copy_of_key_values_is_the_same_bytes(values: dict[str, bytes]) -> None:
    header = container.parse(_file(values), "x")
    assert header.values == values
    assert header.get("x.empty") == []
    assert header.get("absent", 3) == 3


def test_every_truncation_is_named(values: dict[str, bytes]) -> None:
    data = _file(values)
    container.parse(data, "x.gguf")
    last = len(data) - (-container.nbytes(*TENSORS[-1][1:]) % 32)  # the padding at the end may be missing
    for end in range(4, last):
        with pytest.raises(CorruptFileError, match=r"x\.gguf"):
            container.parse(data[:end], "x.gguf")


def test_flipped_bytes_never_do_worse_than_an_error(values: dict[str, bytes]) -> None:
    data = _file(values)
    rng = np.random.default_rng(0)
    refused = 0
    for at in range(len(container.header_bytes(values, TENSORS))):
        edited = bytearray(data)
        edited[at] ^= 1 << rng.integers(8)
        try:
            container.parse(bytes(edited), "x.gguf")
        except InputError:
            refused += 1
    assert refused > 100


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a GGUF file"),
        (b"GGML" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string(b"k") + struct.pack("<IIQ", 9, 8, 2**60), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string(b"k") + struct.pack("<IIQ", 9, 4, 2**62), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string(b"k") + struct.pack("<I", 13), "type 13"),
        (
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + _string(b"k")
            + struct.pack("<I", 9)
            + 6 * struct.pack("<IQ", 9, 1),
            "deeply nested",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string(b"\xff\xff") + bytes(9), "not UTF-8"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (_string(b"k") + struct.pack("<II", 4, 1)), "occurs twice"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + _string(b"t") + struct.pack("<I", 5) + bytes(99), "5 dimensions"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string(b"general.alignment") + struct.pack("<II", 4, 24),
            "power of two",
        ),
    ],
)
def test_hostile_headers(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        container.parse(data, "x.gguf")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("t", 0, (2**40,), 0)], "has"),
        ([("t", 0, (2,), 2**62)], "would end"),
        ([("t", 2, (33,), 0)], "whole blocks"),
        ([("t", 99, (4,), 0)], "ggml type 99"),
        ([("t", 0, (1,), 0), ("t", 0, (1,), 32)], "name occurs twice"),
    ],
)
def test_hostile_tensors(tensors: list[tuple[str, int, tuple[int, ...], int]], message: str) -> None:
    data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0)
    for name, kind, shape, offset in tensors:
        data += _string(name.encode()) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        data += struct.pack("<IQ", kind, offset)
    with pytest.raises(InputError, match=message):
        container.parse(data + bytes(256), "x.gguf")
