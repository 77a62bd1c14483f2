"""Headers that nothing contradicts at first sight, by which there would be other values, other names, or fewer rows."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant.errors import CorruptFileError
from anyquant.exporters.gguf import GGUFExporter, container
from anyquant.gguf_container import string

KEYS = {
    "general.architecture": "llama",
    "llama.attention.head_count": 4,
    "llama.embedding_length": 32,
    "llama.rope.dimension_count": 8,
}
TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "token_embd.weight": ("F16", (6, 32)),
    "blk.0.attn_q.weight": ("F32", (32, 32)),
    "blk.0.ffn_norm.weight": ("F32", (32,)),
    "output_norm.weight": ("F32", (32,)),
}


def description(name: str, kind: str, shape: tuple[int, ...]) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QI", len(shape), *reversed(shape), container.TYPE_IDS[kind])


@pytest.fixture
def read(raw_value: Callable[[object], bytes], tmp_path: Path) -> Callable[..., dict[str, np.ndarray]]:
    """read({key: value}, {tensor: (type, shape)}, end): of a file where these are others, and bytes follow."""

    def make(
        keys: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]], end: int = 0
    ) -> dict[str, np.ndarray]:
        values = {key: raw_value(value) for key, value in {**KEYS, **keys}.items()}
        data = container.header_bytes(values, [(name, *about) for name, about in TENSORS.items()])
        for name, about in tensors.items():
            data = data.replace(description(name, *TENSORS[name]), description(name, *about))
        sizes = [container.nbytes(*about) for about in TENSORS.values()]
        (tmp_path / "x.gguf").write_bytes(data + bytes(sum(sizes) + end))
        return dict(GGUFExporter().read(tmp_path / "x.gguf"))

    return make


def test_the_file_is_read_where_nothing_is_false(read: Callable[..., dict[str, np.ndarray]]) -> None:
    shapes = [values.shape for values in read({}, {}).values()]
    assert shapes == [shape for _, shape in TENSORS.values()]


@pytest.mark.parametrize("heads", [2, 8])
def test_heads_that_make_as_many_rows(read: Callable[..., dict[str, np.ndarray]], heads: int) -> None:
    with pytest.raises(CorruptFileError, match=f"a head has {32 // heads} rows by the metadata, and rotates 8"):
        read({"llama.attention.head_count": heads}, {})


@pytest.mark.parametrize(
    ("tensors", "end", "message"),
    [
        ({"token_embd.weight": ("F16", (5, 32))}, 0, "'blk.0.attn_q.weight' begins at byte .*, the tensors before end"),
        ({"blk.0.ffn_norm.weight": ("F16", (32,))}, 0, "'output_norm.weight' begins at byte"),
        ({"output_norm.weight": ("F16", (32,))}, 0, "the tensors end at byte .*, the file at"),
        ({}, 1, "the tensors end at byte"),
    ],
)
def test_tensors_do_not_fill_the_file(
    read: Callable[..., dict[str, np.ndarray]],
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    end: int,
    message: str,
) -> None:
    with pytest.raises(CorruptFileError, match=message):
        read({}, tensors, end)


def test_two_tensors_of_one_name(read: Callable[..., dict[str, np.ndarray]]) -> None:
    """A dictionary of them would lack one without a word."""
    names = '{"output_norm.weight": "model.embed_tokens.weight"}'
    with pytest.raises(CorruptFileError, match=r"'output_norm.weight' and 'token_embd.weight' are both 'model\.embed"):
        read({"anyquant.names": names}, {})


def test_names_in_ten_thousand_brackets(read: Callable[..., dict[str, np.ndarray]]) -> None:
    with pytest.raises(CorruptFileError, match="is not a JSON object of names"):
        read({"anyquant.names": "[" * 10000}, {})


def test_scales_that_are_no_numbers(raw_value: Callable[[object], bytes], tmp_path: Path) -> None:
    """Values are not numbers then, and nothing is said of gguf-py's arithmetic."""
    about = [("output.weight", "Q8_0", (1, 32))]
    header = container.header_bytes({"general.architecture": raw_value("llama")}, about)
    for scale, is_expected in ((np.nan, np.isnan), (np.inf, np.isinf)):
        codes = np.full(32, 3, np.int8)
        codes[:3] = [0, 127, -128]
        (tmp_path / "x.gguf").write_bytes(header + np.float16(scale).tobytes() + codes.tobytes())
        [(_, values)] = GGUFExporter().read(tmp_path / "x.gguf")
        assert is_expected(values[:, 1:]).all()
        assert np.isnan(values[0, 0])  # 0 times infinity
