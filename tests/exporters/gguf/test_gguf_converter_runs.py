"""What llama.cpp's converter gets to see, and what becomes of its failures; converters made for the purpose."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import (
    CorruptFileError,
    ExportRefused,
    InputError,
    MachineError,
    MissingDependency,
    UnknownArchitecture,
    UsageError,
)
from anyquant.exporters.gguf import GGUFExporter, container, converter
from anyquant.exporters.protocol import ExportOptions


@pytest.fixture
def small(save_ir: Callable[..., ir.Model], tmp_path: Path) -> ir.Model:
    tensors = {"model.norm.weight": ir.Tensor(ir.DenseSpec((4,), "F32"), {".dense": np.ones(4, np.float32)})}
    vocabulary = b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
    files = {"tokenizer.json": vocabulary, "chat_template.jinja": b"x", "vocab.bin": b"", "source.txt": b""}
    files |= {"tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}, "bos_token": "a"}'}
    files |= {"evil.py": b"", "evil.pkl": b"", "model.safetensors.index.json": b"{}"}
    config = {"model_type": "llama", "quantization_config": {}, "auto_map": {"AutoConfig": "evil.Config"}}
    config |= {"text_config": {"architectures": ["ChatGLMModel"]}, "configuration_files": ["tokenizer.json"]}
    return save_ir(tmp_path / "ir", tensors, config, files=files)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """fake(code) -> a converter made of this code, found through LLAMA_CPP_ROOT."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    monkeypatch.setenv(converter.ROOT_VARIABLE, str(folder))

    def make(code: str) -> Path:
        lines = ["import sys, os, json, pathlib", "folder = pathlib.Path(sys.argv[1])"]
        lines += ["output = pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1])", code]
        (folder / converter.SCRIPT).write_text("\n".join(lines))
        return folder

    return make


def _writes(raw_value: Callable[[object], bytes], **values: object) -> str:
    content = container.header_bytes({key.replace("__", "."): raw_value(value) for key, value in values.items()}, [])
    return f"output.write_bytes({content!r})"


def test_the_converter_sees_side_files_and_no_weights(
    small: ir.Model, fake: Callable[[str], Path], raw_value: Callable[[object], bytes], tmp_path: Path
) -> None:
    values = {"general__architecture": "llama", "tokenizer__ggml__tokens": ["a"], "tokenizer__chat_template": "x"}
    log = tmp_path / "log.json"
    fake(
        f"config = json.loads((folder / 'config.json').read_text())\n"
        f"tokenizer = json.loads((folder / 'tokenizer_config.json').read_text())\n"
        f"seen = [sorted(os.listdir(folder)), config, tokenizer, sys.argv[-2:], os.environ['HF_HUB_OFFLINE']]\n"
        f"log = pathlib.Path({str(log)!r})\n"
        f"assert not log.exists()\n"  # a second run for the same model would be a waste
        f"log.write_text(json.dumps(seen))\n" + _writes(raw_value, **values)
    )
    plan = GGUFExporter().export(small, tmp_path / "x.gguf", ExportOptions())
    assert plan.temporary_disk > 0
    assert json.loads(log.read_text()) == [
        ["chat_template.jinja", "config.json", "source.txt", "tokenizer.json", "tokenizer_config.json"],
        {"model_type": "llama"},
        {"bos_token": "a"},
        ["--model-name", "tiny"],
        "1",
    ]


@pytest.mark.parametrize("module", ["evil", "{folder}--evil"])
def test_code_in_an_ir_folder_is_not_run(
    save_ir: Callable[..., ir.Model], fake: Callable[[str], Path], tmp_path: Path, module: str
) -> None:
    """The tokenizer is opened as llama.cpp's converter opens it for many families: trusting the folder."""
    marker = tmp_path / "marker"
    reference = f"{module.format(folder=tmp_path / 'ir')}.Tokenizer"
    evil = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Tokenizer: pass"
    tokenizer_config = {"auto_map": {"AutoTokenizer": [reference, reference]}, "tokenizer_class": "Tokenizer"}
    files = {"tokenizer.json": b"{}", "tokenizer_config.json": json.dumps(tokenizer_config).encode()}
    tensors = {"model.norm.weight": ir.Tensor(ir.DenseSpec((4,), "F32"), {".dense": np.ones(4, np.float32)})}
    model = save_ir(tmp_path / "ir", tensors, {"model_type": "llama"}, files={**files, "evil.py": evil.encode()})
    fake(
        "from transformers import AutoTokenizer\n"
        "try: AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
        "except Exception as error: sys.exit(f'opened: {error}')"
    )
    with pytest.raises(ExportRefused, match=r"exit [01]\)"):
        GGUFExporter().check(model, ExportOptions())
    assert not marker.exists()


@pytest.mark.parametrize("classes", [["ChatGLMModel"], ["LlamaForCausalLM", "ChatGLMModel"], [], "LlamaModel", [{}]])
def test_other_classes_than_those_of_the_families_do_not_reach_the_converter(
    small: ir.Model, fake: Callable[[str], Path], tmp_path: Path, classes: object
) -> None:
    fake(f"pathlib.Path({str(tmp_path / 'run')!r}).touch()")
    with pytest.raises(UnknownArchitecture, match=r"architectures in config\.json is .*LlamaForCausalLM"):
        GGUFExporter().check(replace(small, config={**small.config, "architectures": classes}), ExportOptions())
    assert not (tmp_path / "run").exists()


def test_modules_in_the_current_folder_are_not_imported(
    small: ir.Model,
    fake: Callable[[str], Path],
    raw_value: Callable[[object], bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    for folder in (here, here / "sub"):
        (folder / "gguf_trap.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "sub", str(tmp_path)]))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # would hide the converter's own modules
    values = {"general__architecture": "llama", "tokenizer__ggml__tokens": ["a"], "tokenizer__chat_template": "x"}
    folder = fake(
        f"try: import gguf_trap\nexcept ImportError: pass\nimport beside\nassert {str(tmp_path)!r} in sys.path\n"
        "assert pathlib.Path.cwd() == output.parent\n" + _writes(raw_value, **values)
    )
    (folder / "beside.py").touch()
    monkeypatch.setenv(converter.ROOT_VARIABLE, os.path.relpath(folder))
    GGUFExporter().check(small, ExportOptions())
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("print('ERROR: Model Foo is not supported', file=sys.stderr); sys.exit(1)", ExportRefused, "Model Foo is not"),
        ("assert folder == 1", ExportRefused, r"(?s)assert folder == 1.*AssertionError"),
        ("sys.exit('only this')", ExportRefused, r"(?s)exit 1.*only this.*newer checkout"),
        ("pass", ExportRefused, "exit 0"),
        ("output.write_bytes(b'GGUF')", CorruptFileError, "truncated"),
    ],
)
def test_a_failing_converter(
    small: ir.Model, fake: Callable[[str], Path], code: str, error: type[Exception], message: str
) -> None:
    fake(code)
    with pytest.raises(error, match=message):
        GGUFExporter().check(small, ExportOptions())


def test_what_the_converter_must_not_lose(
    small: ir.Model, fake: Callable[[str], Path], raw_value: Callable[[object], bytes]
) -> None:
    exporter = GGUFExporter()
    fake(_writes(raw_value, general__architecture="qwen2", tokenizer__ggml__tokens=["a"]))
    with pytest.raises(UnknownArchitecture, match=r"'qwen2' of model_type 'llama'"):
        exporter.check(small, ExportOptions())
    converter._cache.clear()
    fake(_writes(raw_value, general__architecture="llama"))
    with pytest.raises(ExportRefused, match="no vocabulary"):
        exporter.check(small, ExportOptions())
    converter._cache.clear()
    fake(_writes(raw_value, general__architecture="llama", tokenizer__ggml__tokens=["a"]))
    with pytest.raises(ExportRefused, match=r"chat template, but llama\.cpp's converter lost it"):
        exporter.check(small, ExportOptions())


@pytest.mark.parametrize("width", ["abc", -1, 1 << 40])
def test_an_odd_width_of_gpt2_is_no_traceback(
    small: ir.Model, fake: Callable[[str], Path], raw_value: Callable[[object], bytes], width: object
) -> None:
    values = {"general__architecture": "gpt2", "tokenizer__ggml__tokens": ["a"], "tokenizer__chat_template": "x"}
    fake(_writes(raw_value, **values))
    with pytest.raises(CorruptFileError, match="n_inner of the configuration is"):
        GGUFExporter().check(replace(small, config={"model_type": "gpt2", "n_inner": width}), ExportOptions())


def test_a_converter_that_hangs_or_does_not_start(
    small: ir.Model, fake: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("import time; time.sleep(60)")
    monkeypatch.setattr(converter, "_SECONDS", 0.2)
    with pytest.raises(MachineError, match="did not end within"):
        GGUFExporter().check(small, ExportOptions())
    monkeypatch.setattr(converter.sys, "executable", "/nowhere/python")
    with pytest.raises(MachineError, match="could not be started"):
        GGUFExporter().check(small, ExportOptions())


def test_no_converter_at_all(small: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(converter.ROOT_VARIABLE, raising=False)
    monkeypatch.setattr(converter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"anyquant\[gguf\]"):
        GGUFExporter().check(small, ExportOptions())
    monkeypatch.setenv(converter.ROOT_VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match=r"there is no convert_hf_to_gguf\.py in it"):
        GGUFExporter().check(small, ExportOptions())


def test_models_without_tokenizer(small: ir.Model) -> None:
    with pytest.raises(InputError, match="no tokenizer files"):
        GGUFExporter().check(replace(small, files={}), ExportOptions())
