"""Tiny models of several families and kinds through the exporter: promises, digests, logits of ONNX Runtime."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import onnx
import pytest

from anyquant import ir
from anyquant.exporters.onnx import ONNXExporter, job
from anyquant.exporters.protocol import ExportOptions

pytestmark = pytest.mark.slow  # each case runs the model builder twice

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")


def _matrix(name: str) -> str:
    """Last module name of a linear layer, or ""."""
    module = name.split(".")[-2]
    return module if module in MATRICES and name.endswith(".weight") else ""


def _operators(folder: Path) -> Counter[str]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def test_mixed_widths_and_padded_columns(export_tiny, verify) -> None:  # type: ignore[no-untyped-def]
    widths = {"q_proj": 4, "k_proj": 4, "v_proj": 6, "o_proj": 2, "gate_proj": 3, "up_proj": 5, "down_proj": 7}

    def choose(name: str) -> str:
        if "embed_tokens" in name:
            return "bfp8/32"
        return f"bfp{widths[_matrix(name)]}/32" if _matrix(name) else ""

    # 48 and 72 columns: neither is a multiple of 32.
    exported = export_tiny(choose, hidden=48, num_attention_heads=3, num_key_value_heads=1)
    verify(exported)
    types = exported.plan.types
    assert types["model.layers.0.self_attn.q_proj.weight"] == "MatMulNBits 4-bit"
    assert types["model.layers.0.self_attn.v_proj.weight"] == "MatMulNBits 2 x 4-bit"
    assert types["model.embed_tokens.weight"] == "MatMulNBits 2 x 4-bit"
    assert types["model.norm.weight"] == "F32"
    operators = _operators(exported.folder)
    # A layer: q and k in one product, v in two, o 1, gate 1, up 2, down 2; the head 2.
    assert operators["MatMulNBits"] == 2 * 9 + 2
    assert operators["GatherBlockQuantized"] == 2
    assert operators["Concat"] == 2
    assert operators["MatMul"] == operators["Transpose"] == 0


def test_biases_untied_and_short_blocks(export_tiny, verify) -> None:  # type: ignore[no-untyped-def]
    def choose(name: str) -> str:
        if "embed_tokens" in name:
            return "Q8_0"
        if "lm_head" in name:
            return "Q5_0"
        return "bfp4/16" if _matrix(name) else ""

    exported = export_tiny(choose, family="qwen2", tied=False)
    verify(exported)
    assert "model.layers.0.self_attn.q_proj.bias" in exported.plan.types
    assert _operators(exported.folder)["MatMulNBits"] == 2 * 5 + 2


def test_affine_and_stock_types(export_tiny, verify) -> None:  # type: ignore[no-untyped-def]
    kinds = {"q_proj": "affine4/32", "k_proj": "affine8/16", "v_proj": "affine2/64", "o_proj": "Q4_0"}
    kinds |= {"gate_proj": "IQ4_NL", "up_proj": "Q4_1", "down_proj": "codebook3"}

    def choose(name: str) -> str:
        if "embed_tokens" in name:
            return "Q6_K"
        return kinds.get(_matrix(name), "")

    exported = export_tiny(choose, ExportOptions(accuracy_level=1), family="qwen3", hidden=256, head_dim=32)
    verify(exported)
    types = exported.plan.types
    assert types["model.layers.1.mlp.up_proj.weight"] == "F32"
    assert types["model.layers.1.mlp.down_proj.weight"] == "CodebookMatMul"
    assert types["model.layers.1.self_attn.k_norm.weight"] == "F32"
    assert any("stored as FP32: Q4_1." in note for note in exported.plan.notes)
    assert any("accuracy_level 1" in note for note in exported.plan.notes)
    graph = onnx.load(exported.folder / "model.onnx", load_external_data=False).graph
    levels = [a.i for n in graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "accuracy_level"]
    assert set(levels) == {1}


def test_packed_checkpoint_and_halves(export_tiny, verify) -> None:  # type: ignore[no-untyped-def]
    def choose(name: str) -> str:
        return {"qkv_proj": "bfp4/32", "gate_up_proj": "bfp6/32"}.get(_matrix(name), "")

    exported = export_tiny(choose, family="phi3", tied=False, dtype="bfloat16", original_max_position_embeddings=256)
    verify(exported)
    assert exported.plan.types["model.embed_tokens.weight"] == "BF16"
    assert exported.plan.types["model.layers.0.mlp.down_proj.weight"] == "BF16"
    assert exported.plan.types["model.layers.0.mlp.gate_up_proj.weight"] == "MatMulNBits 2 x 4-bit"


def test_norms_that_the_graph_holds_as_one_plus_w(  # type: ignore[no-untyped-def]
    export_tiny, verify, tmp_path: Path
) -> None:
    import onnxruntime

    exported = export_tiny(lambda n: "bfp4/32" if _matrix(n) else "", family="gemma2", dtype="float16")
    verify(exported)
    assert exported.plan.types["model.norm.weight"] == "F32"
    assert not any("cannot be read back" in note for note in exported.plan.notes)
    graph = onnx.load(exported.folder / "model.onnx", load_external_data=False).graph
    sums = [node for node in graph.node if node.op_type == "Add" and "anyquant.addend.1" in node.input]
    assert len(sums) == sum("norm" in name for name in exported.model.entries) == 9
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(exported.folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    folded = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    assert not any("anyquant.addend.1" in node.input for node in folded.node)


def test_biases_of_zeros_that_the_graph_goes_without(  # type: ignore[no-untyped-def]
    tiny_checkpoint, export_folder, verify, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    checkpoint = Path(shutil.copytree(tiny_checkpoint("qwen2"), tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    for name in tensors:
        # A layer without any, and one whose packed bias is not all zeros.
        if name.endswith("bias") and ("layers.0" in name or "q_proj" in name):
            tensors[name][:] = 0
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    exported = export_folder(checkpoint, lambda n: "bfp4/32" if _matrix(n) else "")
    verify(exported)
    left_out = {name for name, label in exported.plan.types.items() if label == "left out, all zeros"}
    assert left_out == {f"model.layers.0.self_attn.{p}_proj.bias" for p in "qkv"}
    assert not any("cannot be read back" in note for note in exported.plan.notes)


def test_layout_f32(export_tiny, verify) -> None:  # type: ignore[no-untyped-def]
    choose = lambda n: "bfp4/32" if _matrix(n) else ""  # noqa: E731
    exported = export_tiny(choose, ExportOptions("f32", flavor="plain"))
    verify(exported)
    assert set(exported.plan.types.values()) == {"F32"}
    assert _operators(exported.folder)["MatMulNBits"] == 0
    assert not (exported.folder / "genai_config.json").exists()
    assert (exported.folder / "tokenizer.json").exists()


def test_layout_f16(export_tiny, verify) -> None:  # type: ignore[no-untyped-def]
    def choose(name: str) -> str:
        return {"v_proj": "codebook3"}.get(_matrix(name), "bfp5/32") if _matrix(name) else ""

    exported = export_tiny(choose, ExportOptions("f16"))
    verify(exported)
    assert exported.plan.types["model.layers.0.self_attn.v_proj.weight"] == "F16"
    assert exported.plan.types["model.embed_tokens.weight"] == "F32"
    proto = onnx.load(exported.folder / "model.onnx", load_external_data=False)
    properties = {p.key: p.value for p in proto.metadata_props}
    assert properties["anyquant.layout"] == "f16"
    assert "anyquant.allow_rounding" not in properties
    assert json.loads(properties["anyquant.tensors"]).keys() == exported.model.entries.keys()


def test_rounding_is_recorded(  # type: ignore[no-untyped-def]
    tiny_llama: Path, make_ir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == "onnxruntime-genai":
            raise metadata.PackageNotFoundError(name)
        return "0.18.0 for CUDA"

    model = make_ir(tiny_llama, lambda n: "affine8/32" if "up_proj" in n else "")
    monkeypatch.setattr(job.metadata, "version", version)
    ONNXExporter().export(model, tmp_path / "out", ExportOptions("f16", allow_rounding=True))
    proto = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    properties = {p.key: p.value for p in proto.metadata_props}
    assert properties["anyquant.allow_rounding"] == "true"
    assert properties["anyquant.layout"] == "f16"
    assert properties["anyquant.graph_source"] == "onnxruntime-genai 0.18.0 for CUDA"


def test_plan_without_values_promises_the_same(export_tiny: Callable[..., object]) -> None:
    choose = lambda n: "bfp4/32" if _matrix(n) else ""  # noqa: E731
    exported = export_tiny(choose, ExportOptions("f32", flavor="plain"))
    model = exported.model  # type: ignore[attr-defined]
    empty = ir.Model(None, model.config, model.method, {}, model.source, model.entries, model.aliases, model.files)
    for layout in ("native", "f32", "f16"):
        options = ExportOptions(layout, flavor="plain")
        assert ONNXExporter().check(empty, options).files == ONNXExporter().check(model, options).files
    assert any("assumed" in note for note in ONNXExporter().check(empty, ExportOptions("f16")).notes)
