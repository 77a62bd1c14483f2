"""IR folders of tiny models with any kind of tensor, exported once, and the torch oracle for their logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.checkpoint import open_checkpoint
from anyquant.exporters.onnx import ONNXExporter
from anyquant.exporters.protocol import ExportOptions, ExportPlan
from anyquant.ir.packing import pack
from anyquant.methods.block import BlockMethod

TOKENS = np.array([[1, 17, 301, 42, 42, 388, 5, 260, 111, 2, 73]], np.int64)


def _affine(values: np.ndarray, bits: int, block: int) -> ir.Tensor:
    """Round to (q - zero) * scale with a zero point that differs from block to block."""
    spec = ir.AffineSpec(values.shape, bits, block)
    padded = np.zeros((len(values), spec.blocks * block), np.float32)
    padded[:, : values.shape[1]] = values
    parts = padded.reshape(len(values), spec.blocks, block)
    low, high = parts.min(axis=2), parts.max(axis=2)
    scale = np.maximum((high - low) / (2**bits - 1), 1e-6).astype(np.float16)
    zero = np.clip(np.rint(-low / scale.astype(np.float32)), 0, 2**bits - 1)
    q = np.clip(np.rint(parts / scale[:, :, None].astype(np.float32)) + zero[:, :, None], 0, 2**bits - 1)
    codes = q.reshape(padded.shape).astype(np.uint8)
    codes[:, values.shape[1] :] = 0
    return ir.Tensor(spec, {".codes": pack(codes, bits), ".scale": scale, ".zero": zero.astype(np.uint8)})


def _ggml(shape: tuple[int, ...], type_name: str, rng: np.random.Generator) -> ir.Tensor:
    """Random blocks with scales of a size at which activations neither vanish nor explode."""
    spec = ir.GGMLSpec(shape, type_name)  # type: ignore[arg-type]
    length, size = ir.GGML_TYPES[type_name]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // length, size)).astype(np.uint8)
    at = 208 if type_name == "Q6_K" else 0
    spread = {"Q4_0": 5, "Q4_1": 8, "Q5_0": 9, "Q8_0": 74, "IQ4_NL": 70, "Q6_K": 1400}[type_name]
    half = (rng.choice([-1, 1], len(blocks)) * rng.uniform(0.5, 1.5, len(blocks)) * 0.1 / spread).astype("<f2")
    blocks[:, at : at + 2] = half.view(np.uint8).reshape(-1, 2)
    if type_name == "Q4_1":
        blocks[:, 2:4] = (-8 * half).view(np.uint8).reshape(-1, 2)
    return ir.Tensor(spec, {".blocks": blocks.reshape(shape[0], -1)})


def _codebook(values: np.ndarray, bits: int) -> ir.Tensor:
    """Quantiles of each row as its codebook."""
    tables = np.quantile(values, (np.arange(2**bits) + 0.5) / 2**bits, axis=1).T.astype(np.float16)
    distance = np.abs(values[:, :, None] - tables[:, None, :].astype(np.float32))
    codes = pack(distance.argmin(axis=2).astype(np.uint8), bits)
    widths = np.full(len(values), bits, np.uint8)
    spec = ir.CodebookSpec.from_bits(values.shape, 0, widths)
    return ir.Tensor(spec, {".bits": widths, ".codes": codes.reshape(-1), ".codebook": tables.reshape(-1)})


def quantize(values: np.ndarray, how: str) -> ir.Tensor:
    """A tensor as ``how`` says: "bfp5/16", "affine4/32", "Q8_0", "codebook3"."""
    if how.startswith("bfp"):
        width, block = how[3:].split("/")
        method = BlockMethod()
        spec = ir.BlockSpec(values.shape, "bfp", int(width), int(block))
        return method.quantize(values, spec, method.settings({"block": int(block)}))
    if how.startswith("affine"):
        bits, block = how[6:].split("/")
        return _affine(values, int(bits), int(block))
    if how.startswith("codebook"):
        return _codebook(values, int(how[8:]))
    return _ggml(values.shape, how, np.random.default_rng(len(values)))


Choose = Callable[[str], str]


@pytest.fixture(scope="session")
def make_ir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Choose], ir.Model]:
    """make_ir(checkpoint folder, name -> how) -> the opened IR folder."""

    def make(source: Path, choose: Choose) -> ir.Model:
        checkpoint = open_checkpoint(str(source))
        tensors = {
            name: quantize(checkpoint.read(name), how) if (how := choose(name)) else checkpoint.raw(name)
            for name in checkpoint.tensors
        }
        entries = {name: ir.Entry(t.spec, quantized=t.spec.kind != "dense") for name, t in tensors.items()}
        origin = {"kind": "huggingface", "name": "tests/tiny", "fingerprint": "f" * 64}
        plan = ir.Model(None, checkpoint.config, "block", {}, origin, entries, checkpoint.aliases)
        folder = tmp_path_factory.mktemp("onnx-ir") / "ir"
        return ir.write_ir(folder, plan, lambda n: (tensors[n], 0.0), checkpoint.write_side_files)

    return make


@dataclass(frozen=True)
class Exported:
    """A tiny model and its ONNX folder."""

    checkpoint: Path
    model: ir.Model
    folder: Path
    plan: ExportPlan
    promised: ExportPlan


@pytest.fixture(scope="session")
def export_folder(
    make_ir: Callable[[Path, Choose], ir.Model], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Exported]:
    """export_folder(checkpoint folder, choose, options) -> Exported."""

    def export(checkpoint: Path, choose: Choose, options: ExportOptions | None = None) -> Exported:
        model = make_ir(checkpoint, choose)
        options = options or ExportOptions()
        folder = tmp_path_factory.mktemp("onnx") / "model"
        promised = ONNXExporter().check(model, options)
        return Exported(checkpoint, model, folder, ONNXExporter().export(model, folder, options), promised)

    return export


@pytest.fixture(scope="session")
def export_tiny(
    tiny_checkpoint: Callable[..., Path], export_folder: Callable[..., Exported]
) -> Callable[..., Exported]:
    """export_tiny(choose, options, family, **checkpoint settings) -> Exported."""

    def export(
        choose: Choose, options: ExportOptions | None = None, family: str = "llama", **settings: Any
    ) -> Exported:
        return export_folder(tiny_checkpoint(family, **settings), choose, options)

    return export


def _torch_logits(checkpoint: Path, model: ir.Model) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    state = network.state_dict()
    for name in model.entries:
        state[name].copy_(torch.from_numpy(model.dequantize(name).copy()))
    for alias, target in model.aliases.items():
        state[alias].copy_(state[target])
    with torch.no_grad():
        logits: np.ndarray = network(torch.from_numpy(TOKENS)).logits.numpy()
    return logits


def _ort_logits(folder: Path, config: dict[str, Any]) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    feeds: dict[str, np.ndarray] = {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS)}
    for value in session.get_inputs():
        if value.name == "position_ids":
            feeds[value.name] = np.arange(TOKENS.shape[1])[None]
        elif value.name not in feeds:
            feeds[value.name] = np.zeros((1, value.shape[1], 0, head), np.float32)
    logits: np.ndarray = session.run(["logits"], feeds)[0]
    return logits


@pytest.fixture(scope="session")
def logits_of() -> Callable[[Exported], tuple[np.ndarray, np.ndarray]]:
    """logits_of(exported) -> logits [1, tokens, vocabulary] of ONNX Runtime and of PyTorch on dequantized weights."""
    return lambda e: (_ort_logits(e.folder, e.model.config), _torch_logits(e.checkpoint, e.model))


@pytest.fixture(scope="session")
def tensor_of() -> Callable[[np.ndarray, str], ir.Tensor]:
    """tensor_of(float32 values, how) -> tensor; stock ggml types get random blocks of that shape."""
    return quantize
