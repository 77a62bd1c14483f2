"""Models from Hugging Face: names, rows and values against llama.cpp's own converter."""

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
    """Tensors bit for bit; key-values byte for byte, but for the name, what we add and what it leaves out."""
    _, ours, theirs = exported
    assert _tensors(ours) == _tensors(theirs)
    mine = parse(ours.read_bytes(), "ours").values
    reference = parse(theirs.read_bytes(), "theirs").values
    ours_alone = {"tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"} | {
        f"anyquant.{k}" for k in ("version", "method", "settings", "layout", "source_name", "source_fingerprint")
    }
    assert {k for k in mine if k not in reference} == ours_alone
    assert {k for k in reference if mine.get(k) != reference[k]} == {"tokenizer.ggml.scores"}
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
