"""IR folders of tiny models with any kind of tensor, exported once, and the torch oracle for their logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from anyquant import ir
from anyquant.checkpoint import open_checkpoint
from anyquant.exporters.onnx import ONNXExporter
from anyquant.exporters.onnx.codebook import NEUTRAL, STORED, stored_arrays
from anyquant.exporters.onnx.function_steps import Steps
from anyquant.exporters.onnx.functions import DOMAIN, gather_function, matmul_function, steps_for
from anyquant.exporters.protocol import ExportOptions, ExportPlan
from anyquant.ir.packing import pack
from anyquant.methods.block import WIDTHS, BlockMethod

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


_BLOCK = 40
"""Weights in a block of the streaming body: several blocks, the last one not full."""


def codebook_model(
    tensor: ir.Tensor,
    fallback: str = "",
    steps: Steps | None = None,
    bias: np.ndarray | None = None,
    block: int = _BLOCK,
    opset: int = 22,
    **changed: np.ndarray,
) -> onnx.ModelProto:
    """One node: CodebookMatMul with this fallback, or CodebookGather if there is none."""
    spec = tensor.spec
    assert isinstance(spec, ir.CodebookSpec)
    steps = steps or steps_for([spec])
    arrays = {**NEUTRAL, **stored_arrays(tensor), ".bias": np.zeros(1, np.float32) if bias is None else bias}
    arrays |= {f".{name}": array for name, array in changed.items()}
    out, columns = spec.shape
    if fallback:
        function = matmul_function(opset, fallback, steps, block)
        suffixes, sizes = (*STORED, ".bias"), {"K": columns, "N": out, "transB": 1 - spec.axis}
        given = helper.make_tensor_value_info("given", onnx.TensorProto.FLOAT, ["batch", "tokens", columns])
        result = helper.make_tensor_value_info("result", onnx.TensorProto.FLOAT, ["batch", "tokens", out])
    else:
        function = gather_function(opset, steps)
        suffixes, sizes = STORED, {"K": columns}
        given = helper.make_tensor_value_info("given", onnx.TensorProto.INT64, ["batch", "tokens"])
        result = helper.make_tensor_value_info("result", onnx.TensorProto.FLOAT, ["batch", "tokens", columns])
    names = ["w" + suffix for suffix in suffixes]
    node = helper.make_node(function.name, ["given", *names], ["result"], domain=DOMAIN, **sizes)
    stored = [numpy_helper.from_array(arrays[suffix], name) for suffix, name in zip(suffixes, names, strict=True)]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "one", [given], [result], stored)
    return helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=10)


def _codebook(values: np.ndarray, how: str) -> ir.Tensor:
    """Quantiles of each channel as its codebook; how = WIDTH or "mixed", then "/columns", "+scale", "+outliers"."""
    rng = np.random.default_rng(len(values))
    width, axis = how.split("+")[0].split("/")[0], int("/columns" in how)
    scale = rng.uniform(0.5, 2, values.shape[1]).astype(np.float16) if "+scale" in how else None
    channels = np.moveaxis(values if scale is None else values / scale, axis, 0)
    choice = [0, 2, 3, 4, 8] if width == "mixed" else [int(width)]
    bits = rng.choice(choice, len(channels)).astype(np.uint8)
    tables, codes = [], []
    for channel, b in zip(channels, bits.tolist(), strict=True):
        tables.append(np.quantile(channel, (np.arange(2**b) + 0.5) / 2**b).astype(np.float16))
        distance = np.abs(channel[:, None] - tables[-1].astype(np.float32))
        codes.append(pack(distance.argmin(axis=1)[None], b)[0])
    outliers = values.size // 50 if "+outliers" in how else 0
    spec = ir.CodebookSpec.from_bits(values.shape, axis, bits, input_scale=scale is not None, outliers=outliers)
    arrays = {".bits": bits, ".codes": np.concatenate(codes), ".codebook": np.concatenate(tables)}
    if scale is not None:
        arrays[".input_scale"] = scale
    if outliers:
        flat = values.reshape(-1)
        places = np.sort(np.argsort(-np.abs(flat))[:outliers])
        row, column = np.divmod(places, values.shape[1])
        arrays[".outlier_indptr"] = np.searchsorted(row, np.arange(len(values) + 1)).astype(np.uint32)
        arrays[".outlier_index"] = column.astype(np.uint16)
        arrays[".outlier_value"] = flat[places].astype(np.float16)
    tensor = ir.Tensor(spec, arrays)
    tensor.check(how)
    return tensor


def quantize(values: np.ndarray, how: str) -> ir.Tensor:
    """A tensor as ``how`` says: "bfp5/16", "affine4/32", "Q8_0", "codebook3", "codebook-mixed/columns+scale"."""
    if how.startswith("bfp"):
        width, block = how[3:].split("/")
        method = BlockMethod()
        level = np.array([WIDTHS.index(int(width))], np.uint8)
        return method.quantize(values, level, None, method.settings({"block": int(block)}))
    if how.startswith("affine"):
        bits, block = how[6:].split("/")
        return _affine(values, int(bits), int(block))
    if how.startswith("codebook"):
        return _codebook(values, how[8:].lstrip("-"))
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
        return ir.write_ir(folder, plan, lambda n: (tensors[n], ir.Loss(0.0)), checkpoint.write_side_files)

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


def _feeds(folder: Path, config: dict[str, Any], tokens: np.ndarray = TOKENS) -> dict[str, np.ndarray]:
    """Tokens int64 [1, length] and an empty cache, for the inputs that a graph has."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    feeds: dict[str, np.ndarray] = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    for value in onnx.load(folder / "model.onnx", load_external_data=False).graph.input:
        if value.name == "position_ids":
            feeds[value.name] = np.arange(tokens.shape[1])[None]
        elif value.name not in feeds:
            heads = value.type.tensor_type.shape.dim[1].dim_value
            feeds[value.name] = np.zeros((1, heads, 0, head), np.float32)
    return feeds


def _ort_logits(folder: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(["logits"], feeds)[0]
    return logits


@pytest.fixture(scope="session")
def feeds_of() -> Callable[..., dict[str, np.ndarray]]:
    """feeds_of(folder, config, tokens) -> inputs of a graph; unless given, the tokens whose logits are compared."""
    return _feeds


@pytest.fixture(scope="session")
def run_in_onnxruntime() -> Callable[[Path, dict[str, np.ndarray]], np.ndarray]:
    """run_in_onnxruntime(folder, inputs) -> logits, on the CPU."""
    return _ort_logits


@pytest.fixture(scope="session")
def logits_of() -> Callable[[Exported], tuple[np.ndarray, np.ndarray]]:
    """logits_of(exported) -> logits [1, tokens, vocabulary] of ONNX Runtime and of PyTorch on dequantized weights."""
    return lambda e: (_ort_logits(e.folder, _feeds(e.folder, e.model.config)), _torch_logits(e.checkpoint, e.model))


@pytest.fixture(scope="session")
def verify(logits_of: Callable[[Exported], tuple[np.ndarray, np.ndarray]]) -> Callable[[Exported], None]:
    """verify(exported): bytes and words are those promised, every tensor is read back equal, and logits agree."""

    def check(exported: Exported) -> None:
        plan, folder, model = exported.plan, exported.folder, exported.model
        assert plan.files == exported.promised.files == {name: (folder / name).stat().st_size for name in plan.files}
        assert plan.types == exported.promised.types
        assert plan.notes == exported.promised.notes
        assert list(folder.parent.iterdir()) == [folder]
        found = {name: ir.digest(values) for name, values in ONNXExporter().read(folder)}
        wanted = {name: entry.sha256 for name, entry in model.entries.items()}
        assert found == wanted
        assert list(found) == list(wanted)
        onnxruntime, torch = logits_of(exported)
        assert np.abs(torch).max() > 1
        assert np.abs(onnxruntime - torch).max() <= 1e-3

    return check


@pytest.fixture(scope="session")
def model_of() -> Callable[..., onnx.ModelProto]:
    """model_of(codebook tensor, fallback, steps, bias, block=, opset=, **changed arrays) -> a model of one node."""
    return codebook_model


@pytest.fixture(scope="session")
def tensor_of() -> Callable[[np.ndarray, str], ir.Tensor]:
    """tensor_of(float32 values, how) -> tensor; stock ggml types get random blocks of that shape."""
    return quantize
