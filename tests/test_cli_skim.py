"""The verbs with a method that needs a calibration: what they promise, keep, refuse, and how they go on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from anyquant import ir

if TYPE_CHECKING:
    from tests.conftest import Result

LITTLE = ["--method", "skim", "--calib-windows", "4", "--calib-window", "32"]


def test_what_plan_promises_is_written(invoke: Callable[..., Result], tiny_llama: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "small", tmp_path / "work"
    promised: Any = invoke("plan", tiny_llama, *LITTLE, "--bits", 3.3, "--work-dir", work, "--json").data
    assert list(promised["seconds"]) == ["calibration", "errors", "quantizing"]
    assert promised["feasible"][0] < 3.3 < promised["feasible"][1]
    made: Any = invoke("quantize", tiny_llama, "-o", out, *LITTLE, "--bits", 3.3, "--work-dir", work, "--json").data
    assert made["files"] == promised["files"] == {f: (out / f).stat().st_size for f in made["files"]}
    assert 3.29 <= made["bits"] <= 3.3
    assert 0 < made["output_error"] < 0.2

    gguf = promised["exports"]["gguf"]
    assert gguf["refusals"] == []
    assert any(name.startswith("ANYQUANT_") for name in gguf["types"])
    assert invoke("export", "gguf", out, "-o", tmp_path / "small.gguf").code == 0
    assert (tmp_path / "small.gguf").stat().st_size == gguf["bytes"]
    exported = invoke("export", "onnx", out, "-o", tmp_path / "onnx", "--json")
    assert exported.data["files"] == promised["exports"]["onnx"]["files"]


def test_words(invoke: Callable[..., Result], tiny_llama: Path, tmp_path: Path) -> None:
    work = ["--work-dir", tmp_path / "work"]
    text = invoke("plan", tiny_llama, *LITTLE, "--bits", 3, *work).out
    assert "feasible: " in text
    assert "time to quantize: roughly" in text
    # The command that is proposed next works.
    result = invoke("quantize", tiny_llama, "-o", tmp_path / "small", *LITTLE, "--bits", 3, *work)
    _, _, proposed = result.out.partition("next: anyquant ")
    assert invoke(*proposed.split()).code == 0


def test_an_infeasible_target_costs_nothing(invoke: Callable[..., Result], tiny_llama: Path, tmp_path: Path) -> None:
    result = invoke("quantize", tiny_llama, "-o", tmp_path / "out", *LITTLE, "--bits", 17)
    assert result.code == 2
    assert "feasible interval" in result.err
    assert list(tmp_path.iterdir()) == []
    # Nothing of it is in the way of the next, whatever its settings.
    more = ["--outliers", 1, "--calib-windows", 5]
    assert invoke("quantize", tiny_llama, "-o", tmp_path / "out", *LITTLE, "--bits", 3, *more).code == 0


@pytest.mark.parametrize("size_of", ["ir", "onnx", "gguf"])
def test_a_size_is_met_from_below(
    invoke: Callable[..., Result], tiny_llama: Path, tmp_path: Path, size_of: str
) -> None:
    whole = ["--work-dir", tmp_path / "work", "--json", *LITTLE]
    far: Any = invoke("plan", tiny_llama, "--bits", 2.9, *whole).data
    size = (far if size_of == "ir" else far["exports"][size_of])["bytes"]
    planned: Any = invoke("plan", tiny_llama, "--size", size, "--for", size_of, *whole).data
    found = (planned if size_of == "ir" else planned["exports"][size_of])["bytes"]
    assert 0.99 * size <= found <= size
    assert planned["bits"] > 2.89  # GGUF's types round up: what that leaves is spent on bits


def test_a_work_folder_of_another_job_is_refused(
    invoke: Callable[..., Result], tiny_llama: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    assert invoke("plan", tiny_llama, *LITTLE, "--bits", 3, "--work-dir", work).code == 0
    kept = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    other = tiny_checkpoint(seed=1)
    for model, more, word in (
        (other, [], "model"),
        (tiny_llama, ["--seed", 1], "calibration"),
        (tiny_llama, ["--outliers", 1], "settings"),
        (tiny_llama, ["--quantize-embeddings"], "quantize_embeddings"),
    ):
        for resume in ([], ["--resume"]):
            arguments = [*LITTLE, "--bits", 3, "--work-dir", work, *more, *resume]
            result = invoke("quantize", model, "-o", tmp_path / "out", *arguments)
            assert result.code == 2, result.err
            assert word in result.err
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == kept
    result = invoke("quantize", tiny_llama, "-o", tmp_path / "out", *LITTLE, "--bits", 3, "--resume")
    assert result.code == 2
    assert "nothing to resume" in result.err


def test_ctrl_c_says_how_to_go_on(tiny_llama: Path, tmp_path: Path) -> None:
    verb = ["quantize", str(tiny_llama), "-o", "out", "--method", "skim", "--bits", "3.3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "anyquant", *verb], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.work" / "calibration").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"To go on: anyquant {' '.join(verb)} --resume" in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    done = subprocess.run(
        [sys.executable, "-m", "anyquant", *verb, "--resume"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert ir.open_ir(tmp_path / "out").quantized_bits <= 3.3


def test_ctrl_c_while_source_is_executed_is_130_too(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import click\nfrom anyquant.console import run\n"
        "@click.command()\ndef verb():\n    exec('raise KeyboardInterrupt')\n"
        "run(verb)\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, "-m", "program"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr


def test_ctrl_c_in_a_verb_that_goes_on_by_itself(
    invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anyquant.measuring.calibrate", interrupted)
    for verb, target in (("plan", ["--bits", 3]), ("sweep", ["--targets", "3,4"])):
        arguments = [verb, tiny_llama, *LITTLE, *target]
        result = invoke(*arguments, "--work-dir", tmp_path / "work")
        assert result.code == 130
        assert f"kept in {tmp_path / 'work'}" in result.err
        assert result.err.splitlines()[-1].endswith(f"--work-dir {tmp_path / 'work'}")
        assert "To do it again" in invoke(*arguments).err


def test_what_the_calibration_found_is_told(invoke: Callable[..., Result], tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("This is a short text. " * 10)
    arguments = ["--method", "skim", "--calib", text, "--calib-window", 16, "--bits", 3]
    result = invoke("plan", tiny_llama, *arguments)
    assert result.code == 0, result.err
    assert "calibration: " in result.err
    assert " of the 32 windows" in result.err
    data: Any = invoke("quantize", tiny_llama, "-o", tmp_path / "out", *arguments, "--json").data
    assert any(note.startswith("calibration: ") for note in data["notes"])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["plan", "--bits", 4.25, "--importance", "fisher"], "--importance has no meaning for the method block"),
        (["sweep", "--targets", "3,4", "--method", "skim", "--windows", 4], "--windows has no meaning without --text"),
        (["plan", "--bits", 3, "--method", "skim", "--calib-windows", 0], "windows is 0"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    invoke: Callable[..., Result], tiny_llama: Path, arguments: list[object], word: str
) -> None:
    result = invoke(arguments[0], tiny_llama, *arguments[1:])
    assert result.code == 2
    assert word in result.err
