"""The tables of names, both ways, and the order of rows."""

from __future__ import annotations

import numpy as np
import pytest

from anyquant.checkpoint.gguf_names import (
    MODEL_TYPES,
    ROPE_TENSORS,
    SUPPORTED_ARCHITECTURES,
    gguf_architecture,
    gguf_to_hf_name,
    hf_to_gguf_name,
    inverse_permutation,
    is_conv1d,
    layer_tensors,
    norm_offset,
    row_permutation,
)

CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}


@pytest.mark.parametrize("arch", SUPPORTED_ARCHITECTURES)
def test_names_go_both_ways(arch: str) -> None:
    names = [*layer_tensors(arch, 12), "output.weight", "blk.11.attn_output.bias"]
    translated = [gguf_to_hf_name(arch, name) for name in names]
    assert None not in translated
    assert len(set(translated)) == len(names)
    assert [hf_to_gguf_name(arch, str(name)) for name in translated] == names


@pytest.mark.parametrize("arch", SUPPORTED_ARCHITECTURES)
def test_names_are_those_that_the_gguf_package_maps(arch: str) -> None:
    import gguf

    code = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(code, 12)
    for name in layer_tensors(arch, 12):
        hf = gguf_to_hf_name(arch, name)
        assert hf is not None
        assert table.get_name(hf, try_suffixes=(".weight",)) == name


@pytest.mark.parametrize(
    ("arch", "hf", "gguf"),
    [
        ("gpt2", "h.3.attn.c_attn.weight", "blk.3.attn_qkv.weight"),
        ("gpt2", "wte.weight", "token_embd.weight"),
        ("gpt2", "ln_f.bias", "output_norm.bias"),
        ("mistral", "layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"),
        ("llama", "norm.weight", "output_norm.weight"),
        ("qwen2", "model.layers.1.self_attn.k_proj.bias", "blk.1.attn_k.bias"),
    ],
)
def test_names_without_prefix(arch: str, hf: str, gguf: str) -> None:
    assert hf_to_gguf_name(arch, hf) == gguf


@pytest.mark.parametrize(
    "name", ["blk.0.ffn_gate_exps.weight", "blk.0.attn_q.scale", "other.weight", "x", *ROPE_TENSORS]
)
def test_unknown_gguf_names(name: str) -> None:
    assert gguf_to_hf_name("llama", name) is None
    assert gguf_to_hf_name("rwkv7", "token_embd.weight") is None


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.experts.0.w1.weight", "model.layers.0.x.scale", "model.other.weight", "x"]
)
def test_unknown_hugging_face_names(name: str) -> None:
    assert hf_to_gguf_name("llama", name) is None
    assert hf_to_gguf_name("rwkv7", "model.norm.weight") is None


def test_architectures() -> None:
    assert {gguf_architecture(t) for t in MODEL_TYPES} == set(SUPPORTED_ARCHITECTURES)
    assert gguf_architecture("rwkv7") is None
    assert layer_tensors("rwkv7", 2) == []


def test_row_permutation_is_the_converters() -> None:
    rows = np.arange(32)
    order = row_permutation("llama", "model.layers.0.self_attn.q_proj.weight", CONFIG)
    assert order is not None
    # The first head of 8 rows: halves 0..3 and 4..7 are interleaved.
    assert rows[order][:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert np.array_equal(rows[order][inverse_permutation(order)], rows)
    keys = row_permutation("mistral", "model.layers.0.self_attn.k_proj.bias", CONFIG)
    assert keys is not None
    assert keys.size == 16
    alone = row_permutation("llama", "layers.0.self_attn.k_proj.weight", {"num_attention_heads": 4, "head_dim": 6})
    assert alone is not None
    assert alone.size == 24


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("llama", "model.layers.0.self_attn.v_proj.weight"),
        ("llama", "model.layers.0.self_attn.q_norm.weight"),
        ("qwen2", "model.layers.0.self_attn.q_proj.weight"),
        ("rwkv7", "model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_rows_that_stay(arch: str, name: str) -> None:
    assert row_permutation(arch, name, CONFIG) is None


def test_offsets_and_transposes() -> None:
    assert norm_offset("gemma2", "model.layers.0.input_layernorm.weight") == 1.0
    assert norm_offset("gemma", "model.norm.weight") == 1.0
    assert norm_offset("gemma", "model.embed_tokens.weight") == 0.0
    assert norm_offset("llama", "model.norm.weight") == 0.0
    assert is_conv1d("gpt2", "transformer.h.0.mlp.c_proj.weight")
    assert not is_conv1d("gpt2", "transformer.h.0.mlp.c_proj.bias")
    assert not is_conv1d("gpt2", "transformer.wte.weight")
    assert not is_conv1d("llama", "h.0.mlp.c_proj.weight")
