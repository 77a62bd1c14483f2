"""Families: what llama.cpp's converter makes of a checkpoint must come back as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant.checkpoint import open_checkpoint

FAMILIES: list[tuple[str, bool, dict[str, Any]]] = [
    ("llama", True, {}),
    ("llama", False, {"attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    ("mistral", False, {}),
    ("qwen2", True, {}),
    ("qwen3", False, {}),
    ("gemma", True, {"head_dim": 32}),
    ("gemma2", True, {}),
    ("phi3", False, {}),
    ("gpt2", True, {"n_ctx": 256}),
]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5] * 4, "long_factor": [2.0, 4.5] * 4,
    "original_max_position_embeddings": 128, "partial_rotary_factor": 1.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.5}
SCALED: list[tuple[str, bool, dict[str, Any]]] = [
    ("llama", True, {"rope_parameters": LLAMA3}),
    ("llama", True, {"rope_parameters": LINEAR}),
    ("qwen3", True, {"rope_parameters": YARN}),
    ("phi3", False, {"rope_parameters": LONG, "original_max_position_embeddings": 128}),
    ("phi3", False, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
]


def bits(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32).view(np.uint32)


@pytest.mark.parametrize(("family", "tied", "settings"), FAMILIES)
def test_names_order_and_values_come_back(
    family: str,
    tied: bool,
    settings: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    convert: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint(family, tied=tied, **settings)
    original, read = open_checkpoint(str(folder)), open_checkpoint(str(convert(folder)))
    assert list(read.tensors) == list(original.tensors)
    assert read.aliases == original.aliases
    assert read.transposed == original.transposed
    assert read.matrices() == original.matrices()
    assert read.embeddings() == original.embeddings()
    for name, info in original.tensors.items():
        assert read.tensors[name].shape == info.shape
        expected = original.read(name)
        if family.startswith("gemma") and name.endswith("norm.weight"):
            # What adding 1 in the file rounded away does not come back.
            expected = (expected + np.float32(1)) - np.float32(1)
        assert np.array_equal(bits(read.read(name)), bits(expected)), name
        middle = slice(1, 6)
        assert np.array_equal(bits(read.read(name, middle)), bits(expected[middle])), name


@pytest.mark.parametrize(("family", "tied", "settings"), [*FAMILIES, *SCALED])
def test_the_config_means_the_same_model(
    family: str,
    tied: bool,
    settings: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    convert: Callable[..., Path],
) -> None:
    from transformers import AutoConfig

    folder = tiny_checkpoint(family, tied=tied, **settings)
    said = AutoConfig.from_pretrained(folder).to_dict()
    config = open_checkpoint(str(convert(folder))).config
    model_type = config["model_type"]
    read = AutoConfig.for_model(**config).to_dict()
    # No tokenizer was converted, hence no special tokens; the rest is about training, or a name.
    free = {"bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "dtype", "transformers_version",
            "_name_or_path", "architectures", "partial_rotary_factor"}  # fmt: skip
    if family == "mistral":
        # llama.cpp knows Mistral as llama, which lacks Mistral's sliding window and has optional biases.
        assert model_type == "llama"
        free |= {"model_type", "sliding_window", "attention_bias", "mlp_bias", "pretraining_tp"}
    different = {k: (said.get(k), read.get(k)) for k in said.keys() | read.keys() if said.get(k) != read.get(k)}
    assert {k: v for k, v in different.items() if k not in free} == {}
