"""Damaged, hostile and unsupported GGUF files: one clear error each, never a crash, a loop or a huge allocation."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyquant.checkpoint import open_checkpoint
from anyquant.checkpoint.gguf_file import GGUFFile
from anyquant.errors import AnyquantError, CorruptFileError, InputError, MissingDependency, UnknownArchitecture

GGUF = Callable[..., Path]
Tensors = dict[str, Any]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def build(*pairs: bytes, tensor: bytes = b"") -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, bool(tensor), len(pairs)) + b"".join(pairs) + tensor + bytes(512)


HOSTILE: list[tuple[str, bytes, type[AnyquantError], str]] = [
    ("empty", b"", CorruptFileError, "is empty"),
    ("short", b"GGUF\x03", CorruptFileError, "the version at byte 4 needs 4 bytes, the file ends at 5"),
    ("type", build(tensor=text("t") + struct.pack("<IQIQ", 1, 32, 36, 0)), InputError, 
     "the tensor type 36, which the installed gguf"),
    ("split", build(pair("split.count", 2, struct.pack("<H", 3))), InputError, "one part of 3.*gguf-split --merge"),
    ("no architecture", build(), CorruptFileError, "has no general.architecture"),
    ("architecture", build(pair("general.architecture", 8, text("rwkv7"))), UnknownArchitecture, "rwkv7.*llama, qw"),
    ("no settings", build(pair("general.architecture", 8, text("llama"))), CorruptFileError, "no tensor token_embd"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "kind", "message"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_hostile_files(content: bytes, kind: type[AnyquantError], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(kind, match=message) as error:
        open_checkpoint(str(path))
    assert str(error.value).startswith("bad.gguf: ")
    assert error.value.exit_code == 3


def test_every_truncation_is_noticed(write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors) -> None:
    path = write_gguf(tiny_tensors, **llama_keys)
    content = path.read_bytes()
    header = min(t.offset for t in GGUFFile(path).tensors.values())
    for length in [*range(0, header, 37), header, header + 1, len(content) - 200, len(content) - 129]:
        path.write_bytes(content[:length])
        with pytest.raises(CorruptFileError):
            open_checkpoint(str(path))


@given(changes=st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_header_bytes_never_crash(
    changes: list[tuple[int, int]], write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    original = tmp_path / "original"
    if not original.exists():
        original.write_bytes(write_gguf(tiny_tensors, **llama_keys).read_bytes())
    content = bytearray(original.read_bytes())
    for at, value in changes:
        content[at] = value
    path.unlink(missing_ok=True)  # an earlier example may still have it mapped
    path.write_bytes(content)
    with contextlib.suppress(InputError):  # any other exception fails the test
        checkpoint = open_checkpoint(str(path))
        for name in checkpoint.tensors:
            checkpoint.read(name)


def test_values_of_every_type_are_decoded(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "values.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, Any] = {"i": -5, "f": 0.25, "s": "né", "b": True, "l": [1, 2, 3], "t": ["a", "", "c"]}
    writer.add_int64("i", -5)
    writer.add_float64("f", 0.25)
    writer.add_string("s", "né")
    writer.add_bool("b", True)
    writer.add_array("l", [1, 2, 3])
    writer.add_array("t", ["a", "", "c"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    nested = struct.pack("<IQ", 9, 2) + (struct.pack("<IQ", 5, 2) + struct.pack("<ii", 1, -1)) * 2
    content = path.read_bytes()[24:].rstrip(b"\0")
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 8) + content + pair("n", 9, nested))
    file = GGUFFile(path)
    assert {key: file.get(key) for key in values} == values
    assert file.get("n") == [[1, -1], [1, -1]]
    assert file.header.values["n"] == struct.pack("<I", 9) + nested
    assert file.get("i", float) == -5.0
    again = tmp_path / "again.gguf"
    again.write_bytes(file.header_only())
    assert GGUFFile(again).header.values == file.header.values
    before, after = gguf.GGUFReader(path), gguf.GGUFReader(again)
    keys = [key for key in before.fields if not key.startswith("GGUF.")]
    assert [key for key in after.fields if not key.startswith("GGUF.")] == keys
    assert set(keys) == set(file.header.values)
    for key in keys:
        assert after.fields[key].types == before.fields[key].types, key
        assert after.fields[key].contents() == before.fields[key].contents(), key


CONTRADICTIONS: list[tuple[dict[str, Any], type[AnyquantError], str]] = [
    ({"block_count": 2}, CorruptFileError, "2 layers of llama need 9 tensors .* the first blk.1.attn_norm.weight"),
    ({"block_count": 1 << 31}, CorruptFileError, "need 1 tensors that the file lacks"),
    ({"block_count": 0}, CorruptFileError, "block_count is 0, expected a positive integer"),
    ({"attention__head_count": [4, 2]}, InputError, "head_count differs from layer to layer"),
    ({"attention__head_count": 3}, CorruptFileError, "32 rows of queries for 3 heads"),
    ({"attention__key_length": 16}, CorruptFileError, "16 for keys, 8 for values"),
    ({"attention__head_count_kv": 4}, CorruptFileError, "attn_k.weight has 16 rows, 4 heads of 8 need 32"),
    ({"attention__layer_norm_rms_epsilon": float("nan")}, CorruptFileError, "epsilon is nan, expected a number"),
    ({"attention__layer_norm_rms_epsilon": "x"}, CorruptFileError, "epsilon is 'x', expected float"),
    ({"rope__dimension_count": 4}, InputError, "rotates 4 of 8 columns"),
    ({"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0}, InputError, "rotary scaling 'longrope'"),
    ({"rope__scaling__type": "yarn"}, InputError, "factor 0.0"),
    ({"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0, "rope__scaling__yarn_log_multiplier": 0.1},
     InputError, "yarn_log_multiplier"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), CONTRADICTIONS)
def test_contradicting_metadata(
    change: dict[str, Any], kind: type[AnyquantError], message: str, write_gguf: GGUF, tiny_tensors: Tensors,
    llama_keys: Tensors,
) -> None:  # fmt: skip
    with pytest.raises(kind, match=message):
        open_checkpoint(str(write_gguf(tiny_tensors, **{**llama_keys, **change})))


def test_equal_values_per_layer_count_as_one(write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors) -> None:
    checkpoint = open_checkpoint(str(write_gguf(tiny_tensors, **{**llama_keys, "attention__head_count_kv": [2, 2]})))
    assert checkpoint.config["num_key_value_heads"] == 2


def test_unknown_tensors_are_named(write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors) -> None:
    experts = {f"blk.0.ffn_{p}_exps.weight": np.ones((2, 8, 32), np.float32) for p in ("gate", "up", "down")}
    with pytest.raises(InputError, match=r"3 tensors are not part of a llama model: blk\.0\.ffn_gate_exps\.weight, "):
        open_checkpoint(str(write_gguf({**tiny_tensors, **experts}, **llama_keys)))


def test_tensors_beyond_the_layers_are_refused(write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors) -> None:
    tensors = {**tiny_tensors, "blk.7.attn_norm.weight": np.ones(32, np.float32)}
    with pytest.raises(CorruptFileError, match=r"blk\.7\.attn_norm\.weight lies beyond the 1 layers"):
        open_checkpoint(str(write_gguf(tensors, **llama_keys)))


@pytest.mark.parametrize(
    ("factors", "kind", "message"),
    [
        (np.array([1, 2, 3, 4], np.float32), InputError, "do not follow Llama 3's rule"),
        (np.array([1, 1, 1, -1], np.float32), CorruptFileError, "not positive numbers"),
        (np.ones((2, 2), np.float32), CorruptFileError, r"is F32 \[2, 2\], expected F32 \[n\]"),
    ],
)
def test_rotary_factors_that_cannot_be_expressed(
    factors: np.ndarray, kind: type[AnyquantError], message: str, write_gguf: GGUF, tiny_tensors: Tensors,
    llama_keys: Tensors,
) -> None:  # fmt: skip
    with pytest.raises(kind, match=message):
        open_checkpoint(str(write_gguf({**tiny_tensors, "rope_freqs.weight": factors}, **llama_keys)))


def test_rotary_factors_of_one_mean_nothing(write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors) -> None:
    tensors = {**tiny_tensors, "rope_freqs.weight": np.ones(4, np.float32)}
    checkpoint = open_checkpoint(str(write_gguf(tensors, **llama_keys)))
    assert "rope_scaling" not in checkpoint.config
    assert not [name for name in checkpoint.tensors if "rope" in name]


def test_long_factors_belong_to_phi3(write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors) -> None:
    tensors = {**tiny_tensors, "rope_factors_long.weight": np.ones(4, np.float32)}
    with pytest.raises(CorruptFileError, match="must come together, in a phi3 model"):
        open_checkpoint(str(write_gguf(tensors, **llama_keys)))


def test_without_the_gguf_package(
    write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    path = write_gguf(tiny_tensors, **llama_keys)
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(MissingDependency, match=r"pip install 'anyquant\[gguf\]'") as error:
        open_checkpoint(str(path))
    assert error.value.exit_code == 5
