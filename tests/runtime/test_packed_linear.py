"""anyquant.load on packed matrices: the same logits as dequantized weights give, in the memory of the folder."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import anyquant
from anyquant import ir
from anyquant.calibration import CalibrationSettings
from anyquant.checkpoint import open_checkpoint
from anyquant.errors import UsageError
from anyquant.job import Job, Target
from anyquant.pipeline import run
from anyquant.planning import plan
from anyquant.runtime import native

if TYPE_CHECKING:
    from tests.conftest import RealSkim

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no compiled library: {native.why_not()}")

LITTLE = CalibrationSettings(windows=2, window=16)
JOBS = {
    "skim": Job("skim", Target(bits=3.3), {"outliers": 0.5, "scale": "closed"}, calibration=LITTLE),
    "cmpq": Job("cmpq", Target(bits=3.5), calibration=LITTLE),
    "block": Job("block", Target(bits=5.25)),
    "affine": Job("affine", Target(bits=4.6), {"feedback": False, "clip": False}),
}


def quantized(source: Path, folder: Path, method: str) -> Path:
    run(plan(open_checkpoint(str(source)), JOBS[method]), folder)
    return folder


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def packed_layers(model: nn.Module) -> dict[str, nn.Module]:
    from anyquant.runtime.linear import PackedLinear

    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("method", JOBS)
def test_the_logits_of_dequantized_weights(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    folder = quantized(tiny_llama, tmp_path / "out", method)
    model, expected = anyquant.load(folder), anyquant.load(folder, dequantize=True)
    assert len(packed_layers(model)) == 14
    assert not packed_layers(expected)
    for ids in (torch.arange(3, 60)[None], torch.arange(80).reshape(2, 40), torch.tensor([[7]])):
        torch.testing.assert_close(logits(model, ids), logits(expected, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "layers", "more"),
    [
        ("qwen2", 14, {}),  # with biases
        ("mistral", 14, {"num_key_value_heads": 1}), ("phi3", 8, {}), ("gpt2", 0, {}),  # its matrices lie transposed
        ("mixtral", 8, {"num_local_experts": 4, "num_experts_per_tok": 2}),  # its experts are fused
    ],
)  # fmt: skip
def test_families(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, layers: int, more: dict[str, int]
) -> None:
    folder = quantized(tiny_checkpoint(family, **more), tmp_path / "out", "block")
    model, expected = anyquant.load(folder), anyquant.load(folder, dequantize=True)
    assert len(packed_layers(model)) == layers
    ids = torch.arange(3, 33)[None]
    torch.testing.assert_close(logits(model, ids), logits(expected, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_embeddings(tiny_checkpoint: Callable[..., Path], tmp_path: Path, tied: bool) -> None:
    """A head that is the embedding too stays dequantized; one of its own is packed."""
    source = tiny_checkpoint("llama", tied=tied)
    job = Job("block", Target(bits=5.25), quantize_embeddings=True)
    run(plan(open_checkpoint(str(source)), job), tmp_path / "out")
    model, expected = anyquant.load(tmp_path / "out"), anyquant.load(tmp_path / "out", dequantize=True)
    assert ("lm_head" in packed_layers(model)) == (not tied)
    ids = torch.arange(3, 33)[None]
    torch.testing.assert_close(logits(model, ids), logits(expected, ids), rtol=1e-4, atol=1e-4)


def test_memory_is_that_of_the_folder(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = quantized(tiny_checkpoint("llama", hidden=512, intermediate_size=1536), tmp_path / "out", "skim")
    stored = ir.open_ir(folder).nbytes
    model = anyquant.load(folder)
    storages = [tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers()]]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    # A row of 512 has some 20 bytes more: its place, and a table of 16 entries whatever its width.
    assert sum(held.values()) < 1.15 * stored
    whole = anyquant.load(folder, dequantize=True)
    assert sum(t.nbytes for t in whole.parameters()) > 2 * stored


def test_it_generates_and_takes_other_dtypes(tiny_llama: Path, tmp_path: Path) -> None:
    folder = quantized(tiny_llama, tmp_path / "out", "skim")
    model = anyquant.load(folder)
    tokens = model.generate(torch.tensor([[1, 5, 9]]), do_sample=False, max_new_tokens=4, min_new_tokens=4)
    assert tokens.shape == (1, 7)
    half = anyquant.load(folder, dtype=torch.bfloat16)
    ids = torch.arange(3, 33)[None]
    assert logits(half, ids).dtype == torch.bfloat16
    assert (logits(half, ids).float() - logits(model, ids)).abs().max() < 0.1
    before = {name: module.packed.clone() for name, module in packed_layers(model).items()}
    model.to(torch.bfloat16)
    for name, module in packed_layers(model).items():
        assert torch.equal(module.packed, before[name])
    assert logits(model, ids).dtype == torch.bfloat16


def test_without_the_library_weights_are_dequantized(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantized(tiny_llama, tmp_path / "out", "block")
    expected = logits(anyquant.load(folder, dequantize=True), torch.arange(9)[None])
    monkeypatch.setattr(native, "available", lambda: False)
    model = anyquant.load(folder)
    assert not packed_layers(model)
    assert torch.equal(logits(model, torch.arange(9)[None]), expected)


def test_export_keeps_the_operator(tiny_llama: Path, tmp_path: Path) -> None:
    model = anyquant.load(quantized(tiny_llama, tmp_path / "out", "skim"))
    layer = next(iter(packed_layers(model).values()))
    x = torch.randn(3, layer.in_features)
    exported = torch.export.export(layer, (x,))
    assert "torch.ops.anyquant.matmul" in exported.graph_module.code
    assert torch.equal(exported.module()(x), layer(x))
    torch.library.opcheck(torch.ops.anyquant.matmul.default, (x, layer.packed, layer.out_features))


def test_other_activations_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = anyquant.load(quantized(tiny_llama, tmp_path / "out", "block"))
    layer = next(iter(packed_layers(model).values()))
    for x in (torch.zeros(2, 7), torch.zeros(2, layer.in_features, device="meta")):
        with pytest.raises(UsageError, match="others with dequantize=True"):
            layer(x)
    assert layer(torch.zeros(0, layer.in_features)).shape == (0, layer.out_features)
    assert f"in_features={layer.in_features}" in str(layer)


def test_threads_change_nothing(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Of torch, or several that call at once: one has the library's threads, and the others do it alone."""
    model = anyquant.load(quantized(tiny_checkpoint("llama", hidden=256), tmp_path / "out", "skim"))
    layer = next(iter(packed_layers(model).values()))
    x, before = torch.randn(3, layer.in_features), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            found.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)

    wrong: list[torch.Tensor] = []

    def work() -> None:
        wrong.extend(y for y in (layer(x) for _ in range(200)) if not torch.equal(y, found[0]))

    threads_ = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads_:
        thread.start()
    for thread in threads_:
        thread.join()
    assert not wrong


FORKED = """
import os, sys
import numpy as np, torch
from anyquant import ir
from anyquant.ir import packing
from anyquant.runtime.linear import PackedLinear
from anyquant.runtime.native_matmul import PackedMatrix
spec = ir.AffineSpec((600, 64), 4, 32)
codes = np.random.default_rng(0).integers(0, 16, (600, 64)).astype(np.uint8)
ones = {".scale": np.ones((600, 2), np.float16), ".zero": np.ones((600, 2), np.uint8)}
layer = PackedLinear(PackedMatrix(ir.Tensor(spec, {".codes": packing.pack(codes, 4), **ones})), None)
torch.set_num_threads(3)
x = torch.ones(2, 64)
expected = layer(x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(layer(x), expected) and torch.equal(layer(x), expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_has_threads_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_on_a_real_model(real_skim: RealSkim, real_ir: Path, real_text: Path) -> None:
    """SmolLM2 in codebooks and in blocks: logits on a scale of about 20 within 1e-3, and the same greedy text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_ir)
    ids = torch.tensor([tokenizer(real_text.read_text(encoding="utf-8")[:1000])["input_ids"][:64]])
    for folder in (real_skim.folder, real_ir):
        model, expected = anyquant.load(folder), anyquant.load(folder, dequantize=True)
        assert len(packed_layers(model)) == 210
        assert (logits(model, ids) - logits(expected, ids)).abs().max() < 1e-3
        assert (logits(model, ids[:, -1:]) - logits(expected, ids[:, -1:])).abs().max() < 1e-3
        words = [each.generate(ids[:, :16], do_sample=False, max_new_tokens=8) for each in (model, expected)]
        assert torch.equal(*words)
