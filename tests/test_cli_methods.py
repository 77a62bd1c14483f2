"""Every method from the command line: options, refinement, the order of the model, embeddings and heads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize

import anyquant
from anyquant import ir
from anyquant.calibration import open_statistics
from anyquant.checkpoint import open_checkpoint
from anyquant.methods import get_method
from anyquant.plugins import METHODS, plugins
from anyquant.refinement import losses
from anyquant.refinement.calibrated import held_back, shrinkage

if TYPE_CHECKING:
    from tests.conftest import Result

Invoke = Callable[..., "Result"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.tensor([[5, 9, 300, 17, 200, 9, 41, 33, 2, 7]])
LITTLE = ["--calib-windows", "4", "--calib-window", "32"]
REFINABLE = ["skim", "claq", "cmpq", "affine"]
BITS = {"skim": 3.4, "claq": 3.9, "cmpq": 3.9, "block": 4.6, "affine": 4.4, "ggml": 5.1}


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def quantize(invoke: Invoke, model: Path, out: Path, method: str, *more: object) -> Any:
    texts = [] if method == "block" else LITTLE
    result = invoke("quantize", model, "-o", out, "--method", method, "--bits", BITS[method], *texts, *more, "--json")
    assert result.code == 0, result.err
    return result.data


def test_all_methods_are_tried_here() -> None:
    assert set(BITS) == set(plugins(METHODS))
    assert not [plugin for plugin in plugins(METHODS).values() if plugin.error]


@pytest.mark.parametrize("method", BITS)
def test_what_plan_promises_is_written(invoke: Invoke, tiny_llama: Path, tmp_path: Path, method: str) -> None:
    texts = [] if method == "block" else LITTLE
    work = ["--work-dir", tmp_path / "work"]
    planned = invoke("plan", tiny_llama, "--method", method, "--bits", BITS[method], *texts, *work, "--json")
    assert planned.code == 0, planned.err
    made = quantize(invoke, tiny_llama, tmp_path / "out", method, *work)
    promised: Any = planned.data
    assert made["files"] == promised["files"] == {f: (tmp_path / "out" / f).stat().st_size for f in made["files"]}
    assert BITS[method] - 0.5 < made["bits"] <= BITS[method] + 1e-9
    done = invoke("export", "gguf", tmp_path / "out", "-o", tmp_path / "f32.gguf", "--layout", "f32", "--json")
    assert done.code == 0, done.err
    native = invoke("export", "gguf", tmp_path / "out", "-o", tmp_path / "native.gguf", "--json")
    # In types of ours where no stock one is exact; of matrices as small as these some are larger than the largest.
    assert native.code == 0 or (native.code == 2 and "more than the largest type" in native.err), native.err
    assert native.code == 0 or method not in ("block", "ggml", "skim")
    if method == "ggml":  # the other kinds have ONNX tests of their own
        onnx = invoke("export", "onnx", tmp_path / "out", "-o", tmp_path / "onnx", "--json")
        assert onnx.code == 0, onnx.err


@pytest.mark.parametrize("method", REFINABLE)
def test_refined_is_better_in_the_same_bytes(invoke: Invoke, tiny_llama: Path, tmp_path: Path, method: str) -> None:
    work = ["--work-dir", tmp_path / "work", *(["--importance", "activation"] if method == "cmpq" else [])]
    plain = quantize(invoke, tiny_llama, tmp_path / "plain", method, *work)
    refined = quantize(invoke, tiny_llama, tmp_path / "refined", method, "--refine", *work)
    assert refined["bits"] == plain["bits"]
    before, after = ir.open_ir(tmp_path / "plain"), ir.open_ir(tmp_path / "refined")
    assert after.settings["target"]["refine"] is True
    checkpoint, statistics = open_checkpoint(str(tiny_llama)), open_statistics(tmp_path / "work" / "calibration")
    for name in checkpoint.matrices():
        weight, known = checkpoint.read(name), statistics.matrix(name)
        assert known is not None
        assert after.entries[name].spec == before.entries[name].spec
        moment, rows = known.full(), known.gradient()
        moment = moment if method == "affine" else held_back(moment, shrinkage(weight.shape[1], known.tokens))
        lost = [
            np.sum(losses(weight, model.tensor(name), moment) * (1 if rows is None else rows))
            for model in (before, after)
        ]
        assert lost[1] < lost[0]


def test_cmpq_records_norms_alone_unless_it_is_refined(invoke: Invoke, tiny_llama: Path, tmp_path: Path) -> None:
    for name, more, recorded in (("plain", [], "norms"), ("refined", ["--refine"], "activation")):
        quantize(invoke, tiny_llama, tmp_path / name, "cmpq", *more)
        made = ir.open_ir(tmp_path / name)
        assert made.calibration is not None
        assert made.calibration["importance"] == recorded
        lost = [entry.output_error for entry in made.entries.values() if entry.quantized]
        assert lost
        assert all((error is None) == (recorded == "norms") for error in lost)


@pytest.mark.parametrize(
    ("method", "more", "named"),
    [
        ("cmpq", ["--refine"], "--refine"),
        ("claq", [], "claq"),
        ("affine", [], "--set feedback=yes"),
        ("skim", ["--set", "objective=full"], "--set objective=full"),
        ("skim", ["--set", "scale=closed"], "--set scale=closed"),
    ],
)
def test_what_norms_do_not_suffice_for(
    invoke: Invoke, tiny_llama: Path, tmp_path: Path, method: str, more: list[str], named: str
) -> None:
    arguments = ["--method", method, "--bits", BITS[method], "--importance", "norms", *more]
    result = invoke("quantize", tiny_llama, "-o", tmp_path / "out", *arguments)
    assert result.code == 2
    assert f"--importance norms records the mean square of each input alone, and {named} needs" in result.err
    assert not list(tmp_path.iterdir())


def test_rounding_is_refined_too_which_takes_a_text(invoke: Invoke, tiny_llama: Path, tmp_path: Path) -> None:
    rounding = ["--set", "feedback=no", "--set", "clip=no", "--set", "blocks=32", "--bits", 4.75]  # 4 bits everywhere
    work = ["--work-dir", tmp_path / "work"]
    for name, more in (("plain", []), ("refined", ["--refine", *LITTLE, *work])):
        made = invoke("quantize", tiny_llama, "-o", tmp_path / name, "--method", "affine", *rounding, *more)
        assert made.code == 0, made.err
    before, after = ir.open_ir(tmp_path / "plain"), ir.open_ir(tmp_path / "refined")
    assert before.calibration is None
    checkpoint, statistics = open_checkpoint(str(tiny_llama)), open_statistics(tmp_path / "work" / "calibration")
    for name in checkpoint.matrices():
        weight, known = checkpoint.read(name), statistics.matrix(name)
        assert known is not None
        assert after.entries[name].spec == before.entries[name].spec
        lost = [losses(weight, model.tensor(name), known.full()).sum() for model in (before, after)]
        assert lost[1] < 0.9 * lost[0]


@pytest.mark.parametrize("method", ["block", "ggml"])
def test_other_forms_are_not_refined(invoke: Invoke, tiny_llama: Path, tmp_path: Path, method: str) -> None:
    result = invoke("quantize", tiny_llama, "-o", tmp_path / "out", "--method", method, "--bits", 5, "--refine")
    assert result.code == 2
    assert f"--refine is for codebooks and affine blocks, which the method {method} does not make" in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["skim", "claq", "affine"])
def test_in_the_order_of_the_model(invoke: Invoke, tiny_llama: Path, tmp_path: Path, method: str) -> None:
    """The first group sees what it always saw; later ones see quantized inputs; resumed the bytes are the same."""
    quantize(invoke, tiny_llama, tmp_path / "plain", method)
    quantize(invoke, tiny_llama, tmp_path / "once", method, "--sequential")
    quantize(invoke, tiny_llama, tmp_path / "kept", method, "--sequential", "--work-dir", tmp_path / "work")
    assert hashes(tmp_path / "once") == hashes(tmp_path / "kept")
    for path in sorted((tmp_path / "work" / "tensors").glob("*.safetensors"))[1::2]:
        path.unlink()
    more = ["--sequential", "--work-dir", tmp_path / "work", "--resume", "--workers", 3]
    quantize(invoke, tiny_llama, tmp_path / "again", method, *more)
    assert hashes(tmp_path / "once") == hashes(tmp_path / "again")

    plain, once = ir.open_ir(tmp_path / "plain"), ir.open_ir(tmp_path / "once")
    names = open_checkpoint(str(tiny_llama)).matrices()
    same = {n for n in names if np.array_equal(ir.dequantize(plain.tensor(n)), ir.dequantize(once.tensor(n)))}
    assert {n for n in names if "layers.0.self_attn.q_proj" in n} <= same
    if method != "skim":  # whose k-means weights change, but may lead to the same codebooks
        assert len(same) < len(names)


def test_no_text_no_order(invoke: Invoke, tiny_llama: Path, tmp_path: Path) -> None:
    result = invoke("quantize", tiny_llama, "-o", tmp_path / "out", "--bits", 5, "--sequential")
    assert result.code == 2
    assert "--sequential has no meaning for the method block" in result.err


def test_options_of_a_method(invoke: Invoke, tiny_llama: Path, tmp_path: Path) -> None:
    more = ["--set", "scale=closed", "--set", "outliers=1"]
    made = quantize(invoke, tiny_llama, tmp_path / "out", "skim", *more)
    assert made["settings"]["scale"] == "closed"
    assert made["settings"]["outliers"] == 1.0
    spec = ir.open_ir(tmp_path / "out").entries["model.layers.0.self_attn.q_proj.weight"].spec
    assert isinstance(spec, ir.CodebookSpec)
    assert spec.input_scale
    assert spec.outliers == round(spec.numel / 100)
    for bad, words in (("scale", "write KEY=VALUE"), ("scale=best", "must be off, closed or gradient")):
        result = invoke("plan", tiny_llama, "--method", "skim", "--bits", 3, "--set", bad)
        assert result.code == 2
        assert words in result.err


def test_the_profile_of_the_paper(invoke: Invoke, tiny_llama: Path, tmp_path: Path) -> None:
    made = quantize(invoke, tiny_llama, tmp_path / "out", "skim", "--profile", "paper")
    settings = made["settings"]
    assert {key: settings[key] for key in ("profile", "scale", "objective", "alternations")} == {
        "profile": "paper", "scale": "gradient", "objective": "full", "alternations": 1,
    }  # fmt: skip
    assert settings["target"]["allocation"] == "matrix"
    assert ir.open_ir(tmp_path / "out").calibration["importance"] == "fisher"


@pytest.mark.parametrize("method", BITS)
def test_options_are_listed(invoke: Invoke, method: str) -> None:
    listed: Any = invoke("methods", method, "--json").data
    assert [option["name"] for option in listed["options"]] == [o.name for o in get_method(method).options]
    text = invoke("methods", method).out
    assert all(f"  {option['name']}=" in text for option in listed["options"])
    assert max(map(len, text.splitlines())) <= 120
    assert invoke("methods", "skm").code == 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("skim", []), ("skim", ["--refine"]), ("skim", ["--refine", "--sequential"]), ("skim", ["--outliers", "1"]),
        ("claq", ["--refine"]), ("cmpq", ["--refine"]), ("block", []), ("affine", []), ("ggml", []),
    ],
)  # fmt: skip
def test_embeddings_and_heads_are_quantized_and_run(
    invoke: Invoke, tiny_checkpoint: Callable[..., Path], tmp_path: Path, method: str, more: list[str], tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_checkpoint("llama", tied=tied)
    quantize(invoke, source, tmp_path / "out", method, "--quantize-embeddings", *more)
    made = ir.open_ir(tmp_path / "out")
    matrices = {name for name, entry in made.entries.items() if len(entry.spec.shape) == 2}
    assert {name for name, entry in made.entries.items() if entry.quantized} == matrices
    assert {EMBEDDING} <= matrices
    assert (HEAD in matrices) != tied
    assert (HEAD in made.aliases) == tied
    assert made.quantized_bits <= BITS[method] + 1e-9

    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.inference_mode():
        exact = reference(IDS).logits
        state = reference.state_dict()
        for name in made.entries:
            state[name].copy_(torch.from_numpy(ir.dequantize(made.tensor(name)).astype(np.float32)))
        expected = reference(IDS).logits
        found = anyquant.load(tmp_path / "out")(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - exact).abs().max() > 1e-3

    file = tmp_path / "model.gguf"
    result = invoke("export", "gguf", tmp_path / "out", "-o", file, "--layout", "f32")
    assert result.code == 0, result.err
    tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(file).tensors}
    np.testing.assert_array_equal(tensors["token_embd.weight"], ir.dequantize(made.tensor(EMBEDDING)))
    if not tied:
        np.testing.assert_array_equal(tensors["output.weight"], ir.dequantize(made.tensor(HEAD)))


def test_embeddings_share_the_budget(invoke: Invoke, tiny_llama: Path, tmp_path: Path) -> None:
    """The embedding is a quarter of the weights: included, a size is met that is out of reach without."""
    plan = ["plan", tiny_llama, "--method", "block", "--size", "100KB", "--json"]
    refused = invoke(*plan)
    assert refused.code == 2
    assert "--quantize-embeddings" in refused.err + refused.out
    assert invoke(*plan, "--quantize-embeddings").code == 0
