"""The GGUF reader on the real model and on hand-made files: values, raw blocks, non-finite weights, side files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.checkpoint import open_checkpoint
from anyquant.checkpoint.gguf_names import inverse_permutation, row_permutation
from anyquant.errors import InputError, NonFiniteError

GGUF = Callable[..., Path]
Tensors = dict[str, Any]


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


@pytest.fixture(scope="module")
def real(real_gguf: Path) -> Any:
    return open_checkpoint(str(real_gguf))


def test_real_model_names_and_order_are_those_of_the_state_dict(real: Any) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**real.config))
    state = model.state_dict()
    assert [name for name in state if name not in real.aliases] == list(real.tensors)
    assert {name: tuple(state[name].shape) for name in real.tensors} == {n: t.shape for n, t in real.tensors.items()}
    assert real.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert len(real.matrices()) == 210
    assert real.embeddings() == ["model.embed_tokens.weight"]


@pytest.mark.slow
def test_real_model_is_what_transformers_reads(real: Any, real_gguf: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**real.config))
    loaded = load_gguf_checkpoint(str(real_gguf), return_tensors=True, model_to_load=model)
    assert set(loaded["tensors"]) == set(real.tensors)
    for name, values in loaded["tensors"].items():
        assert np.array_equal(bits(values.numpy()), bits(real.read(name))), name

    config = loaded["config"]
    for key in ("_model_name_or_path", "unk_token_id"):
        del config[key]
    assert np.float32(config.pop("rms_norm_eps")) == np.float32(real.config["rms_norm_eps"])
    assert {key: real.config.get(key) for key in config} == config


def test_real_model_raw_blocks_hold_the_same_values(real: Any) -> None:
    for name in ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.k_proj.weight",
                 "model.layers.3.mlp.down_proj.weight", "model.norm.weight"):  # fmt: skip
        raw = real.raw(name)
        raw.check(name)
        assert (raw.spec.kind, getattr(raw.spec, "type", "F32")) in (("ggml", "Q4_1"), ("dense", "F32"))
        assert np.array_equal(bits(ir.dequantize(raw)), bits(real.read(name))), name


def test_real_model_row_slices(real: Any) -> None:
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        whole = real.read(name)
        for rows in (slice(0, 1), slice(70, 200), slice(570, None)):
            part = real.read(name, rows)
            assert part.flags.c_contiguous
            assert part.dtype == np.float32
            assert np.array_equal(bits(part), bits(whole[rows]))


@pytest.mark.slow
def test_side_files_of_the_real_model(real: Any, real_gguf: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.reader import read_gguf_metadata

    real.write_side_files(tmp_path)
    arrays = tuple(f"tokenizer.ggml.{key}" for key in ("tokens", "merges", "token_type"))
    theirs, _ = read_gguf_metadata(str(real_gguf), arrays)
    ours, tensors = read_gguf_metadata(str(tmp_path / "source.gguf"), arrays)
    assert tensors == ()
    assert len(theirs["tokenizer.ggml.tokens"]) == 49152
    assert list(ours.items()) == list(theirs.items())
    assert json.loads((tmp_path / "config.json").read_text()) == real.config
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2
    }  # fmt: skip
    made = AutoTokenizer.from_pretrained(tmp_path)
    expected = AutoTokenizer.from_pretrained(real_gguf.parent, gguf_file=real_gguf.name)
    probe = "Hello 12345 world! Grüße, 你好 <|im_start|> мир 🙂\n\n  x\t'll"
    assert made(probe).input_ids == expected(probe).input_ids
    assert made.decode(made(probe).input_ids) == probe
    assert made.chat_template == expected.chat_template
    assert made.special_tokens_map == expected.special_tokens_map
    written = "".join((tmp_path / f).read_text() for f in ("tokenizer_config.json", "config.json"))
    assert str(tmp_path) not in written


def test_fingerprint_follows_contents(write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors) -> None:
    first = open_checkpoint(str(write_gguf(tiny_tensors, **llama_keys))).fingerprint()
    assert open_checkpoint(str(write_gguf(tiny_tensors, **llama_keys))).fingerprint() == first
    tiny_tensors["output_norm.weight"][3] += 1
    assert open_checkpoint(str(write_gguf(tiny_tensors, **llama_keys))).fingerprint() != first


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
def test_quantized_rows_are_unpermuted_with_their_blocks(
    kind: str, write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors
) -> None:
    import gguf

    name, theirs = "model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight"
    code = gguf.GGMLQuantizationType[kind]
    blocks = gguf.quants.quantize(tiny_tensors[theirs], code)
    checkpoint = open_checkpoint(str(write_gguf({**tiny_tensors, theirs: (blocks, kind)}, **llama_keys)))
    order = row_permutation("llama", name, checkpoint.config)
    assert order is not None
    assert not np.array_equal(order, np.arange(16))
    expected = gguf.quants.dequantize(blocks, code)[inverse_permutation(order)]
    assert np.array_equal(bits(checkpoint.read(name)), bits(expected))
    raw = checkpoint.raw(name)
    assert raw.spec == ir.GGMLSpec((16, 32), kind)
    assert np.array_equal(raw.arrays[".blocks"], blocks[inverse_permutation(order)])


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision_tensors_keep_their_bits(
    kind: str, write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors
) -> None:
    theirs = "blk.0.ffn_up.weight"
    if kind == "F16":
        stored: Any = tiny_tensors[theirs].astype(np.float16)
        expected, pattern = stored.astype(np.float32), stored
    else:
        pattern = (tiny_tensors[theirs].view(np.uint32) >> 16).astype(np.uint16)
        stored = (pattern.view(np.uint8), "BF16")
        expected = (pattern.astype(np.uint32) << 16).view(np.float32)
    checkpoint = open_checkpoint(str(write_gguf({**tiny_tensors, theirs: stored}, **llama_keys)))
    name = "model.layers.0.mlp.up_proj.weight"
    assert checkpoint.tensors[name].dtype == kind
    assert checkpoint.tensors[name].nbytes == 64 * 32 * 2
    raw = checkpoint.raw(name)
    assert raw.spec == ir.DenseSpec((64, 32), kind)
    assert np.array_equal(raw.arrays[".dense"], pattern)
    assert np.array_equal(bits(checkpoint.read(name)), bits(expected))


def test_a_type_beyond_the_ir_becomes_f32_with_a_warning(
    write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    import gguf

    # gguf-py reads NVFP4, but does not write it: any bytes whose scales are finite.
    length, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.NVFP4]
    rows, columns = tiny_tensors["blk.0.ffn_down.weight"].shape
    blocks = np.random.default_rng(0).integers(0, 64, (rows, columns // length * size), np.uint8)
    norm = gguf.quants.quantize(tiny_tensors["blk.0.ffn_norm.weight"], gguf.GGMLQuantizationType.Q8_0)
    tensors = {**tiny_tensors, "blk.0.ffn_down.weight": (blocks, "NVFP4"), "blk.0.ffn_norm.weight": (norm, "Q8_0")}
    checkpoint = open_checkpoint(str(write_gguf(tensors, **llama_keys)))
    for name, kind in (
        ("model.layers.0.mlp.down_proj.weight", "NVFP4"),
        ("model.layers.0.post_attention_layernorm.weight", "Q8_0"),
    ):
        with caplog.at_level(logging.WARNING):
            raw = checkpoint.raw(name)
        assert f"{name} is {kind}, kept as F32" in caplog.text
        assert raw.spec == ir.DenseSpec(checkpoint.tensors[name].shape, "F32")
        assert np.array_equal(bits(raw.arrays[".dense"]), bits(checkpoint.read(name)))
        assert np.array_equal(bits(checkpoint.read(name, slice(3, 9))), bits(checkpoint.read(name)[3:9]))


def test_a_type_without_a_dequantizer_is_refused(write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors) -> None:
    blocks = np.zeros((64, 40), np.uint8)
    path = write_gguf({**tiny_tensors, "blk.0.ffn_up.weight": (blocks, "Q8_1")}, **llama_keys)
    with pytest.raises(InputError, match=r"mlp\.up_proj\.weight is Q8_1, which the gguf package cannot dequantize"):
        open_checkpoint(str(path))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_floats_are_named_in_the_orientation_of_the_ir(
    bad: float, write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors
) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    order = row_permutation("llama", name, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8})
    assert order is not None
    tiny_tensors["blk.0.attn_k.weight"][int(np.flatnonzero(order == 5)[0]), 7] = bad
    tiny_tensors["blk.0.attn_k.weight"][int(np.flatnonzero(order == 9)[0]), 0] = bad
    checkpoint = open_checkpoint(str(write_gguf(tiny_tensors, **llama_keys)))
    for read in (checkpoint.read, checkpoint.raw):
        with pytest.raises(NonFiniteError) as error:
            read(name)
        assert (error.value.tensor, error.value.index, error.value.count) == (name, (5, 7), 2)
        assert "model.gguf (there blk.0.attn_k.weight)" in str(error.value)
    assert checkpoint.read(name, slice(0, 5)).shape == (5, 32)
    with pytest.raises(NonFiniteError, match="2 non-finite values"):
        checkpoint.read(name, slice(9, 10))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nonfinite_block_scale_is_found(
    bad: float, write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors
) -> None:
    import gguf

    blocks = gguf.quants.quantize(tiny_tensors["blk.0.ffn_down.weight"], gguf.GGMLQuantizationType.Q8_0)
    blocks[11, 34:36] = np.array([bad], np.float16).view(np.uint8)  # the scale of the second block of row 11
    blocks[11, 36:68] = 1
    path = write_gguf({**tiny_tensors, "blk.0.ffn_down.weight": (blocks, "Q8_0")}, **llama_keys)
    checkpoint = open_checkpoint(str(path))
    for read in (checkpoint.read, checkpoint.raw):
        with pytest.raises(NonFiniteError) as error:
            read("model.layers.0.mlp.down_proj.weight")
        assert (error.value.index, error.value.count) == ((11, 32), 32)


def test_gemma_norms_lose_their_one(tiny_checkpoint: Callable[..., Path], convert: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(convert(tiny_checkpoint("gemma2"))))
    raw = checkpoint.raw("model.norm.weight")
    assert raw.spec == ir.DenseSpec((64,), "F32")
    assert abs(float(raw.arrays[".dense"].mean())) < 0.2
    assert np.array_equal(raw.arrays[".dense"], checkpoint.read("model.norm.weight"))


def test_an_alias_reads_as_its_target(write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors) -> None:
    checkpoint = open_checkpoint(str(write_gguf(tiny_tensors, **llama_keys)))
    assert np.array_equal(checkpoint.read("lm_head.weight"), tiny_tensors["token_embd.weight"])
    with pytest.raises(KeyError, match="no tensor 'nothing'"):
        checkpoint.read("nothing")


def test_a_stored_head_is_no_alias(write_gguf: GGUF, tiny_tensors: Tensors, llama_keys: Tensors) -> None:
    tensors = {**tiny_tensors, "output.weight": tiny_tensors["token_embd.weight"]}
    checkpoint = open_checkpoint(str(write_gguf(tensors, **llama_keys)))
    assert checkpoint.aliases == {}
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.embeddings() == ["model.embed_tokens.weight", "lm_head.weight"]
    assert list(checkpoint.tensors)[-1] == "lm_head.weight"
