"""anyquant.load: a transformers model whose weights are the dequantized ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import anyquant
from anyquant import ir
from anyquant.checkpoint import open_checkpoint
from anyquant.errors import CorruptFileError, InputError, UnknownArchitecture
from anyquant.ir import packing
from anyquant.job import Job, Target
from anyquant.pipeline import run
from anyquant.planning import plan
from anyquant.runtime import native
from anyquant.runtime.model import as_stored, checkpoint_tensors


def quantize(source: Path, out: Path, bits: float = 4.25) -> ir.Model:
    return run(plan(open_checkpoint(str(source)), Job("block", Target(bits=bits))), out)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral"])
def test_weights_are_the_dequantized_ones(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_checkpoint(family, tied=tied)
    quantize(source, tmp_path / "out")
    model = anyquant.load(tmp_path / "out", dequantize=True)
    quantized = dict(checkpoint_tensors(ir.open_ir(tmp_path / "out")))
    # An oracle: the source's own model with each parameter overwritten.
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    names = dict(expected.named_parameters())
    for name, values in quantized.items():
        names[name].data.copy_(torch.from_numpy(values))
    assert set(quantized) == set(names)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_it_generates(tiny_llama: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, tmp_path / "out")
    model = anyquant.load(tmp_path / "out")
    assert model.generation_config.max_new_tokens == 16  # the source's own settings
    tokens = model.generate(torch.tensor([[1, 5, 9]]), do_sample=False, max_new_tokens=4, min_new_tokens=4)
    assert tokens.shape == (1, 7)


def test_dtype(tiny_llama: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, tmp_path / "out")
    assert anyquant.load(tmp_path / "out", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_transformers_alone_refuses_the_folder(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    quantize(tiny_llama, tmp_path / "out")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_unknown_architecture(tiny_llama: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "model_type": "abacus"}))
    with pytest.raises(UnknownArchitecture, match="abacus"):
        anyquant.load(tmp_path / "out")


def test_a_config_of_another_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CorruptFileError, match=r"missing weights.*layers\.2"):
        anyquant.load(tmp_path / "out")


def test_not_an_ir_folder(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match=r"anyquant\.json"):
        anyquant.load(tiny_llama)


def test_experts_are_stacked_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {f"up#{e}": rng.standard_normal((4, 6)).astype(np.float32) for e in range(3)}
    entries = {name: ir.Entry(ir.DenseSpec((4, 6), "F32"), source_transposed=True) for name in values}
    model = ir.Model(None, {}, "block", {}, {}, entries, {})
    made = ir.write_ir(tmp_path / "out", model, lambda n: (ir.Tensor(entries[n].spec, {".dense": values[n]}), None))
    ((name, stacked),) = checkpoint_tensors(made)
    assert name == "up"
    np.testing.assert_array_equal(stacked, np.stack([v.T for v in values.values()]))


def test_experts_are_stacked_by_number() -> None:
    names = [f"up#{e}" for e in (10, 2, *range(2), *range(3, 10), 11)]
    found = dict(as_stored(["a", *names, "b"], lambda n: np.full((1, 2), ord(n[0]) + len(n)), ()))
    assert list(found) == ["a", "up", "b"]
    numbers = dict(as_stored(names, lambda n: np.full((1, 2), int(n[3:])), ()))
    np.testing.assert_array_equal(numbers["up"][:, 0, 0], np.arange(12))


@pytest.mark.parametrize("names", [["up#1"], ["up#0", "up#2"], ["up#0", "up#x"], ["up#0", "up#01"], ["up", "up#0"]])
def test_experts_with_gaps_are_refused(names: list[str]) -> None:
    with pytest.raises(CorruptFileError, match="numbered 0 to"):
        dict(as_stored(names, lambda name: np.zeros((1, 2)), ()))


def test_loading_unpacks_with_the_compiled_library(tiny_llama: Path, tmp_path: Path) -> None:
    if not native.available():
        pytest.skip(native.why_not())
    quantize(tiny_llama, tmp_path / "out")
    packing.set_backend(packing.pack_numpy, packing.unpack_numpy)
    anyquant.load(tmp_path / "out")
    assert packing._unpack is native.unpack_bits


def test_the_real_model_answers(real_ir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_ir)
    model = anyquant.load(real_ir)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=16)
    assert "Paris" in tokenizer.decode(tokens[0][prompt["input_ids"].shape[1] :])
