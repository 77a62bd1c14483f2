"""What a header says of llama.cpp's arithmetic, and a graph of ONNX Runtime's."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import helper

from anyquant.exporters.gguf.container import bool_value, string_value
from anyquant.exporters.onnx.functions import Steps, matmul_function
from anyquant.gguf_container import Header, TensorInfo
from anyquant.validation.arithmetic import gguf_arithmetic, onnx_arithmetic


def header(metadata: dict[str, str | bool] | None = None, **types: int) -> Header:
    values = {k: bool_value(v) if isinstance(v, bool) else string_value(v) for k, v in (metadata or {}).items()}
    names = {name.replace("__", "."): kind for name, kind in types.items()}
    tensors = {name: TensorInfo(kind, (32,) if "norm" in name else (4, 32), 0) for name, kind in names.items()}
    return Header("x.gguf", values, tensors, 32, 0, 0)


def test_all_f32_is_an_fp32_path() -> None:
    found = gguf_arithmetic(header(token_embd__weight=0, blk__0__ffn_up__weight=0, output_norm__weight=0))
    assert found.kind == "fp32"


def test_a_private_type_with_a_float_head_is_an_fp32_path() -> None:
    assert gguf_arithmetic(header(token_embd__weight=0, blk__0__ffn_up__weight=36)).kind == "fp32"


@pytest.mark.parametrize("kind", [1, 2, 8, 14, 30, 39])
def test_stock_types_and_f16_round(kind: int) -> None:
    assert gguf_arithmetic(header(token_embd__weight=0, blk__0__ffn_up__weight=kind)).kind == "rounded"


def test_an_embedding_rounds_only_where_it_is_the_head() -> None:
    assert gguf_arithmetic(header(token_embd__weight=8, blk__0__ffn_up__weight=0)).kind == "rounded"
    assert gguf_arithmetic(header(token_embd__weight=8, output__weight=0)).kind == "fp32"


@pytest.mark.parametrize("architecture", ["gpt2", "gemma", "gemma2"])
def test_gelu_rounds(architecture: str) -> None:
    found = gguf_arithmetic(header({"general.architecture": architecture}, token_embd__weight=0))
    assert (found.kind, found.rounding) == ("rounded", "")
    assert "GELU" in found.reason


def test_recorded_rounding_relaxes_the_gate_and_is_said() -> None:
    types = {"token_embd__weight": 0}
    allowed = gguf_arithmetic(header({"anyquant.layout": "f16", "anyquant.allow_rounding": True}, **types))
    assert (allowed.kind, allowed.rounding) == ("rounded", "written with --allow-rounding")
    assert gguf_arithmetic(header({"anyquant.layout": "f32", "anyquant.allow_rounding": True}, **types)).rounding != ""
    assert gguf_arithmetic(header({"anyquant.layout": "f16"}, **types)).rounding == ""
    assert (
        gguf_arithmetic(header({"anyquant.layout": "native", "anyquant.allow_rounding": False}, **types)).rounding == ""
    )


def graph_file(folder: Path, nodes: list[onnx.NodeProto], functions: list[onnx.FunctionProto], logits: int = 1) -> Path:
    graph = helper.make_graph(nodes, "g", [], [helper.make_tensor_value_info("logits", logits, ["tokens", 8])])
    imports = [helper.make_opsetid(domain, version) for domain, version in (("", 22), ("anyquant", 1))]
    model = helper.make_model(graph, opset_imports=imports, functions=functions)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


@pytest.mark.parametrize("fallback", ["fold", "stream"])
def test_codebooks_are_an_fp32_path(tmp_path: Path, fallback: str) -> None:
    node = helper.make_node("CodebookMatMul", ["a"], ["logits"], domain="anyquant", K=8, N=8, transB=1)
    function = matmul_function(22, fallback, Steps())
    found = onnx_arithmetic(graph_file(tmp_path, [node, node], [function]))
    assert (found.kind, found.reason) == ("fp32", "the graph computes in FP32 (2 CodebookMatMul)")
    assert onnx_arithmetic(graph_file(tmp_path, [node], [function], logits=10)).kind == "rounded"


def test_rounding_is_found_in_functions_and_in_nested_graphs(tmp_path: Path) -> None:
    rounding = helper.make_node("MatMulNBits", ["a"], ["b"], domain="com.microsoft", accuracy_level=4)
    exact = helper.make_node("MatMulNBits", ["a"], ["b"], domain="com.microsoft", accuracy_level=1)
    nested = helper.make_node(
        "Scan", ["a"], ["b"], num_scan_inputs=1, body=helper.make_graph([rounding], "body", [], [])
    )
    function = helper.make_function("anyquant", "f", ["a"], ["b"], [nested], [helper.make_opsetid("", 22)])
    call = helper.make_node("f", ["a"], ["logits"], domain="anyquant")
    assert onnx_arithmetic(graph_file(tmp_path, [exact, call], [])).kind == "fp32"
    found = onnx_arithmetic(graph_file(tmp_path, [exact, call], [function]))
    assert (found.kind, "1 at level 1, 1 at level 4" in found.reason) == ("rounded", True)
