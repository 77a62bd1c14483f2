"""What the exporter refuses, and what it leaves behind when something fails: nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import (
    AnyquantError,
    CorruptFileError,
    ExportRefused,
    MachineError,
    MissingDependency,
    UnknownArchitecture,
    UsageError,
)
from anyquant.exporters.onnx import ONNXExporter, graph_source, graph_worker, write
from anyquant.exporters.protocol import ExportOptions


@pytest.fixture(scope="module")
def model(tiny_llama: Path, make_ir: Callable[..., ir.Model]) -> ir.Model:
    """BFP4 matrices, the rest floats."""
    return make_ir(tiny_llama, lambda name: "bfp4/32" if "_proj" in name else "")


class _FakeBuilder:
    """Stands in for the child process: writes the result it is told, and the float graph if it has one."""

    def __init__(self, result: dict[str, Any] | None, code: int = 1, stderr: str = "") -> None:
        self.result, self.code, self.stderr = result, code, stderr

    def __call__(self, command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        request = json.loads(Path(command[-1]).read_text())
        assert command[1] == "-P"
        assert settings["env"]["HF_HUB_OFFLINE"] == "1"
        if self.result is not None:
            Path(request["result"]).write_text(json.dumps(self.result))
        return subprocess.CompletedProcess(command, self.code, "", self.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions("int3"), "unknown layout 'int3'"),
        (ExportOptions(flavor="transformers.js"), "cannot write flavor 'transformers.js'"),
        (ExportOptions(accuracy_level=7), "accuracy level 7"),
        (ExportOptions(fallback="unfold"), "unknown fallback 'unfold'"),
    ],
)
def test_unknown_options(model: ir.Model, tmp_path: Path, options: ExportOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ONNXExporter().check(model, options)
    with pytest.raises(UsageError, match=message):
        ONNXExporter().export(model, tmp_path / "out", options)


def test_existing_folder_and_plans_are_refused(model: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    with pytest.raises(UsageError, match="exists and is not empty"):
        ONNXExporter().export(model, tmp_path, ExportOptions())
    plan = ir.Model(None, model.config, "block", {}, {}, model.entries, model.aliases)
    with pytest.raises(UsageError, match="holds no values"):
        ONNXExporter().export(plan, tmp_path / "out", ExportOptions())
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_f16_refuses_what_it_would_round(tiny_llama: Path, make_ir: Callable[..., ir.Model], tmp_path: Path) -> None:
    # Affine values (q - zero) * scale have up to 8 more significant bits than their FP16 scale.
    model = make_ir(tiny_llama, lambda name: "affine8/32" if "up_proj" in name else "")
    with pytest.raises(ExportRefused, match=r"cannot write 2 of .*\n.*not exact in FP16[\s\S]*--allow-rounding"):
        ONNXExporter().export(model, tmp_path / "out", ExportOptions("f16"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("builder", "error", "message"),
    [
        (_FakeBuilder({"error": "architecture", "message": "x"}), UnknownArchitecture, "'LlamaForCausalLM'"),
        (_FakeBuilder({"error": "missing", "message": "x", "module": "torch"}), MissingDependency, "'torch'"),
        (_FakeBuilder({"error": "machine", "message": "OSError: disk"}), MachineError, "OSError: disk"),
        (_FakeBuilder({"error": "fault", "message": "KeyError: 'x'"}, 1, "last line"), AnyquantError, "last line"),
        (_FakeBuilder(None, -9), MachineError, "killed .exit code -9"),
        (_FakeBuilder(None, 3), AnyquantError, "exit code 3"),
    ],
)
def test_failures_of_the_builder(
    model: ir.Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    builder: _FakeBuilder,
    error: type[AnyquantError],
    message: str,
) -> None:
    monkeypatch.setattr(graph_source.subprocess, "run", builder)  # type: ignore[attr-defined]
    monkeypatch.setattr(graph_source, "_skeletons", {})
    with pytest.raises(error, match=message) as caught:
        ONNXExporter().export(model, tmp_path / "out", ExportOptions())
    assert type(caught.value) is error
    with pytest.raises(error, match=message):
        ONNXExporter().check(model, ExportOptions())
    assert not list(tmp_path.iterdir())


def test_child_does_not_import_from_the_current_folder(
    model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, nearby, work = (tmp_path / name for name in ("here", "here/nearby", "work"))
    for folder in (here, nearby, work):
        folder.mkdir()
    for folder in (here, nearby):
        (folder / "wave.py").write_text("open('executed', 'w').close()")
    monkeypatch.chdir(here)
    monkeypatch.setattr(graph_source, "WORKER", "wave")  # of the standard library
    for path in (None, "", f"{os.pathsep}nearby", "."):
        monkeypatch.setenv("PYTHONPATH", path) if path is not None else monkeypatch.delenv("PYTHONPATH", raising=False)
        with pytest.raises(AnyquantError, match="exit code"):
            graph_source._run(model, work, values=False)
        assert sorted(p.name for p in here.iterdir()) == ["nearby", "wave.py"]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"head_dim": [64]}, "head_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"hidden_size": "abc", "num_attention_heads": 4}, "hidden_size"),
        ({"hidden_size": 64}, "num_attention_heads"),
        ({"hidden_size": 64, "num_attention_heads": "abc"}, "num_attention_heads"),
        ({"hidden_size": 64, "num_attention_heads": 0}, "num_attention_heads"),
    ],
)
def test_config_that_makes_no_sense(model: ir.Model, tmp_path: Path, config: dict[str, Any], key: str) -> None:
    hostile = replace(model, config={"architectures": ["LlamaForCausalLM"], **config})
    with pytest.raises(CorruptFileError, match=key):
        ONNXExporter().check(hostile, ExportOptions())
    with pytest.raises(CorruptFileError, match=key):
        ONNXExporter().export(hostile, tmp_path / "out", ExportOptions())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnx_ir", "onnxruntime_genai"])
def test_missing_packages(model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    found = graph_source.importlib.util.find_spec  # type: ignore[attr-defined]
    monkeypatch.setattr(
        graph_source.importlib.util,  # type: ignore[attr-defined]
        "find_spec",
        lambda name: None if name == package else found(name),
    )
    with pytest.raises(MissingDependency, match=package.replace("_", "-")):
        ONNXExporter().check(model, ExportOptions())
    with pytest.raises(MissingDependency, match="pip install"):
        ONNXExporter().export(model, tmp_path / "out", ExportOptions())


def test_too_little_disk(model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: usage(10, 9, 1))  # type: ignore[attr-defined]
    need = f"{graph_source.temporary_disk(model):,} bytes in .* and 1 are free"
    with pytest.raises(MachineError, match=need):
        ONNXExporter().export(model, tmp_path / "out", ExportOptions())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_failures_while_writing(model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    made.mkdir()
    source = graph_source.build_graph(model, made)
    monkeypatch.setattr(graph_source, "build_graph", lambda *_: source)
    out = tmp_path / "out"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(MachineError, match="No space left on device"):
            ONNXExporter().export(model, out, ExportOptions())
    assert [p.name for p in tmp_path.iterdir()] == ["made"]

    steps: list[tuple[str, int, int]] = []
    out.mkdir()  # an empty folder is as good as none
    plan = ONNXExporter().export(model, out, ExportOptions(), lambda *step: steps.append(step))
    assert plan.temporary_disk == graph_source.temporary_disk(model)  # what is required before anything is made
    assert steps[-1][1] == steps[-1][2] == len(steps)
    shutil.rmtree(out)

    # One weight of the float graph changes, of a matrix stored as integers and of one stored as floats.
    assert source.folder is not None
    data = np.memmap(source.folder / "model.onnx.data", np.uint8, "r+")
    for position in (-1, len(data) // 2):
        data[position] ^= 255
        with pytest.raises(ExportRefused, match="differ from the IR's"):
            ONNXExporter().export(model, out, ExportOptions())
        data[position] ^= 255
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tokenizer", [True, False])
def test_worker(
    model: ir.Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tokenizer: bool,
) -> None:
    """The child's code in this process, with everything that it patches put back afterwards."""
    import transformers
    from onnxruntime_genai.models import builder
    from onnxruntime_genai.models.builders import base

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", transformers.PreTrainedModel.from_pretrained)
    monkeypatch.setattr(builder.Model, "save_model", builder.Model.save_model)
    for module in (builder, base, sys.modules[builder.Model.__module__]):
        monkeypatch.setattr(module, "AutoTokenizer", module.AutoTokenizer)
    checkpoint = tmp_path / "checkpoint"
    graph_source._write_checkpoint(model, checkpoint, values=False)
    if not tokenizer:
        (checkpoint / "tokenizer.json").unlink()
    request = {"checkpoint": str(checkpoint), "output": str(tmp_path / "graph"), "result": str(tmp_path / "result")}
    (tmp_path / "request").write_text(json.dumps({**request, "values": False}))
    assert graph_worker.main(str(tmp_path / "request")) == 0
    assert json.loads((tmp_path / "result").read_text()) == {"norm_offset": 0.0}
    assert (tmp_path / "graph" / "model.onnx").exists()
    assert not (tmp_path / "graph" / "model.onnx.data").exists()
    assert (tmp_path / "graph" / "tokenizer.json").exists() == tokenizer

    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchForCausalLM"]}))
    assert graph_worker.main(str(tmp_path / "request")) == 1
    assert json.loads((tmp_path / "result").read_text())["error"] == "architecture"
    assert "NotImplementedError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (ImportError("no torch"), "missing"),
        (NotImplementedError("The x model is not currently supported."), "architecture"),
        (ValueError("Transformers does not recognize this architecture."), "architecture"),
        (MemoryError(), "machine"),
        (OSError(28, "full"), "machine"),
        (TypeError("x"), "fault"),
    ],
)
def test_categories_of_errors(error: BaseException, category: str) -> None:
    assert graph_worker._category(error) == category


def test_temporary_checkpoint(model: ir.Model, tmp_path: Path) -> None:
    """Experts are stacked, transposed tensors turned back, the head untied where the IR holds one of its own."""
    entries = {
        "x.experts#0": ir.Entry(ir.DenseSpec((4, 2), "F32")),
        "x.experts#1": ir.Entry(ir.DenseSpec((4, 2), "F32")),
        "y.weight": ir.Entry(ir.DenseSpec((3, 5), "F32"), source_transposed=True),
        "lm_head.weight": ir.Entry(ir.DenseSpec((3, 5), "F32")),
    }
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=e.spec.shape).astype("<f4") for name, e in entries.items()}
    config = {"tie_word_embeddings": True, "quantization_config": {"x": 1}}
    plan = ir.Model(None, config, "block", {}, {"kind": "huggingface", "name": "x", "fingerprint": "0"}, entries, {})
    made = ir.write_ir(tmp_path / "ir", plan, lambda n: (ir.Tensor(entries[n].spec, {".dense": arrays[n]}), None))
    graph_source._write_checkpoint(made, tmp_path / "checkpoint", values=True)
    written = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert written == {"tie_word_embeddings": False, "torch_dtype": "float32", "dtype": "float32"}
    from safetensors.numpy import load_file

    found = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert np.array_equal(found["x.experts"], np.stack([arrays["x.experts#0"], arrays["x.experts#1"]]))
    assert np.array_equal(found["y.weight"], arrays["y.weight"].T)
    assert sorted(found) == ["lm_head.weight", "x.experts", "y.weight"]
    with pytest.raises(MachineError, match="cannot write the temporary checkpoint"):
        graph_source._write_checkpoint(made, tmp_path / "nowhere" / "checkpoint", values=True)
