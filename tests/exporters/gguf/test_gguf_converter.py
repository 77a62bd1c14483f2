"""Models from Hugging Face: names, rows and values against llama.cpp's own converter, and its failures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file

from anyquant import ir
from anyquant.checkpoint.gguf_names import is_conv1d
from anyquant.errors import (
    CorruptFileError,
    ExportRefused,
    InputError,
    MachineError,
    MissingDependency,
    UnknownArchitecture,
    UsageError,
)
from anyquant.exporters.gguf import GGUFExporter, container, converter, metadata
from anyquant.exporters.protocol import ExportOptions
from anyquant.gguf_container import parse

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Converts several folders in one process, as most of a conversion is the import of torch.
BATCH = """
import runpy, sys
script, *folders = sys.argv[1:]
for folder in folders:
    sys.argv = [script, folder, "--outtype", "f32", "--outfile", folder + ".gguf", "--model-name", "tiny"]
    runpy.run_path(script, run_name="__main__")
"""


def _llama_cpp(*folders: Path) -> list[Path]:
    """Convert checkpoint folders with llama.cpp's converter to F32."""
    script = converter.find_converter()
    command = [sys.executable, "-c", BATCH, str(script), *map(str, folders)]
    environment = {**os.environ, "PYTHONPATH": str(script.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [Path(f"{folder}.gguf") for folder in folders]


def _dequantized(checkpoint: Path, model: ir.Model, folder: Path) -> Path:
    """Write a copy of a checkpoint that holds the IR's values."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(checkpoint / "model.safetensors")
    for name in weights:
        values = model.dequantize(name)
        conv1d = is_conv1d(model.config["model_type"], name)
        weights[name] = np.ascontiguousarray(values.T if conv1d else values)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "gpt2":  # the converter insists on a key that newer transformers don't write
        (folder / "config.json").write_text(json.dumps({**config, "n_ctx": config["n_positions"]}))
    return folder


def _tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        t.name: (t.tensor_type.name, tuple(t.shape.tolist()), np.asarray(t.data).tobytes())
        for t in GGUFReader(path).tensors
    }


@pytest.fixture(scope="module")
def byte_level(
    tiny_checkpoint: Callable[..., Path], with_smol_tokenizer: Callable[[Path], Path]
) -> Callable[[str], Path]:
    """byte_level(family) -> tiny checkpoint with a byte-level vocabulary that the converter knows."""
    return lambda family: with_smol_tokenizer(tiny_checkpoint(family, vocab_size=49152))


@pytest.fixture(scope="module")
def sentence_pieces(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """sentence_pieces(family) -> tiny checkpoint with a tokenizer.model, which some families must have."""
    import sentencepiece

    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp("pieces") / family
        shutil.copytree(tiny_checkpoint(family), folder)
        (folder / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 9)
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text"),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=300,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=9,
        )
        return folder

    return make


@pytest.fixture(scope="module")
def exported(
    tiny_checkpoint: Callable[..., Path],
    ir_of_folder: Callable[..., ir.Model],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[ir.Model, Path, Path]:
    """A tiny llama: its IR, our file in layout f32, and the converter's file of the same values."""
    tmp_path = tmp_path_factory.mktemp("llama")
    # Rotary scaling as in Llama 3.1, which in GGUF is a tensor that the converter makes.
    checkpoint = tiny_checkpoint("llama", rope_parameters={"rope_theta": 10000.0, **LLAMA3})
    model = ir_of_folder(checkpoint, tmp_path / "ir")
    GGUFExporter().export(model, tmp_path / "ours.gguf", ExportOptions("f32"))
    (theirs,) = _llama_cpp(_dequantized(checkpoint, model, tmp_path / "tiny"))
    return model, tmp_path / "ours.gguf", theirs


@pytest.mark.slow
def test_the_whole_file_is_the_converter_s(exported: tuple[ir.Model, Path, Path]) -> None:
    """Tensors bit for bit; key-values byte for byte, but for the name and what we add."""
    _, ours, theirs = exported
    assert _tensors(ours) == _tensors(theirs)
    mine = parse(ours.read_bytes(), "ours").values
    reference = parse(theirs.read_bytes(), "theirs").values
    assert {k for k in mine if k not in reference} == {
        f"anyquant.{k}" for k in ("version", "method", "settings", "layout", "source_name", "source_fingerprint")
    }
    assert {k: mine.get(k) for k in reference} == reference
    assert "tokenizer.chat_template" in mine


@pytest.mark.slow
def test_rotary_factors_made_from_a_config_are_the_converter_s(exported: tuple[ir.Model, Path, Path]) -> None:
    sizes = {"num_attention_heads": 4, "hidden_size": 64}
    (made,) = metadata._rotary_factors({**sizes, "rope_theta": 10000.0, "rope_scaling": LLAMA3})
    type_name, shape, data = _tensors(exported[2])[made[0]]
    assert (type_name, shape) == made[1:3]
    np.testing.assert_allclose(np.frombuffer(made[3], "<f4"), np.frombuffer(data, "<f4"), rtol=1e-6)


@pytest.mark.slow
def test_every_layout_of_a_hugging_face_source(exported: tuple[ir.Model, Path, Path], tmp_path: Path) -> None:
    model = exported[0]
    exporter = GGUFExporter()
    for layout in ("native", "f32", "f16"):
        plan = exporter.export(model, tmp_path / layout, ExportOptions(layout))
        assert plan.bytes == (tmp_path / layout).stat().st_size
        assert plan == exporter.check(model, ExportOptions(layout))
        # Planning from the checkpoint's side files knows the bytes before there are values.
        planned = replace(model, path=None, _readers={})
        assert exporter.check(planned, ExportOptions(layout)).bytes == plan.bytes
        found = {name: ir.digest(values) for name, values in exporter.read(tmp_path / layout)}
        assert found == {name: entry.sha256 for name, entry in model.entries.items()}


@pytest.mark.slow
def test_names_rows_and_values_of_other_families_are_the_converter_s(
    tiny_checkpoint: Callable[..., Path],
    byte_level: Callable[[str], Path],
    sentence_pieces: Callable[[str], Path],
    ir_of_folder: Callable[..., ir.Model],
    tmp_path: Path,
) -> None:
    """Key-values come from the converter's file here, as if from a GGUF source, to run it only once for all."""
    checkpoints = {"mistral": tiny_checkpoint("mistral"), "untied": tiny_checkpoint("llama", tied=False)}
    checkpoints |= {
        "biased": tiny_checkpoint("llama", attention_bias=True),
        "many": tiny_checkpoint("llama", head_dim=32, num_key_value_heads=1),
    }
    checkpoints |= {family: sentence_pieces(family) for family in ("qwen2", "qwen3", "phi3", "gemma2")}
    checkpoints["gpt2"] = byte_level("gpt2")
    models = {name: ir_of_folder(folder, tmp_path / name / "ir") for name, folder in checkpoints.items()}
    theirs = _llama_cpp(
        *(_dequantized(checkpoints[name], model, tmp_path / name / "tiny") for name, model in models.items())
    )
    exporter = GGUFExporter()
    for (name, model), reference in zip(models.items(), theirs, strict=True):
        header = parse(reference.read_bytes(), name)
        source = tmp_path / name / "source.gguf"
        source.write_bytes(container.header_bytes(header.values, []))
        with_source = replace(model, files={"source.gguf": source})
        path = tmp_path / name / "ours.gguf"
        # Norms of Gemma that are no short floats are rounded in GGUF, here as by the converter.
        plan = exporter.export(with_source, path, ExportOptions("f32", allow_rounding=name == "gemma2"))
        assert plan.bytes == path.stat().st_size
        assert _tensors(path) == _tensors(reference), name
        if name == "gemma2":
            continue
        native = tmp_path / name / "native.gguf"
        exporter.export(with_source, native, ExportOptions("native"))
        found = {tensor: ir.digest(values) for tensor, values in exporter.read(native)}
        assert found == {tensor: entry.sha256 for tensor, entry in model.entries.items()}, name


@pytest.mark.slow
def test_gpt2_with_a_byte_level_vocabulary(
    byte_level: Callable[[str], Path], ir_of_folder: Callable[..., ir.Model], tmp_path: Path
) -> None:
    model = ir_of_folder(byte_level("gpt2"), tmp_path / "ir")
    plan = GGUFExporter().export(model, tmp_path / "x.gguf", ExportOptions())
    assert plan.types["transformer.h.0.attn.c_attn.weight"] == "Q4_0"
    assert plan.types["transformer.wpe.weight"] == "F32"
    header = parse((tmp_path / "x.gguf").read_bytes(), "x")
    assert header.get("general.architecture") == "gpt2"
    assert header.get("tokenizer.ggml.pre") == "smollm"
    assert header.get("general.name") == "tiny"
    assert header.get("gpt2.context_length") == 256
    assert header.get("gpt2.feed_forward_length") == 96


@pytest.mark.slow
def test_an_unknown_pre_tokenizer_is_an_error_that_says_what_to_do(
    byte_level: Callable[[str], Path], ir_of_folder: Callable[..., ir.Model], tmp_path: Path
) -> None:
    """The same vocabulary with words that are not split is none that the converter knows."""
    checkpoint = byte_level("llama")
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = False
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = ir_of_folder(checkpoint, tmp_path / "ir")
    with pytest.raises(ExportRefused, match=r"(?s)BPE pre-tokenizer was not recognized.*LLAMA_CPP_ROOT"):
        GGUFExporter().check(model, ExportOptions())


@pytest.fixture
def small(save_ir: Callable[..., ir.Model], tmp_path: Path) -> ir.Model:
    tensors = {"model.norm.weight": ir.Tensor(ir.DenseSpec((4,), "F32"), {".dense": np.ones(4, np.float32)})}
    files = {"tokenizer.json": b"{}", "chat_template.jinja": b"x", "vocab.bin": b"", "source.txt": b""}
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


def test_where_a_chat_template_may_be(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    assert converter.has_chat_template({"chat_template.jinja": path})
    assert not converter.has_chat_template({})
    for text, expected in [('{"chat_template": "x"}', True), ("{}", False), ("{", False), ("[]", False)]:
        path.write_text(text)
        assert converter.has_chat_template({path.name: path}) is expected
