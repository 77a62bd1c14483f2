"""Side files of GGUF models other than the real one: tokenizers of both kinds, and none."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anyquant.checkpoint import open_checkpoint
from anyquant.errors import InputError

GGUF = Callable[..., Path]
Tensors = dict[str, Any]


def sentencepiece_keys() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "ab"]
    return {
        "tokenizer__ggml__model": "llama",
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__scores": [-float(i) for i in range(len(tokens))],
        "tokenizer__ggml__token_type": [2, 3, 3, *[6] * 256, *[1] * 5],
        "tokenizer__ggml__bos_token_id": 1,
        "tokenizer__ggml__eos_token_id": 2,
        "tokenizer__ggml__eot_token_id": 5,
        "tokenizer__ggml__unknown_token_id": 0,
    }


@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_a_sentencepiece_tokenizer(
    arch: str, write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    path = write_gguf(tiny_tensors, arch=arch, **llama_keys, **sentencepiece_keys())
    folder = tmp_path / "side"
    open_checkpoint(str(path)).write_side_files(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("ab é", add_special_tokens=False).input_ids).strip() == "ab é"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    if arch == "llama":
        theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        assert tokenizer(["ab é", "", " a  b"]).input_ids == theirs(["ab é", "", " a  b"]).input_ids
        assert tokenizer("ab").input_ids[0] == 1
    # The token that ends a turn ends generation too.
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [2, 5]}


def test_a_file_without_tokenizer_says_so(
    write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "side"
    with caplog.at_level(logging.WARNING):
        open_checkpoint(str(write_gguf(tiny_tensors, **llama_keys))).write_side_files(folder)
    assert "model.gguf: holds no tokenizer" in caplog.text
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "generation_config.json", "source.gguf"]


def test_a_tokenizer_that_cannot_be_built_is_an_error(
    write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors, tmp_path: Path
) -> None:
    path = write_gguf(tiny_tensors, **llama_keys, tokenizer__ggml__model="rwkv", tokenizer__ggml__tokens=["a"])
    with pytest.raises(InputError, match=r"cannot build a tokenizer from its key-values .kind 'rwkv'"):
        open_checkpoint(str(path)).write_side_files(tmp_path / "side")
