"""The header reader, and what it says of llama.cpp's arithmetic."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from anyquant.errors import CorruptFileError, InputError
from anyquant.validation.arithmetic import gguf_arithmetic
from anyquant.validation.gguf_header import GGUFHeader, GGUFTensor, read_gguf_header


def write(path: Path) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 7)
    writer.add_bool("anyquant.allow_rounding", True)
    writer.add_string("anyquant.layout", "f16")
    writer.add_array("tokens", ["a", "bc", "ü"])
    writer.add_array("scores", [1.0, 2.0])
    writer.add_float64("third", 1 / 3)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.add_tensor("output.weight", np.zeros((4, 32), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    header = read_gguf_header(write(tmp_path / "a.gguf"))
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.block_count"] == 7
    assert header.metadata["third"] == 1 / 3
    assert "tokens" not in header.metadata
    assert header.tensors["token_embd.weight"] == GGUFTensor((32, 4), 0)
    assert header.tensors["output.weight"].type == 1


@pytest.mark.slow
def test_real_file_against_the_gguf_package(real_gguf: Path) -> None:
    import gguf

    header = read_gguf_header(real_gguf)
    expected = {
        t.name: (tuple(int(n) for n in t.shape), int(t.tensor_type)) for t in gguf.GGUFReader(real_gguf).tensors
    }
    assert {name: (t.shape, t.type) for name, t in header.tensors.items()} == expected


def test_every_truncation_is_a_clear_error(tmp_path: Path) -> None:
    data = write(tmp_path / "a.gguf").read_bytes()
    end = data.index(b"output.weight") + len("output.weight") + 4 + 16 + 4 + 8
    part = tmp_path / "part.gguf"
    for size in range(0, end, 7):
        part.write_bytes(data[:size])
        with pytest.raises((CorruptFileError, InputError)):
            read_gguf_header(part)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(4, struct.pack("<I", 9)), (8, struct.pack("<Q", 1 << 60)), (24, struct.pack("<Q", 1 << 62))],
)
def test_hostile_numbers(tmp_path: Path, offset: int, value: bytes) -> None:
    data = bytearray(write(tmp_path / "a.gguf").read_bytes())
    data[offset : offset + len(value)] = value
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    with pytest.raises(CorruptFileError, match="damaged GGUF header"):
        read_gguf_header(bad)


def test_not_gguf_and_not_there(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(CorruptFileError, match="not a GGUF file"):
        read_gguf_header(tmp_path / "x")
    with pytest.raises(InputError, match="cannot read"):
        read_gguf_header(tmp_path / "none.gguf")


def header(metadata: dict[str, object] | None = None, **types: int) -> GGUFHeader:
    names = {name.replace("__", "."): kind for name, kind in types.items()}
    tensors = {name: GGUFTensor((32,) if "norm" in name else (32, 4), kind) for name, kind in names.items()}
    return GGUFHeader(dict(metadata or {}), tensors)


def test_all_f32_is_an_fp32_path() -> None:
    found = gguf_arithmetic(header(token_embd__weight=0, blk__0__ffn_up__weight=0, output_norm__weight=0))
    assert found.kind == "fp32"


def test_a_private_type_with_a_float_head_is_an_fp32_path() -> None:
    assert gguf_arithmetic(header(token_embd__weight=0, blk__0__ffn_up__weight=36)).kind == "fp32"


@pytest.mark.parametrize("kind", [1, 2, 8, 14, 30, 39])
def test_stock_types_and_f16_round(kind: int) -> None:
    assert gguf_arithmetic(header(token_embd__weight=0, blk__0__ffn_up__weight=kind)).kind == "rounded"


def test_an_embedding_rounds_only_where_it_is_the_head() -> None:
    assert gguf_arithmetic(header(token_embd__weight=8, blk__0__ffn_up__weight=0)).kind == "rounded"
    assert gguf_arithmetic(header(token_embd__weight=8, output__weight=0)).kind == "fp32"


def test_recorded_rounding_relaxes_the_gate_and_is_said() -> None:
    types = {"token_embd__weight": 0}
    allowed = gguf_arithmetic(header({"anyquant.layout": "f16", "anyquant.allow_rounding": True}, **types))
    assert (allowed.kind, allowed.rounding) == ("rounded", "written with --allow-rounding")
    assert gguf_arithmetic(header({"anyquant.layout": "f16"}, **types)).rounding == "layout f16"
    assert (
        gguf_arithmetic(header({"anyquant.layout": "native", "anyquant.allow_rounding": False}, **types)).rounding == ""
    )
