"""The library of operators beside an exported model, and who loads it: onnx_session, validate, onnxruntime-genai."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import anyquant
from anyquant import ir
from anyquant.errors import CorruptFileError, InputError, MachineError, UsageError
from anyquant.exporters.onnx import ONNXExporter
from anyquant.exporters.protocol import ExportOptions
from anyquant.runtime import native
from anyquant.runtime.onnx_session import LIBRARY, operators
from anyquant.validation.gates import LOGIT_SCALE, MAX_ABS_LOGIT
from anyquant.validation.runners.onnxruntime import OnnxRuntimeRunner

if TYPE_CHECKING:
    from tests.conftest import RealSkim

needs_library = pytest.mark.skipif(
    native.path_of(LIBRARY) is None, reason=f"no compiled operators: {native.missing(LIBRARY)}"
)
WITH = ExportOptions(with_runtime=True)
Export = Callable[..., Any]


def _codebooks(name: str) -> str:
    return "codebook-mixed+scale+outliers" if "_proj" in name else ""


@pytest.fixture(scope="module")
def exported(export_tiny: Export) -> Any:
    return export_tiny(_codebooks, WITH)


@pytest.fixture
def folder(exported: Any, tmp_path: Path) -> Path:
    """A copy to change, of links where nothing will be."""
    for path in exported.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def _config(folder: Path) -> dict[str, Any]:
    options: dict[str, Any] = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    return options["session_options"]


@needs_library
def test_the_library_lies_beside_the_model(exported: Any, verify: Callable[[Any], None]) -> None:
    verify(exported)  # without the library
    assert exported.plan.files[LIBRARY] == operators().stat().st_size
    assert (exported.folder / LIBRARY).read_bytes() == operators().read_bytes()
    assert _config(exported.folder)["custom_ops_library"] == LIBRARY


@needs_library
def test_a_plain_folder_has_it_too(export_tiny: Export) -> None:
    exported = export_tiny(_codebooks, ExportOptions(with_runtime=True, flavor="plain"))
    assert {path.name for path in exported.folder.iterdir()} >= {LIBRARY, "model.onnx"}
    assert not (exported.folder / "genai_config.json").exists()


@needs_library
def test_models_without_codebooks_need_none(export_tiny: Export) -> None:
    exported = export_tiny(lambda name: "bfp4/32" if "_proj" in name else "", WITH)
    assert not (exported.folder / LIBRARY).exists()
    assert "custom_ops_library" not in _config(exported.folder)
    assert any("none is put beside it" in note for note in exported.plan.notes)


@needs_library
def test_onnx_session_runs_the_kernels(
    exported: Any,
    logits_of: Callable[[Any], tuple[np.ndarray, np.ndarray]],
    feeds_of: Callable[..., dict[str, np.ndarray]],
    tmp_path: Path,
) -> None:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = anyquant.onnx_session(exported.folder, options)
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "CodebookMatMul" for node in nodes) == 14
    feeds = feeds_of(exported.folder, exported.model.config)
    found = session.run(["logits"], feeds)[0]
    assert np.abs(found - logits_of(exported)[1]).max() <= 1e-3
    again = anyquant.onnx_session(exported.folder / "model.onnx").run(["logits"], feeds)[0]
    assert np.array_equal(again, found)
    with_pairs = anyquant.onnx_session(exported.folder, providers=[("CPUExecutionProvider", {})])
    assert np.array_equal(with_pairs.run(["logits"], feeds)[0], found)
    with pytest.raises(UsageError, match="these options have been used for a session before"):
        anyquant.onnx_session(exported.folder, options)
    with pytest.raises(UsageError, match="no execution provider is named"):
        anyquant.onnx_session(exported.folder, providers=())


@needs_library
def test_validate_runs_what_was_exported(
    exported: Any,
    folder: Path,
    logits_of: Callable[[Any], tuple[np.ndarray, np.ndarray]],
    feeds_of: Callable[..., dict[str, np.ndarray]],
) -> None:
    tokens = feeds_of(folder, exported.model.config)["input_ids"][0]
    expected = logits_of(exported)[1][0]
    runner = OnnxRuntimeRunner("ONNX", folder, threads=2)
    assert runner.runtime.endswith(" with our kernels")
    assert np.abs(runner.logits(tokens) - expected).max() <= 1e-3
    (folder / LIBRARY).unlink()
    runner = OnnxRuntimeRunner("ONNX", folder, threads=2)
    assert "kernels" not in runner.runtime
    assert np.abs(runner.logits(tokens) - expected).max() <= 1e-3


@needs_library
def test_a_library_that_is_not_ours_is_not_run(folder: Path) -> None:
    (folder / LIBRARY).unlink()
    (folder / LIBRARY).write_bytes(b"\x7fELF")
    with pytest.raises(InputError, match=f"{LIBRARY} is not the library of this anyquant, and is not run"):
        OnnxRuntimeRunner("ONNX", folder, threads=2)
    anyquant.onnx_session(folder)  # takes the installed one
    (folder / LIBRARY).unlink()
    (folder / LIBRARY).mkdir()
    with pytest.raises(InputError, match="is not the library of this anyquant"):
        OnnxRuntimeRunner("ONNX", folder, threads=2)
    folder = folder.rename(folder.with_name("model.onnx"))  # the name says nothing
    anyquant.onnx_session(folder)


def test_a_library_that_cannot_be_loaded(exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LIBRARY).write_bytes(b"not a library")
    monkeypatch.setattr(native, "path_of", lambda name: tmp_path / name)
    with pytest.raises(MachineError, match=f"ONNX Runtime cannot load .*{LIBRARY}"):
        anyquant.onnx_session(exported.folder)


@needs_library
def test_without_a_compiled_library(
    exported: Any,
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    feeds_of: Callable[..., dict[str, np.ndarray]],
    logits_of: Callable[[Any], tuple[np.ndarray, np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ANYQUANT_NATIVE", "0")
    target = tmp_path_factory.mktemp("refused") / "out"
    for call in (lambda: ONNXExporter().check(exported.model, WITH), lambda: _export(exported.model, target)):
        with pytest.raises(MachineError, match="operators for ONNX Runtime are not available: switched off by"):
            call()
    assert not target.exists()
    with pytest.raises(MachineError, match="are not available"):
        OnnxRuntimeRunner("ONNX", folder, threads=2)
    with pytest.warns(RuntimeWarning, match=r"model\.onnx runs without our kernels: .*switched off"):
        session = anyquant.onnx_session(folder)
    found = session.run(["logits"], feeds_of(folder, exported.model.config))[0]
    assert np.abs(found - logits_of(exported)[1]).max() <= 1e-3


def _export(model: ir.Model, path: Path) -> object:
    return ONNXExporter().export(model, path, WITH)


def test_onnx_session_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no"):
        anyquant.onnx_session(tmp_path / "none")
    with pytest.raises(CorruptFileError, match="holds no ONNX model"):
        anyquant.onnx_session(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"not protobuf at all")
    with pytest.raises(InputError, match=r"ONNX Runtime .* cannot load"):
        anyquant.onnx_session(tmp_path)


@pytest.fixture(scope="module")
def real(real_skim: RealSkim, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "smollm2"
    _export(ir.open_ir(real_skim.folder), path)
    return path


QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@needs_library
@pytest.mark.slow
def test_smollm2(real_skim: RealSkim, real: Path, real_text: Path) -> None:
    """Logits of the kernels against PyTorch on the dequantized weights; and genai writes the same tokens."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_skim.folder)
    ids = np.array(tokenizer(real_text.read_text(encoding="utf-8")[:1000])["input_ids"][:48])
    with torch.no_grad():
        model = anyquant.load(real_skim.folder, dequantize=True)
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    runner = OnnxRuntimeRunner("ONNX", real, threads=2)
    found = runner.logits(ids)
    limit = MAX_ABS_LOGIT * max(1.0, float(np.abs(expected).max()) / LOGIT_SCALE)
    assert np.abs(found - expected).max() <= limit
    assert (found.argmax(-1) == expected.argmax(-1)).all()

    genai = pytest.importorskip("onnxruntime_genai")
    maps, beside = Path("/proc/self/maps"), f"{real / LIBRARY}\n"
    assert beside not in maps.read_text()  # the runner has the installed one
    network = genai.Model(str(real))
    assert beside in maps.read_text()
    parameters = genai.GeneratorParams(network)
    parameters.set_search_options(max_length=64, do_sample=False)
    generator = genai.Generator(network, parameters)
    question = tokenizer(QUESTION)["input_ids"]
    generator.append_tokens(question)
    tokens: list[int] = []
    while not generator.is_done() and len(tokens) < 16:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    assert tokens == runner.generate(question, len(tokens))
