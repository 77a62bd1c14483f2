"""--quantize-embeddings: embedding and head by every method, tied and untied, from the command line to the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize

import anyquant
from anyquant import ir

if TYPE_CHECKING:
    from tests.conftest import Result

Invoke = Callable[..., "Result"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BITS = {"skim": 3.4, "claq": 3.9, "cmpq": 3.9, "block": 4.6, "affine": 4.4, "ggml": 5.1}
IDS = torch.tensor([[5, 9, 300, 17, 200, 9, 41, 33, 2, 7]])


def quantize(invoke: Invoke, model: Path, out: Path, method: str, *more: str) -> ir.Model:
    texts = [] if method == "block" else ["--calib-windows", "4", "--calib-window", "32"]
    result = invoke(
        "quantize", model, "-o", out, "--method", method, "--bits", BITS[method], "--quantize-embeddings", *texts, *more
    )
    assert result.code == 0, result.err
    return ir.open_ir(out)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("skim", []), ("skim", ["--refine"]), ("skim", ["--refine", "--sequential"]), ("skim", ["--outliers", "1"]),
        ("claq", ["--refine"]), ("cmpq", ["--refine"]), ("block", []), ("affine", []), ("ggml", []),
    ],
)  # fmt: skip
def test_all_matrices_are_quantized_and_run(
    invoke: Invoke, tiny_checkpoint: Callable[..., Path], tmp_path: Path, method: str, more: list[str], tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_checkpoint("llama", tied=tied)
    made = quantize(invoke, source, tmp_path / "out", method, *more)
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


def test_the_budget_is_that_of_all_matrices(invoke: Invoke, tiny_llama: Path, tmp_path: Path) -> None:
    """The embedding is a quarter of the weights: included, a size is met that is out of reach without."""
    plan = ["plan", tiny_llama, "--method", "block", "--size", "100KB", "--json"]
    refused = invoke(*plan)
    assert refused.code == 2
    assert "--quantize-embeddings" in refused.err + refused.out
    assert invoke(*plan, "--quantize-embeddings").code == 0
