"""Tiny models with codebook tensors through the exporter, and both bodies of CodebookMatMul in two runtimes."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from anyquant import ir
from anyquant.errors import CorruptFileError, ExportRefused
from anyquant.exporters.onnx import ONNXExporter
from anyquant.exporters.onnx.graph_source import build_graph
from anyquant.exporters.protocol import ExportOptions

pytestmark = pytest.mark.slow  # each export runs the model builder twice

DECODING = {"Scan", "GatherElements", "MatMulInteger", "CumSum", "ScatterND", "ScatterElements"}
Verify = Callable[[Any], None]


def _module(name: str) -> str:
    """Last module name of a linear layer, embedding or head; "" for norms and biases."""
    module = name.split(".")[-2]
    return module if name.endswith("weight") and "norm" not in module else ""


def _operators(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def _graph(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / "model.onnx", load_external_data=False).graph


def _optimized(folder: Path, path: Path) -> onnx.GraphProto:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return onnx.load(path, load_external_data=False).graph


def _nested(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nested(attribute.g)


@pytest.fixture(scope="module")
def export_tied(export_tiny: Callable[..., Any]) -> Callable[[str], Any]:
    """export_tied(fallback): all of a llama in codebooks of mixed widths, the embedding that is the head too."""
    kinds = {"o_proj": "codebook3", "down_proj": "codebook-mixed+scale", "gate_proj": "codebook-mixed+outliers"}
    made: dict[str, Any] = {}

    def export(fallback: str) -> Any:
        if fallback not in made:
            choose = lambda n: kinds.get(_module(n), "codebook-mixed+scale+outliers") if _module(n) else ""  # noqa: E731
            made[fallback] = export_tiny(choose, ExportOptions(fallback=fallback))
        return made[fallback]

    return export


@pytest.mark.parametrize("fallback", ["fold", "stream"])
def test_everything_in_codebooks(
    export_tied: Callable[[str], Any],
    verify: Verify,
    logits_of: Callable[[Any], tuple[np.ndarray, np.ndarray]],
    feeds_of: Callable[..., dict[str, np.ndarray]],
    run_in_node: Callable[..., dict[str, np.ndarray]],
    fallback: str,
) -> None:
    exported = export_tied(fallback)
    verify(exported)
    labels = {label for name, label in exported.plan.types.items() if _module(name)}
    assert labels == {"CodebookMatMul"}
    model = onnx.load(exported.folder / "model.onnx", load_external_data=False)
    operators = _operators(model.graph)
    assert operators["CodebookMatMul"] == 2 * 7 + 1
    assert operators["CodebookGather"] == 1
    assert operators["Concat"] == 2  # of q, k and v
    assert operators["MatMul"] == operators["Transpose"] == 0
    assert [(f.domain, f.name) for f in model.functions] == [
        ("anyquant", "CodebookGather"),
        ("anyquant", "CodebookMatMul"),
    ]
    # No inputs that clients would have to know.
    feeds = feeds_of(exported.folder, exported.model.config)
    assert {value.name for value in model.graph.input} == set(feeds)
    assert not {value.name for value in model.graph.input} & {t.name for t in model.graph.initializer}
    # The embedding's bytes are the head's.
    gather = next(node for node in model.graph.node if node.op_type == "CodebookGather")
    head = next(node for node in model.graph.node if "lm_head" in node.name)
    assert list(gather.input[1:]) == list(head.input[1:8])
    # Nothing is stored but the IR's arrays, other vectors, padding, and the tables of rotary positions.
    dense = sum(e.spec.numel * 4 for e in exported.model.entries.values() if e.spec.kind == "dense")
    coded = sum(e.spec.nbytes for e in exported.model.entries.values() if e.spec.kind == "codebook")
    tables = sum(4 * np.prod(t.dims) for t in model.graph.initializer if "cache" in t.name)
    items = len(model.graph.initializer)
    assert 0 <= exported.plan.files["model.onnx.data"] - (dense + coded + tables) <= 64 * items

    expected = logits_of(exported)[0]
    found = run_in_node(exported.folder / "model.onnx", feeds, ["logits"])["logits"]
    assert np.abs(found - expected).max() <= 1e-4


def test_fold_leaves_no_decoding(export_tied: Callable[[str], Any], tmp_path: Path) -> None:
    exported = export_tied("fold")
    graph = _optimized(exported.folder, tmp_path / "optimized.onnx")
    matrices = [node for node in graph.node if node.op_type == "Gemm"]
    assert len(matrices) == 2 * 7 + 1
    constant = {tensor.name: tensor for tensor in graph.initializer}
    assert all(constant[node.input[1]].data_type == onnx.TensorProto.FLOAT for node in matrices)
    # The rows of the embedding are decoded as they are looked up, once in the graph.
    counts = _operators(graph)
    assert {name: counts[name] for name in DECODING if counts[name]} == dict.fromkeys(
        ("GatherElements", "MatMulInteger", "ScatterND"), 1
    ) | {"CumSum": 2}


def test_stream_leaves_all_matrices_packed(export_tied: Callable[[str], Any], tmp_path: Path) -> None:
    exported = export_tied("stream")
    graph = _optimized(exported.folder, tmp_path / "optimized.onnx")
    assert _operators(graph)["Scan"] == 2 * 7 + 1
    assert sum(node.op_type == "Gemm" for node in _nested(graph)) == 2 * 7 + 1
    entries = exported.model.entries
    largest = max(e.spec.code_bytes for e in entries.values() if isinstance(e.spec, ir.CodebookSpec))
    floats = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert all("cache" in t.name or 4 * np.prod(t.dims) < largest / 4 for t in floats)


def test_both_bodies_store_the_same(export_tied: Callable[[str], Any]) -> None:
    fold, stream = export_tied("fold"), export_tied("stream")
    assert (fold.folder / "model.onnx.data").read_bytes() == (stream.folder / "model.onnx.data").read_bytes()
    assert any("when it loads the model" in note for note in fold.plan.notes)
    assert any("decoded in every run" in note for note in stream.plan.notes)


def test_a_codebook_per_column_with_biases(export_tiny: Callable[..., Any], verify: Verify) -> None:
    def choose(name: str) -> str:
        return "codebook-mixed/columns+scale+outliers" if _module(name) else ""

    exported = export_tiny(choose, family="qwen2", tied=False)
    verify(exported)
    types = exported.plan.types
    assert types["lm_head.weight"] == types["model.layers.0.mlp.up_proj.weight"] == "CodebookMatMul"
    # 389 codes in a channel of the head: the last byte of a plane is not full.
    assert exported.model.entries["lm_head.weight"].spec.shape == (389, 64)
    assert types["model.embed_tokens.weight"] == "F32"
    assert any("stored as FP32: codebook per column." in note for note in exported.plan.notes)


def test_parts_of_one_product_in_all_forms(
    export_tiny: Callable[..., Any], verify: Verify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"q_proj": "bfp4/32", "k_proj": "codebook-mixed", "o_proj": "codebook2/columns", "up_proj": "codebook8"}

    def choose(name: str) -> str:
        return kinds.get(_module(name), "")

    exported = export_tiny(choose, hidden=48, num_attention_heads=3, num_key_value_heads=1, dtype="float16")
    verify(exported)
    types = exported.plan.types
    assert [types[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"] == [
        "MatMulNBits 4-bit",
        "CodebookMatMul",
        "F16",
    ]
    assert _operators(_graph(exported.folder))["Concat"] == 2

    # One weight of the float graph changes: of q (integers), of k (codebooks), of v (halves).
    source = build_graph(exported.model, tmp_path)
    assert source.folder is not None
    data = np.memmap(source.folder / "model.onnx.data", np.float32, "r+")
    entry = next(t for t in _graph(source.folder).initializer if "qkv_proj.MatMul" in t.name)
    offset = int(next(e.value for e in entry.external_data if e.key == "offset")) // 4
    monkeypatch.setattr("anyquant.exporters.onnx.graph_source.build_graph", lambda *_: source)
    for column, projection in ((47, "q"), (48 + 7, "k"), (48 + 16, "v")):
        kept, data[offset + column] = float(data[offset + column]), 1
        with pytest.raises(ExportRefused, match=f"{projection}_proj.weight: 1 of .* differ"):
            ONNXExporter().export(exported.model, tmp_path / "out", ExportOptions())
        data[offset + column] = kept


def test_a_tensor_that_the_graph_cuts_is_stored_once(export_tiny: Callable[..., Any], verify: Verify) -> None:
    def choose(name: str) -> str:
        return "codebook-mixed+outliers" if _module(name) in ("qkv_proj", "gate_up_proj", "embed_tokens") else ""

    exported = export_tiny(choose, family="phi3", tied=False, original_max_position_embeddings=256)
    verify(exported)
    operators = _operators(_graph(exported.folder))
    assert operators["CodebookMatMul"] == 2 * 2
    assert operators["CodebookGather"] == 1
    assert operators["Slice"] >= 2 * 2


def test_a_plan_without_values_promises_the_same(export_tied: Callable[[str], Any]) -> None:
    exported = export_tied("fold")
    model = exported.model
    empty = ir.Model(None, model.config, model.method, {}, model.source, model.entries, model.aliases, model.files)
    for fallback in ("fold", "stream"):
        assert ONNXExporter().check(empty, ExportOptions(fallback=fallback)) == export_tied(fallback).plan


def _change(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    change(proto)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("op_type", "name", "value"),
    [
        ("CodebookMatMul", "K", 1 << 40),
        ("CodebookMatMul", "K", -1),
        ("CodebookMatMul", "N", 0),
        ("CodebookMatMul", "transB", 2),
        ("CodebookMatMul", "transB", 0),
        ("CodebookMatMul", "K", 1 << 62),
    ],
)
def test_nodes_that_contradict_their_data(
    export_tied: Callable[[str], Any], tmp_path: Path, op_type: str, name: str, value: int
) -> None:
    folder = Path(shutil.copytree(export_tied("fold").folder, tmp_path / "model"))

    def change(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            for attribute in node.attribute:
                if node.op_type == op_type and attribute.name == name:
                    attribute.i = value

    _change(folder, change)
    with pytest.raises(CorruptFileError, match=r"model\.onnx: model\."):
        dict(ONNXExporter().read(folder))


def test_inputs_that_are_missing_or_no_constants(export_tied: Callable[[str], Any], tmp_path: Path) -> None:
    whole = export_tied("stream").folder

    def shorten(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            if node.op_type == "CodebookMatMul":
                del node.input[5:]

    def feed(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            if node.op_type == "CodebookMatMul":
                node.input[1] = "input_ids"

    for change in (shorten, feed):
        folder = Path(shutil.copytree(whole, tmp_path / change.__name__))
        _change(folder, change)
        with pytest.raises(CorruptFileError, match=r"model\.onnx: model\."):
            dict(ONNXExporter().read(folder))


def test_a_bias_that_is_not_ours(export_tied: Callable[[str], Any], tmp_path: Path) -> None:
    """The file's values would be equal, but not what it computes."""

    def change(proto: onnx.ModelProto) -> None:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), "one"))
        next(node for node in proto.graph.node if node.op_type == "CodebookMatMul").input[8] = "one"

    folder = Path(shutil.copytree(export_tied("stream").folder, tmp_path / "model"))
    _change(folder, change)
    with pytest.raises(CorruptFileError, match=r"bias is not the zero"):
        dict(ONNXExporter().read(folder))
