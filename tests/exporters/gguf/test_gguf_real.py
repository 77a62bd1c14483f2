"""SmolLM2 in BFP4, written as GGUF: bytes, values, and text from an unmodified llama.cpp."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from anyquant import ir
from anyquant.exporters.gguf import GGUFExporter
from anyquant.exporters.protocol import ExportOptions, ExportPlan
from anyquant.gguf_container import parse

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(real_ir: Path) -> ir.Model:
    return ir.open_ir(real_ir)


@pytest.fixture(scope="module")
def exported(model: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportPlan, Path]:
    path = tmp_path_factory.mktemp("gguf") / "smollm2.gguf"
    return GGUFExporter().export(model, path, ExportOptions()), path


def test_bytes_and_types(model: ir.Model, exported: tuple[ExportPlan, Path], real_gguf: Path) -> None:
    plan, path = exported
    assert Counter(plan.types.values()) == {"Q4_0": 210, "F32": 61, "Q8_0": 1}
    # Q4_1's blocks have 20 bytes, Q4_0's 18; all else is the same.
    weights = sum(e.spec.numel for e in model.entries.values() if e.quantized and e.spec.kind == "block")
    header = parse(path.read_bytes(), "x")
    original = parse(real_gguf.read_bytes(), "y")
    assert path.stat().st_size - header.data_start == real_gguf.stat().st_size - original.data_start - weights // 16
    assert plan.bytes == path.stat().st_size
    tokenizer = [key for key in original.values if key.startswith("tokenizer.")]
    assert {k: header.values[k] for k in tokenizer} == {k: original.values[k] for k in tokenizer}


def test_every_tensor_is_equal(model: ir.Model, exported: tuple[ExportPlan, Path]) -> None:
    found = {name: ir.digest(values) for name, values in GGUFExporter().read(exported[1])}
    assert found == {name: entry.sha256 for name, entry in model.entries.items()}


def test_llama_cpp_loads_it_and_answers(exported: tuple[ExportPlan, Path]) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(exported[1])
    params.n_ctx = 256
    params.n_parallel = 1
    params.cpuparams.n_threads = 2
    params.warmup = False
    params.verbosity = -1
    server = xllamacpp.Server(params)
    question = {"role": "user", "content": "What is the capital of France?"}
    answer = server.handle_chat_completions({"messages": [question], "max_tokens": 16, "temperature": 0})
    assert "Paris" in answer["choices"][0]["message"]["content"]
