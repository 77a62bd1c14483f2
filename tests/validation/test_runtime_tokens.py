"""The file's own tokenizer beside the source's."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anyquant import ir
from anyquant.errors import MachineError, ValidationFailed
from anyquant.exporters.gguf import container
from anyquant.gguf_container import parse
from anyquant.validation import ValidationSettings, tokens, validate
from anyquant.validation.runners import RunnerSpec, open_runner
from anyquant.validation.runners.llamacpp import LlamaCppRunner
from anyquant.validation.runners.process import ProcessRunner
from anyquant.validation.texts import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_ir: Path) -> Any:
    return load_tokenizer(tiny_ir)


@pytest.fixture
def altered(tiny_gguf: Path, tmp_path: Path) -> Callable[..., Path]:
    """altered(**key-values) -> a copy of the tiny GGUF file with other key-values of its tokenizer."""

    def write(**values: bytes) -> Path:
        data = tiny_gguf.read_bytes()
        header = parse(data, "tiny")
        ours = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
        listed = [(name, "F32", tensor.shape) for name, tensor in header.tensors.items()]
        path = tmp_path / "altered.gguf"
        path.write_bytes(container.header_bytes(header.values | ours, listed) + data[header.data_start :])
        return path

    return write


def test_llama_cpp_here_and_in_a_process_makes_the_tokens_of_the_source(tiny_gguf: Path, tokenizer: Any) -> None:
    here = LlamaCppRunner("GGUF", tiny_gguf, context=16, threads=1)
    there = ProcessRunner(RunnerSpec("GGUF", "gguf", str(tiny_gguf), 16, 1))
    try:
        text = "".join(tokens.PROBE.values())
        assert here.tokenize(text) == there.tokenize(text) == tokenizer(text)["input_ids"]
        assert here.tokenize("") == []
        special = "<s>user</s>"
        assert here.tokenize(special, special=True) == there.tokenize(special, special=True) != here.tokenize(special)
    finally:
        here.close()
        there.close()
    with pytest.raises(MachineError, match="is closed"):
        here.tokenize("a")


def test_the_probe_is_composed_text_without_names_of_special_tokens() -> None:
    text = "".join(tokens.PROBE.values())
    assert text == unicodedata.normalize("NFC", text)
    assert "<s>" not in text
    assert "<|" not in text


def test_other_tokens_fail_a_gate_and_are_named(
    altered: Callable[..., Path], small_validation: Callable[..., ValidationSettings]
) -> None:
    path = altered(add_bos_token=container.bool_value(True))
    report = validate(small_validation(gguf=path, windows=1, generate=0))
    assert [gate.name for gate in report.failed] == ["same tokens"]
    with pytest.raises(ValidationFailed, match=r"GGUF: .*: token 0 is '<s>' '▁' 'The', of the source's tokenizer '▁' "):
        report.require()
    (note,) = [note for note in report.notes if note.startswith("GGUF: ")]
    assert "llama.cpp" in note
    assert all(name in note for name in tokens.PROBE)
    assert "chat" not in note  # a template brings its own special tokens


def test_lost_special_tokens_are_said_of_chats(altered: Callable[..., Path], tokenizer: Any, tiny_gguf: Path) -> None:
    types = parse(tiny_gguf.read_bytes(), "tiny").get("tokenizer.ggml.token_type")
    runner = open_runner(
        RunnerSpec("GGUF", "gguf", str(altered(token_type=container.array_value(5, [1] * 3 + types[3:]))), 16, 1)
    )
    assert isinstance(runner, LlamaCppRunner)
    (note,) = tokens.probe_notes(tokenizer, runner, "<s>user")
    assert note.startswith("GGUF: in 1 samples of text (chat) llama.cpp")
    assert tokens.probe_notes(tokenizer, runner, None) == []
    runner.close()


def test_a_gguf_source_has_no_other_tokenizer(
    small_validation: Callable[..., ValidationSettings],
    altered: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = ir.open_ir

    def from_gguf(path: Path) -> ir.Model:
        model = opened(path)
        return replace(model, source={**model.source, "kind": "gguf"})

    monkeypatch.setattr("anyquant.validation.run.ir.open_ir", from_gguf)
    report = validate(small_validation(gguf=altered(add_bos_token=container.bool_value(True)), windows=1, generate=0))
    assert report.failed == []
