"""Hugging Face folders: order, values, shards, tying, Conv1D, experts, side files, refusals."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.checkpoint import open_checkpoint
from anyquant.errors import CorruptFileError, InputError, NonFiniteError

Tiny = Callable[..., Path]
BITS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


def save(folder: Path, tensors: dict[str, Any], file: str = "model.safetensors", **config: Any) -> Path:
    """A folder of torch tensors or arrays."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file({name: torch.as_tensor(value).contiguous() for name, value in tensors.items()}, folder / file)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def small(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {
        "model.embed_tokens.weight": (6, 4),
        "model.layers.0.mlp.up_proj.weight": (5, 4),
        "model.norm.weight": (4,),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [
        ("llama", True, "float32"),
        ("qwen2", False, "bfloat16"),
        ("qwen3", True, "float16"),
        ("gemma2", True, "bfloat16"),
        ("phi3", False, "float32"),
        ("gpt2", True, "float32"),
        ("gpt2", False, "float64"),
    ],
)
def test_families(family: str, tied: bool, dtype: str, tiny_checkpoint: Tiny) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(family, tied=tied, dtype=dtype)
    checkpoint = open_checkpoint(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    state = model.state_dict()
    assert (checkpoint.kind, checkpoint.name) == ("huggingface", folder.name)
    assert list(checkpoint.tensors) == [name for name in state if name not in checkpoint.aliases]
    assert set(checkpoint.aliases) == ({"lm_head.weight"} if tied else set())
    for name, values in state.items():
        expected = values.T if name in checkpoint.transposed else values
        got = checkpoint.read(name)
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
        assert np.array_equal(got, expected.to(torch.float32).numpy()), name
        assert np.array_equal(checkpoint.read(name, slice(1, 5)), got[1:5])
        if name in checkpoint.tensors:
            info, raw = checkpoint.tensors[name], checkpoint.raw(name)
            raw.check(name)
            assert raw.spec == ir.DenseSpec(info.shape, info.dtype)
            assert info.shape == tuple(expected.shape)
            assert info.nbytes == raw.spec.nbytes
            assert np.array_equal(raw.arrays[".dense"].view(BITS[info.dtype]).shape, info.shape)
            assert np.array_equal(ir.dequantize(raw), got)
    linear = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    ]
    assert sorted(checkpoint.matrices()) == sorted(linear)
    head = [] if tied else ["lm_head.weight"]
    assert checkpoint.embeddings()[1:] == head
    assert checkpoint.transposed == frozenset(n for n in linear if family == "gpt2")


def test_shards_hold_what_one_file_holds(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    whole, sharded = open_checkpoint(str(tiny_llama)), open_checkpoint(str(tmp_path))
    assert list(sharded.tensors.items()) == list(whole.tensors.items())
    assert sharded.aliases == whole.aliases
    for name in whole.tensors:
        assert np.array_equal(whole.read(name), sharded.read(name))
    assert whole.fingerprint() != sharded.fingerprint()

    victim = max(tmp_path.glob("*.safetensors"))
    content = victim.read_bytes()
    victim.unlink()
    with pytest.raises(InputError, match=f"the shard {victim.name} is missing"):
        open_checkpoint(str(tmp_path))
    victim.write_bytes(content[:-3])
    with pytest.raises(CorruptFileError, match="truncated: its header promises"):
        open_checkpoint(str(tmp_path))


def test_an_index_must_say_what_the_shards_hold(tmp_path: Path) -> None:
    save(tmp_path, small(), "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    names = dict.fromkeys(small(), "a.safetensors")
    for weight_map, message in [
        ({**names, "model.layers.9.x.weight": "a.safetensors"}, r"a\.safetensors: lacks 1 tensor .*layers\.9"),
        ({"model.norm.weight": "a.safetensors"}, r"also holds 2 tensors .*model\.embed_tokens"),
        (dict.fromkeys(names, "b.safetensors"), r"the shard b\.safetensors is missing"),
        (dict.fromkeys(names, "../a.safetensors"), "not a plain file name"),
        ({}, "has no weight_map"),
        ({"model.norm.weight": 3}, "has no weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=message):
            open_checkpoint(str(tmp_path))
    index.write_text("[]")
    with pytest.raises(CorruptFileError, match=r"index\.json in .* holds a list, not a JSON object"):
        open_checkpoint(str(tmp_path))


def test_layers_are_in_numeric_order(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.{p}_proj.weight" for i in range(12) for p in ("gate", "up", "down")]
    tensors = {n: np.ones((2, 2), np.float32) for n in ["lm_head.weight", "model.norm.weight", *sorted(names)]}
    tensors["model.embed_tokens.weight"] = np.zeros((2, 2), np.float32)
    checkpoint = open_checkpoint(str(save(tmp_path, tensors)))
    assert list(checkpoint.tensors) == ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]


def test_a_head_stored_twice_is_an_alias(tmp_path: Path) -> None:
    tensors = small()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    checkpoint = open_checkpoint(str(save(tmp_path, tensors, tie_word_embeddings=False)))
    assert checkpoint.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in checkpoint.tensors


def test_a_differing_head_wins_over_the_flag(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = small()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(str(save(tmp_path, tensors, tie_word_embeddings=True)))
    assert "lm_head.weight differs from model.embed_tokens.weight" in caplog.text
    assert checkpoint.aliases == {}
    assert checkpoint.config["tie_word_embeddings"] is False
    assert np.array_equal(checkpoint.read("lm_head.weight"), tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, False),
        ({"tie_word_embeddings": True}, True),
        ({"model_type": "gemma2"}, True),
        ({"model_type": "gemma2", "tie_word_embeddings": False}, False),
        ({"model_type": "biogpt"}, True),
        ({"model_type": "cwm"}, False),
        ({"model_type": "nobody-knows-it"}, False),
        ({"model_type": "llava", "text_config": {"model_type": "qwen2", "tie_word_embeddings": True}}, True),
    ],
)
def test_a_missing_head(config: dict[str, Any], tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(str(save(tmp_path, small(), **config)))
    assert checkpoint.aliases == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert ("has no output head" in caplog.text) is not tied


def test_the_tables_of_tying_agree_with_transformers() -> None:
    from transformers import CONFIG_MAPPING

    from anyquant.checkpoint import tying

    for model_type in sorted(tying._TIED | tying._UNTIED):
        config = CONFIG_MAPPING[model_type]
        default = getattr(config, "tie_word_embeddings", None)
        assert default is (model_type in tying._TIED), model_type


@pytest.mark.parametrize(("model_type", "swap"), [("qwen3_moe", False), ("gpt_oss", True)])
def test_stacked_experts_are_split(model_type: str, swap: bool, tmp_path: Path) -> None:
    stacked = np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    router = "model.layers.0.mlp.gate.weight"
    tensors = {
        **small(),
        name: stacked,
        f"{name}_bias": np.ones((3, 4), np.float32),
        router: np.ones((3, 4), np.float32),
    }
    checkpoint = open_checkpoint(str(save(tmp_path, tensors, model_type=model_type)))
    experts = [f"{name}#{e}" for e in range(3)]
    assert [n for n in checkpoint.tensors if "#" in n] == experts
    assert [n for n in checkpoint.matrices() if "#" in n] == experts
    assert f"{name}_bias" not in checkpoint.matrices()
    assert router not in checkpoint.matrices()
    assert checkpoint.transposed == (frozenset(experts) if swap else frozenset())
    for e in range(3):
        expected = stacked[e].T if swap else stacked[e]
        assert checkpoint.tensors[experts[e]].shape == expected.shape
        assert checkpoint.tensors[experts[e]].nbytes == 80
        assert np.array_equal(checkpoint.read(experts[e]), expected)
        assert np.array_equal(checkpoint.raw(experts[e]).arrays[".dense"], expected)


def test_constants_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    old = {
        "h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8), "h.0.attn.masked_bias": np.float32(-1e4),
        "h.0.attn.c_attn.weight": np.ones((4, 12), np.float32), "h.0.attn.c_attn.bias": np.ones(12, np.float32),
        "wte.weight": np.ones((6, 4), np.float32), "wpe.weight": np.ones((3, 4), np.float32),
        "h.0.rotary_emb.inv_freq": np.ones(2, np.float32),
    }  # fmt: skip
    checkpoint = open_checkpoint(str(save(tmp_path, old, model_type="gpt2")))
    assert list(checkpoint.tensors) == ["wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias"]
    assert checkpoint.aliases == {"lm_head.weight": "wte.weight"}
    assert checkpoint.matrices() == ["h.0.attn.c_attn.weight"]
    assert checkpoint.embeddings() == ["wte.weight"]


def test_scalars_and_vectors(tmp_path: Path) -> None:
    tensors = {**small(), "logit_scale": np.float32(2.5)}
    checkpoint = open_checkpoint(str(save(tmp_path, tensors)))
    assert checkpoint.read("logit_scale").shape == ()
    assert float(checkpoint.read("logit_scale")) == 2.5
    assert checkpoint.raw("logit_scale").spec == ir.DenseSpec((), "F32")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_nonfinite_values_are_located(dtype: str, bad: str, tmp_path: Path) -> None:
    import torch

    name = "h.0.mlp.c_fc.weight"
    weight = torch.zeros((4, 7), dtype=getattr(torch, dtype))  # Conv1D: the IR's [i, j] is [j, i] here
    weight[3, 2] = weight[0, 5] = float(bad)
    checkpoint = open_checkpoint(str(save(tmp_path, {name: weight, "wte.weight": torch.ones(3, 4)}, model_type="gpt2")))
    for read in (checkpoint.read, checkpoint.raw):
        with pytest.raises(NonFiniteError) as error:
            read(name)
        assert (error.value.tensor, error.value.index, error.value.count) == (name, (2, 3), 2)
        assert f"{tmp_path.name}/model.safetensors" in str(error.value)
    assert not checkpoint.read(name, slice(3, 5)).any()


def test_f64_beyond_float32_counts_as_infinite(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save(tmp_path, {**small(), "model.x.weight": np.array([1.0, 1e300])})))
    with pytest.raises(NonFiniteError, match=r"first at index \[1\]"):
        checkpoint.read("model.x.weight")


def test_side_files_are_copied_verbatim(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    (source / "modeling_x.py").write_text("raise SystemExit\n")
    (source / "README.md").write_text("x")
    open_checkpoint(str(source)).write_side_files(tmp_path / "plain")
    expected = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert {p.name for p in (tmp_path / "plain").iterdir()} == expected
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (source / path.name).read_bytes()
    open_checkpoint(str(source), trust_remote_code=True).write_side_files(tmp_path / "trusted")
    assert {p.name for p in (tmp_path / "trusted").iterdir()} == {*expected, "modeling_x.py"}


def test_remote_code_is_not_needed_to_read_tensors(tmp_path: Path) -> None:
    folder = save(tmp_path, small(), model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_x.Mine"})
    assert open_checkpoint(str(folder)).matrices() == ["model.layers.0.mlp.up_proj.weight"]


def test_fingerprint_follows_names_and_contents(tmp_path: Path) -> None:
    first = open_checkpoint(str(save(tmp_path / "a", small()))).fingerprint()
    assert len(first) == 64
    assert open_checkpoint(str(save(tmp_path / "b", small()))).fingerprint() == first
    assert open_checkpoint(str(save(tmp_path / "c", small(seed=1)))).fingerprint() != first
    assert open_checkpoint(str(save(tmp_path / "d", small(), rope_theta=5.0))).fingerprint() != first


def test_fingerprint_reads_the_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyquant.checkpoint import base

    checkpoint = open_checkpoint(str(save(tmp_path, small())))
    first = checkpoint.fingerprint()
    monkeypatch.setattr(base, "_contents", lambda path: pytest.fail("read again"))
    assert checkpoint.fingerprint() == first


def test_fingerprint_samples_large_files(tmp_path: Path) -> None:
    from anyquant.checkpoint.base import _contents

    path = tmp_path / "large"
    content = bytearray(40 << 20)
    path.write_bytes(content)
    before = list(_contents(path, hash_fully=1 << 20))
    assert sum(map(len, before)) == (1 << 20) + 4096 * 4096
    for at in (5, len(content) - 1):
        content[at] = 1
        path.write_bytes(content)
        assert list(_contents(path, hash_fully=1 << 20)) != before
        content[at] = 0
    assert b"".join(_contents(path)) == path.read_bytes()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": {"quant_method": "gptq"}}, "already quantized .*'gptq'.*start from the original"),
    ({"quantization_config": "x"}, "already quantized .*'unknown'"),
    ({"text_config": {"compression_config": {"format": "x"}}}, "already quantized"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_quantized_checkpoints_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(str(save(tmp_path, small(), **config)))
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    ("dtype", "message"),
    [("float8_e4m3fn", "is F8_E4M3, an 8-bit or smaller float"), ("int8", "is I8, not a floating type")],
)
def test_other_dtypes_are_refused(dtype: str, message: str, tmp_path: Path) -> None:
    import torch

    folder = save(tmp_path, {**small(), "model.x.weight": torch.zeros(2, 2).to(getattr(torch, dtype))})
    with pytest.raises(InputError, match=message):
        open_checkpoint(str(folder))


def test_empty_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.x\.weight has the shape \[0, 4\]"):
        open_checkpoint(str(save(tmp_path, {**small(), "model.x.weight": np.zeros((0, 4), np.float32)})))
