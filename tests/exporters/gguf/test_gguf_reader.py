"""The reader on files that are not ours, are damaged, or are meant to harm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from anyquant.errors import CorruptFileError, InputError, MissingDependency, UnknownArchitecture
from anyquant.exporters.gguf import GGUFExporter, container, reader

HEADS = {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 1, "llama.embedding_length": 8}


@pytest.fixture
def write(raw_value: Callable[[object], bytes], tmp_path: Path) -> Callable[..., Path]:
    """write(tensor name, values, **key-values) -> a GGUF file of one tensor."""

    def make(name: str, values: np.ndarray, keys: dict[str, object], architecture: str = "llama") -> Path:
        encoded = {key: raw_value(value) for key, value in {"general.architecture": architecture, **keys}.items()}
        path = tmp_path / "x.gguf"
        path.write_bytes(container.header_bytes(encoded, [(name, "F32", values.shape)]) + values.tobytes())
        return path

    return make


def _read(path: Path) -> dict[str, np.ndarray]:
    return dict(GGUFExporter().read(path))


def test_a_file_of_somebody_else(write: Callable[..., Path]) -> None:
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    found = _read(write("blk.3.attn_q.weight", values, HEADS))
    # Rows of the file alternate between the halves of a head of 4.
    expected = values.reshape(2, 2, 2, 8).swapaxes(1, 2).reshape(8, 8)
    np.testing.assert_array_equal(found["model.layers.3.self_attn.q_proj.weight"], expected)


def test_rotary_factors_are_no_tensor_of_a_checkpoint(write: Callable[..., Path]) -> None:
    assert _read(write("rope_freqs.weight", np.ones(4, np.float32), {})) == {}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "head counts are missing or odd"),
        ({**HEADS, "llama.attention.head_count": 0}, "head counts are missing or odd"),
        ({**HEADS, "llama.attention.head_count": ["a"]}, "head counts are missing or odd"),
        ({**HEADS, "llama.attention.key_length": 16}, "the heads in the metadata make 32"),
        ({**HEADS, "anyquant.names": "{"}, "not a JSON object of names"),
        ({**HEADS, "anyquant.names": '{"a": 1}'}, "not a JSON object of names"),
        ({**HEADS, "anyquant.names": 3}, "not a JSON object of names"),
    ],
)
def test_metadata_that_contradicts_the_tensors(
    write: Callable[..., Path], keys: dict[str, object], message: str
) -> None:
    with pytest.raises(CorruptFileError, match=message):
        _read(write("blk.0.attn_q.weight", np.zeros((8, 8), np.float32), keys))


@pytest.mark.parametrize(("architecture", "name"), [("rwkv", "blk.0.attn_q.weight"), ("llama", "odd.weight")])
def test_names_that_are_not_known(write: Callable[..., Path], architecture: str, name: str) -> None:
    with pytest.raises(UnknownArchitecture, match="has no known name"):
        _read(write(name, np.zeros((8, 8), np.float32), {}, architecture))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        _read(tmp_path / "absent.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CorruptFileError, match="is empty"):
        _read(tmp_path / "empty.gguf")
    (tmp_path / "text.gguf").write_text("hello, world")
    with pytest.raises(InputError, match="not a GGUF file"):
        _read(tmp_path / "text.gguf")


def test_truncated_files(write: Callable[..., Path]) -> None:
    path = write("output_norm.weight", np.ones(64, np.float32), HEADS)
    data = path.read_bytes()
    assert list(_read(path)) == ["model.norm.weight"]
    for end in [5, 30, 100, len(data) - 257, len(data) - 256, len(data) - 1]:
        path.write_bytes(data[:end])
        with pytest.raises(CorruptFileError, match="truncated"):
            _read(path)


def test_what_gguf_py_alone_refuses_is_a_damaged_file_too(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("output_norm.weight", np.ones(4, np.float32), {"x.empty": []})

    def refuse(self: object, path: Path) -> None:
        raise IndexError("odd")

    monkeypatch.setattr("gguf.GGUFReader.__init__", refuse)
    with pytest.raises(CorruptFileError, match="gguf-py cannot read it: IndexError: odd"):
        _read(path)


def test_without_gguf_py(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependency, match=r"anyquant\[gguf\]"):
        next(reader.read_tensors(write("output_norm.weight", np.ones(4, np.float32), {})))
