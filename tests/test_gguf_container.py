"""The container's header: against gguf-py both ways, and files that are cut, edited or hostile."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from anyquant.errors import AnyquantError, CorruptFileError, InputError
from anyquant.exporters.gguf import custom
from anyquant.exporters.gguf.container import (
    TYPE_IDS,
    TYPES,
    bool_value,
    header_bytes,
    nbytes,
    string_value,
    uint32_value,
)
from anyquant.gguf_container import Header, TensorInfo, map_file, padded, parse

TENSORS = [("a.weight", "Q4_0", (3, 64)), ("b", "F32", (5,)), ("c.weight", "BF16", (2, 7))]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def entry(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(
    pairs: list[bytes], entries: list[bytes] | None = None, data: int = 256, version: int = 3, **counts: int
) -> bytes:
    entries = entries or []
    head = struct.pack("<4sIQQ", b"GGUF", version, counts.get("tensors", len(entries)), counts.get("kv", len(pairs)))
    body = head + b"".join(pairs) + b"".join(entries)
    return body + bytes(-len(body) % 32) + bytes(data)


@pytest.fixture
def values() -> dict[str, bytes]:
    return {
        "general.architecture": string_value("llama"),
        "x.count": uint32_value(7),
        "x.eps": struct.pack("<If", 6, 0.5),
        "x.yes": bool_value(True),
        "x.tokens": struct.pack("<I", 9) + array(8, 3, text("a") + text("é") + text("")),
        "x.empty": struct.pack("<I", 9) + array(8, 0),
    }


def _file(values: dict[str, bytes], alignment: int = 32) -> bytes:
    data = header_bytes(values, TENSORS, alignment)
    for number, (_, type_name, shape) in enumerate(TENSORS, 1):
        size = nbytes(type_name, shape)
        data += bytes([number]) * size + bytes(padded(size, alignment) - size)
    return data


def _read(data: bytes) -> Header:
    """Everything that is checked of a header."""
    header = parse(data, "x.gguf")
    header.stored(TYPES)
    return header


def test_type_numbers_and_sizes_are_ggml_s() -> None:
    for name, number in TYPE_IDS.items():
        if number in custom.NUMBERS:
            continue  # ours
        assert GGMLQuantizationType[name] == number
        length, size = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
        assert TYPES[number] == (name, length, size)
        assert nbytes(name, (3, 2 * length)) == 6 * size


@pytest.mark.parametrize("alignment", [32, 64])
def test_gguf_py_reads_what_is_written(values: dict[str, bytes], tmp_path: Path, alignment: int) -> None:
    if alignment != 32:
        values["general.alignment"] = uint32_value(alignment)
    (tmp_path / "x.gguf").write_bytes(_file(values, alignment))
    reader = GGUFReader(tmp_path / "x.gguf")
    for key, expected in [("x.count", 7), ("x.eps", 0.5), ("x.yes", True), ("x.tokens", ["a", "é", ""])]:
        field = reader.get_field(key)
        assert field is not None
        assert field.contents() == expected
    assert [(t.name, t.tensor_type.name, tuple(reversed(t.shape.tolist()))) for t in reader.tensors] == TENSORS
    ours = _read((tmp_path / "x.gguf").read_bytes()).stored(TYPES)
    for number, tensor in enumerate(reader.tensors, 1):
        assert set(np.asarray(tensor.data).view(np.uint8).ravel().tolist()) == {number}
        assert tensor.data_offset % alignment == 0
        assert (ours[tensor.name].offset, ours[tensor.name].nbytes) == (tensor.data_offset, tensor.n_bytes)


@pytest.fixture
def written(tmp_path: Path) -> bytes:
    """A file by gguf-py, with a value of every type."""
    writer = GGUFWriter(tmp_path / "written.gguf", "llama")
    writer.add_key_value("x.nested", [[1, 2], [3]], GGUFValueType.ARRAY)
    for kind, value in [("uint8", 200), ("int8", -3), ("uint16", 9), ("int16", -9), ("int32", -5), ("uint64", 2**40)]:
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_int64("x.int64", -(2**40))
    writer.add_uint32("x.uint32", 7)
    writer.add_float32("x.float32", 0.25)
    writer.add_float64("x.float64", 1 / 3)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "né")
    writer.add_array("x.floats", [0.5, 1.5])
    writer.add_array("x.strings", ["a", "", "ü"])
    writer.add_tensor("a.weight", np.ones((2, 3), np.float32))
    writer.add_tensor("b.weight", np.ones((4, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (tmp_path / "written.gguf").read_bytes()


def test_our_parser_reads_what_gguf_py_writes(written: bytes) -> None:
    header = _read(written)
    assert {key: header.get(key) for key in header.values} == {
        "general.architecture": "llama",
        "x.nested": [[1, 2], [3]],
        "x.uint8": 200,
        "x.int8": -3,
        "x.uint16": 9,
        "x.int16": -9,
        "x.int32": -5,
        "x.uint64": 2**40,
        "x.int64": -(2**40),
        "x.uint32": 7,
        "x.float32": 0.25,
        "x.float64": 1 / 3,
        "x.bool": True,
        "x.string": "né",
        "x.floats": [0.5, 1.5],
        "x.strings": ["a", "", "ü"],
    }
    assert header.get("x.bool") is True
    assert header.tensors == {"a.weight": TensorInfo(0, (2, 3), 0), "b.weight": TensorInfo(1, (4, 32), 32)}
    again = header_bytes(header.values, [("a.weight", "F32", (2, 3)), ("b.weight", "F16", (4, 32))])
    assert again == written[: header.data_start]


@pytest.mark.slow
def test_real_file_against_the_gguf_package(real_gguf: Path) -> None:
    header = parse(map_file(real_gguf), real_gguf.name)
    expected = {
        t.name: (tuple(int(n) for n in reversed(t.shape)), int(t.tensor_type), t.data_offset)
        for t in GGUFReader(real_gguf).tensors
    }
    found = {name: (t.shape, t.type_id, header.data_start + t.offset) for name, t in header.tensors.items()}
    assert found == expected


def test_a_copy_of_key_values_is_the_same_bytes(values: dict[str, bytes]) -> None:
    header = parse(_file(values), "x")
    assert header.values == values
    assert header.get("x.empty") == []


def test_values_are_of_the_type_asked_for(values: dict[str, bytes]) -> None:
    header = parse(_file(values), "x.gguf")
    assert header.get("absent", int, 3) == 3
    assert header.get("x.count", int) == 7
    assert header.get("x.count", float) == 7.0
    assert isinstance(header.get("x.count", float), float)
    for key, kind in [("x.yes", int), ("x.tokens", str), ("x.eps", int)]:
        with pytest.raises(CorruptFileError, match=rf"x\.gguf: {key} is .*, expected {kind.__name__}"):
            header.get(key, kind)


def test_tokens_need_not_be_whole_characters() -> None:
    half = struct.pack("<Q", 1) + "é".encode()[:1]
    assert parse(build([pair("t", 9, array(8, 1, half))]), "x").get("t") == ["�"]


def test_version_2_is_laid_out_the_same(values: dict[str, bytes]) -> None:
    data = _file(values)
    assert parse(data[:4] + struct.pack("<I", 2) + data[8:], "x") == parse(data, "x")


def test_types_that_nobody_knows_are_read_but_not_located() -> None:
    data = build([], [entry("odd", [32], kind=99), entry("t", [8])])
    assert parse(data, "x").tensors["odd"] == TensorInfo(99, (32,), 0)
    assert list(parse(data, "x").stored(TYPES, only={"t"})) == ["t"]


def test_every_truncation_is_named(values: dict[str, bytes]) -> None:
    data = _file(values)
    _read(data)
    last = len(data) - (-nbytes(*TENSORS[-1][1:]) % 32)  # the padding at the end may be missing
    for end in range(last):
        with pytest.raises(CorruptFileError, match=r"^x\.gguf: "):
            _read(data[:end])


def test_every_truncation_of_gguf_py_s_header_is_named(written: bytes) -> None:
    end = written.index(b"b.weight") + len("b.weight") + 4 + 16 + 4 + 8
    parse(written[:end], "x.gguf")
    for size in range(end):
        with pytest.raises(CorruptFileError, match=r"^x\.gguf: "):
            parse(written[:size], "x.gguf")


def test_flipped_bytes_never_do_worse_than_an_error(values: dict[str, bytes]) -> None:
    data = _file(values)
    rng = np.random.default_rng(0)
    refused = 0
    for at in range(len(header_bytes(values, TENSORS))):
        edited = bytearray(data)
        edited[at] ^= 1 << rng.integers(8)
        try:
            _read(bytes(edited))
        except InputError:
            refused += 1
    assert refused > 100


LONG = "k" * 500 + "\n"
TWO = [entry("t", [8]), entry("u", [8])]
HOSTILE: list[tuple[str, bytes, type[AnyquantError], str]] = [
    ("empty", b"", CorruptFileError, "is empty, and so not a GGUF file"),
    ("random", bytes(range(256)) * 8, CorruptFileError, "is not a GGUF file: it does not begin with 'GGUF'"),
    ("other format", b"GGML" + bytes(100), CorruptFileError, "not a GGUF file"),
    ("short", b"GGUF\x03", CorruptFileError, "the version at byte 4 needs 4 bytes, the file ends at 5"),
    ("version", build([], version=1), InputError, "version 1 is not 2 or 3"),
    ("no version", build([], version=9), InputError, "version 9 is not 2 or 3"),
    ("big-endian", build([], version=0x03000000), InputError, "big-endian"),
    ("pairs", build([], data=0, kv=1 << 60), CorruptFileError, "truncated or damaged"),
    ("tensors", build([], tensors=1 << 60), CorruptFileError, "truncated .*the list of 1152921504606846976 tensors"),
    ("key length", build([struct.pack("<Q", 1 << 62)]), CorruptFileError, "truncated or damaged: a key at byte"),
    ("key text", build([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<I", 7) + b"\0"]), CorruptFileError,
     "a key at byte 32 is not UTF-8"),
    ("kind", build([pair("a", 13, b"")]), CorruptFileError, "a has the unknown value type 13"),
    ("array", build([pair("a", 9, array(4, 1 << 61))]), CorruptFileError, "truncated or damaged: a at byte"),
    ("array's end", build([pair("a", 9, array(4, 1 << 62))]), CorruptFileError, "truncated or damaged: a at byte"),
    ("strings", build([pair("a", 9, array(8, 1 << 40))]), CorruptFileError, "truncated or damaged: a at byte"),
    ("string's end", build([pair("a", 9, array(8, 2, text("b") + struct.pack("<Q", 1 << 63)))]), CorruptFileError,
     f"a at byte 58 needs {8 + (1 << 63)} bytes, the file ends at 352"),
    ("strings' end", build([pair("a", 9, array(8, 2, struct.pack("<Q", 4) + bytes(4)))], data=4), CorruptFileError,
     "a at byte 61 needs 8 bytes, the file ends at 68"),
    ("nested", build([pair("a", 9, array(9, 1) * 6)]), CorruptFileError, "unknown value type 9.*deeply nested"),
    ("nested count", build([pair("a", 9, array(9, 1 << 60))]), CorruptFileError, "truncated or damaged: a at byte"),
    ("twice", build([pair("a", 7, b"\0"), pair("a", 7, b"\0")]), CorruptFileError, "the key a appears twice"),
    ("long", build([pair(LONG, 7, b"\0"), pair(LONG, 7, b"\0")]), CorruptFileError, "the key k{80} appears twice"),
    ("line", build([pair("a\nb", 13, b"")]), CorruptFileError, r"a\\nb has the unknown value type 13"),
    ("dims", build([], [entry("t", [1] * 5)]), CorruptFileError, "t has 5 dimensions"),
    ("no dims", build([], [entry("t", [])]), CorruptFileError, r"the shape \[\]"),
    ("zero", build([], [entry("t", [0, 4])]), CorruptFileError, r"the shape \[4, 0\]"),
    ("blocks", build([], [entry("t", [33], kind=8)]), CorruptFileError, "Q8_0 is stored in blocks of 32"),
    ("type", build([], [entry("t", [4], kind=99)]), InputError, "t has the ggml type 99, which is not among F32, "),
    ("huge", build([], [entry("t", [1 << 62, 1 << 62])]), CorruptFileError, "truncated .*: t .F32 .* ends at byte"),
    ("offset", build([], [entry("t", [32], offset=1 << 63)]), CorruptFileError, "truncated .* ends at byte"),
    ("unaligned", build([], [entry("t", [8], offset=4)]), CorruptFileError, "begins at 4, not a multiple of 32"),
    ("overlap", build([], TWO), CorruptFileError, "u overlaps t"),
    ("same name", build([], [entry("t", [8]), entry("t", [8], offset=32)]), CorruptFileError, "tensor t appears twice"),
    ("alignment", build([pair("general.alignment", 4, struct.pack("<I", 48))]), CorruptFileError, "48 is not a power"),
    ("no alignment", build([pair("general.alignment", 4, bytes(4))]), CorruptFileError, "0 is not a power of two"),
    ("far alignment", build([pair("general.alignment", 10, struct.pack("<Q", 1 << 40))]), CorruptFileError, "power of"),
    ("alignment type", build([pair("general.alignment", 8, text("x"))]), CorruptFileError, "is 'x', expected int"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "kind", "message"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_hostile_files(content: bytes, kind: type[AnyquantError], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        _read(content)
    assert type(error.value) is kind
    assert str(error.value).startswith("x.gguf: ")
    assert error.value.exit_code == 3


def test_files_are_mapped_read_only(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "some").write_bytes(b"bytes")
    assert map_file(tmp_path / "empty") == b""
    mapped: Any = map_file(tmp_path / "some")
    assert mapped[:] == b"bytes"
    with pytest.raises(TypeError):
        mapped[0] = 1
    with pytest.raises(InputError, match=r"cannot read .*none\.gguf: No such file"):
        map_file(tmp_path / "none.gguf")
