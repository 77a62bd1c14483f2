"""SmolLM2 in BFP4, written as ONNX: bytes, values, text from onnxruntime-genai."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from anyquant import ir
from anyquant.exporters.onnx import ONNXExporter
from anyquant.exporters.protocol import ExportOptions, ExportPlan

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(real_ir: Path) -> ir.Model:
    return ir.open_ir(real_ir)


@pytest.fixture(scope="module")
def exported(model: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportPlan, Path]:
    path = tmp_path_factory.mktemp("onnx") / "smollm2"
    return ONNXExporter().export(model, path, ExportOptions()), path


def test_promised_bytes_are_written_and_fewer_than_the_source(
    model: ir.Model, exported: tuple[ExportPlan, Path], real_gguf: Path
) -> None:
    plan, path = exported
    promised = ONNXExporter().check(model, ExportOptions())
    assert promised == plan
    assert plan.files == {name: (path / name).stat().st_size for name in ("model.onnx", "model.onnx.data")}
    assert plan.bytes < real_gguf.stat().st_size
    assert Counter(plan.types.values()) == {"MatMulNBits 4-bit": 210, "MatMulNBits 2 x 4-bit": 1, "F32": 61}


def test_every_tensor_is_equal(model: ir.Model, exported: tuple[ExportPlan, Path]) -> None:
    found = {name: ir.digest(values) for name, values in ONNXExporter().read(exported[1])}
    assert found == {name: entry.sha256 for name, entry in model.entries.items()}


def test_genai_generates_text(exported: tuple[ExportPlan, Path]) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    network = genai.Model(str(exported[1]))
    tokenizer = genai.Tokenizer(network)
    parameters = genai.GeneratorParams(network)
    parameters.set_search_options(max_length=64, do_sample=False)
    generator = genai.Generator(network, parameters)
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    generator.append_tokens(tokenizer.encode(question))
    tokens: list[int] = []
    while not generator.is_done() and len(tokens) < 40:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    assert "France" in tokenizer.decode(np.array(tokens, np.int32))


def test_onnxruntime_folds_scales_and_zero_points_at_load(exported: tuple[ExportPlan, Path], tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
    session = onnxruntime.InferenceSession(exported[1] / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].name == "logits"
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    operators = Counter(node.op_type for node in graph.node)
    assert operators["MatMulNBits"] == 30 * 5 + 2
    stored = {t.name for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            assert all(name in stored for name in node.input[1:] if name)
