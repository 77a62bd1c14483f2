"""The command line as a new user meets it: help, typos, JSON, exit codes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anyquant import ir
from anyquant.cli import cli
from anyquant.console import Size, mebibytes, table

if TYPE_CHECKING:
    from tests.conftest import Result

METHODS = ["affine", "block", "claq", "cmpq", "ggml", "skim"]
VERBS = [
    "inspect", "plan", "sweep", "quantize", "report", "export", "validate", "exporters", "methods", "plugin", "doctor",
]  # fmt: skip


def test_all_verbs_are_there() -> None:
    assert list(cli.commands) == VERBS  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_and_fits_80_columns(invoke: Callable[..., Result], verb: str) -> None:
    result = invoke(verb, "--help")
    assert result.code == 0
    assert f"Example: anyquant {verb}" in result.out
    assert max(map(len, result.out.splitlines())) <= 80


def test_no_verb_shows_the_help(invoke: Callable[..., Result]) -> None:
    result = invoke()
    assert result.code == 2
    assert "Commands:" in result.err
    assert invoke("--version").out.startswith("anyquant 0.")


@pytest.mark.parametrize(("typo", "verb"), [("quantise", "quantize"), ("exprot", "export"), ("inpsect", "inspect")])
def test_a_typo_suggests_the_verb(invoke: Callable[..., Result], typo: str, verb: str) -> None:
    result = invoke(typo)
    assert result.code == 2
    assert f"Did you mean {verb!r}?" in result.err


def test_an_unknown_verb_lists_them(invoke: Callable[..., Result]) -> None:
    assert all(verb in invoke("zzz").err for verb in VERBS)


def test_a_wrong_option_says_so(invoke: Callable[..., Result], tiny_llama: Path) -> None:
    assert invoke("plan", tiny_llama, "--bitz", "4").code == 2
    result = invoke("plan", tiny_llama, "--size", "many")
    assert result.code == 2
    assert "75MiB" in result.err
    result = invoke("plan", tiny_llama)
    assert result.code == 2
    assert "exactly one of --bits and --size" in result.err


def test_infeasible_names_the_interval(invoke: Callable[..., Result], tiny_llama: Path, tmp_path: Path) -> None:
    result = invoke("quantize", tiny_llama, "-o", tmp_path / "out", "--bits", "1.5")
    assert result.code == 2
    assert "2.2500 .. 8.2500" in result.err
    assert list(tmp_path.iterdir()) == []


def test_errors_are_json_too(invoke: Callable[..., Result], tmp_path: Path) -> None:
    result = invoke("inspect", tmp_path / "nothing", "--json")
    assert result.code == 3
    assert result.data["exit_code"] == 3
    assert "nothing" in str(result.data["error"])


def test_inspect(invoke: Callable[..., Result], tiny_llama: Path) -> None:
    data = invoke("inspect", tiny_llama, "--json").data
    assert data["architecture"] == "LlamaForCausalLM"
    assert data["matrices"] == 14
    assert data["row_lengths"] == {"64": 12, "96": 2}
    assert data["aliases"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert set(data["feasible_bits"]) == set(METHODS)  # type: ignore[call-overload]
    assert data["feasible_bits"]["block"] == pytest.approx({"fewest": 2.25, "most": 8.25})  # type: ignore[index]
    assert data["exporters"] == {"gguf": "yes", "onnx": "yes"}
    text = invoke("inspect", tiny_llama).out
    assert "block   2.25 to 8.25" in text
    assert invoke("inspect", tiny_llama, "--quiet").out == ""


def test_plan_quantize_inspect_export(invoke: Callable[..., Result], tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    promised = invoke("plan", tiny_llama, "--bits", "4.25", "--json").data
    assert "4.2500 bits per weight" in invoke("plan", tiny_llama, "--bits", "4.25").out
    made = invoke("quantize", tiny_llama, "-o", out, "--bits", "4.25", "--json").data
    assert made["files"] == promised["files"] == {f: (out / f).stat().st_size for f in made["files"]}  # type: ignore[attr-defined]
    assert invoke("inspect", out, "--json").data["forms"] == {"bfp4/32": 14, "F32": 6}
    assert "bfp4/32: 14" in invoke("inspect", out).out
    gguf = tmp_path / "small.gguf"
    result = invoke("export", "gguf", out, "-o", gguf)
    assert result.code == 0, result.err
    assert f"{gguf.stat().st_size:,} bytes" in result.out
    exports = promised["exports"]
    assert isinstance(exports, dict)
    assert exports["gguf"]["bytes"] == gguf.stat().st_size
    again = invoke("quantize", tiny_llama, "-o", out, "--bits", "4.25")
    assert again.code == 2
    assert "exists" in again.err


def test_quantize_says_what_it_did(invoke: Callable[..., Result], tiny_llama: Path, tmp_path: Path) -> None:
    result = invoke("quantize", tiny_llama, "-o", tmp_path / "a", "--bits", "3.3", "--block", "16")
    assert result.code == 0
    assert "next: anyquant export" in result.out
    assert ir.open_ir(tmp_path / "a").settings["block"] == 16
    result = invoke("quantize", tiny_llama, "-o", tmp_path / "b", "--size", "150KB", "--workers", 2)
    assert result.code == 0
    assert sum(ir.file_sizes(ir.open_ir(tmp_path / "b")).values()) <= 150_000


def test_a_damaged_weight_exits_3(invoke: Callable[..., Result], tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 2] = np.nan
    save_file(weights, folder / "model.safetensors")
    result = invoke("quantize", folder, "-o", tmp_path / "out", "--bits", "4.25")
    assert result.code == 3
    assert "model.embed_tokens.weight" in result.err
    assert "[7, 2]" in result.err
    assert not (tmp_path / "out").exists()


def test_unknown_exporter_and_method(invoke: Callable[..., Result], tiny_llama: Path, tmp_path: Path) -> None:
    result = invoke("export", "floppy", tmp_path, "-o", tmp_path / "x")
    assert result.code == 2
    assert "gguf, onnx" in result.err
    result = invoke("plan", tiny_llama, "--bits", "4", "--method", "magic")
    assert result.code == 2
    assert "block" in result.err


def test_a_missing_extra_names_the_command(
    invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, real_gguf: Path
) -> None:
    for name in [n for n in sys.modules if n == "gguf" or n.startswith("gguf.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)  # makes the import fail
    result = invoke("inspect", real_gguf)
    assert result.code == 5
    assert "pip install 'anyquant[gguf]'" in result.err


def test_lists_and_doctor(invoke: Callable[..., Result]) -> None:
    assert [m["name"] for m in invoke("methods", "--json").data["methods"]] == METHODS  # type: ignore[attr-defined]
    assert [e["name"] for e in invoke("exporters", "--json").data["exporters"]] == ["gguf", "onnx"]  # type: ignore[attr-defined]
    assert "minifloat" in invoke("methods").out
    assert "llama.cpp" in invoke("exporters").out
    data = invoke("doctor", "--json").data
    assert data["problems"] == []
    assert "anyquant 0." in invoke("doctor").out


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device", "big.gguf"), 6, "big.gguf"),
        (PermissionError(13, "Permission denied", "x"), 3, "Permission denied"),
        (MemoryError(), 6, "--workers 1"),
        (KeyboardInterrupt(), 130, "To do it again: anyquant methods"),
        (ZeroDivisionError("oops"), 1, "fault of anyquant"),
    ],
)
def test_every_outcome_has_its_code(
    invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    def fail(group: str) -> None:
        raise error

    monkeypatch.setattr("anyquant.plugins.plugins", fail)
    result = invoke("methods")
    assert result.code == code
    assert words in result.err


def test_a_broken_plugin_breaks_nothing_else(
    invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    from importlib.metadata import EntryPoint

    from anyquant import plugins

    points = [
        EntryPoint("block", "anyquant.methods.block:BlockMethod", plugins.METHODS),
        EntryPoint("rotten", "no_such_package:Thing", plugins.METHODS),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    plugins.plugins.cache_clear()
    try:
        out = invoke("methods").out
        assert "minifloat" in out
        assert "ModuleNotFoundError" in out
        result = invoke("plan", tiny_llama, "--bits", "4", "--method", "rotten")
        assert result.code == 2
        assert "cannot be loaded" in result.err
        assert any("rotten" in p for p in invoke("doctor", "--json").data["problems"])  # type: ignore[attr-defined]
    finally:
        plugins.plugins.cache_clear()


def test_ctrl_c_leaves_nothing_unfinished(real_gguf: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "anyquant", "quantize", str(real_gguf), "-o", "out", "--bits", "8.25"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob(".out.partial-*/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "To do it again: anyquant quantize" in err
    assert list(tmp_path.iterdir()) == []


def test_help_is_light() -> None:
    code = "import sys, anyquant.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_narrow_terminal(tiny_llama: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "anyquant", "plan", str(tiny_llama), "--bits", "4.25"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "\x1b" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [("75MiB", 75 << 20), ("1.5GB", 1_500_000_000), ("98362432", 98362432), ("10 k", 10_000), ("2Gi", 2 << 30)],
)
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


def test_texts() -> None:
    assert mebibytes(1 << 20) == "1.0 MiB"
    assert table(("a", "bb"), [("ccc", "d")]).splitlines() == ["a    bb", "---  --", "ccc   d"]
