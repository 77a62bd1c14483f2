"""The Python interface: the same bytes as the command line, refusals before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import anyquant
from anyquant.errors import InfeasibleTarget, UsageError

if TYPE_CHECKING:
    from tests.conftest import Result

LITTLE = anyquant.CalibrationSettings(windows=4, window=32)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (anyquant.Job("block", anyquant.Target(bits=4.6)), ["block", "--bits", "4.6"]),
        (anyquant.Job("skim", anyquant.Target(bits=3.4), calibration=LITTLE), ["skim", "--bits", "3.4"]),
        (
            anyquant.Job("skim", anyquant.Target(bits=3, count="index"), {"profile": "paper"}, calibration=LITTLE),
            ["skim", "--bits", "3", "--count", "index", "--profile", "paper"],
        ),
        (anyquant.Job("cmpq", anyquant.Target(bits=4.5), refine=True, calibration=LITTLE),
         ["cmpq", "--bits", "4.5", "--refine"]),
    ],
    ids=["block", "skim", "paper", "cmpq"],
)  # fmt: skip
def test_the_same_bytes_as_the_command_line(
    invoke: Callable[..., Result], tiny_llama: Path, tmp_path: Path, job: anyquant.Job, words: list[str]
) -> None:
    made = anyquant.quantize(tiny_llama, tmp_path / "python", job)
    assert made.path == tmp_path / "python"
    texts = [] if job.method == "block" else ["--calib-windows", "4", "--calib-window", "32"]
    result = invoke("quantize", tiny_llama, "-o", tmp_path / "cli", "--method", *words, *texts)
    assert result.code == 0, result.err
    assert files(tmp_path / "python") == files(tmp_path / "cli")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cli", "python"]
    assert anyquant.load(tmp_path / "python").config.model_type == "llama"


def test_a_work_folder_serves_the_next_target(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Line {i} of a short text." for i in range(60)), encoding="utf-8")
    short = anyquant.CalibrationSettings(str(text), windows=400, window=32)
    steps: list[str] = []
    told: list[str] = []
    for bits in (3.4, 4.2):
        job = anyquant.Job("skim", anyquant.Target(bits=bits), calibration=short)
        out = tmp_path / f"{bits}"
        anyquant.quantize(
            tiny_llama, out, job, work_dir=tmp_path / "work", progress=lambda what, done, whole: steps.append(what),
            note=told.append,
        )  # fmt: skip
        assert ("moments" in steps) == (bits == 3.4)
        steps.clear()
        alone = anyquant.quantize(tiny_llama, tmp_path / f"{bits} alone", job)
        assert files(out) == files(tmp_path / f"{bits} alone")
        assert alone.quantized_bits <= bits
    assert "errors" in told[0]
    assert any(words.startswith("calibration: ") for words in told[1:])


def test_refusals_leave_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    job = anyquant.Job("block", anyquant.Target(bits=1.5))
    with pytest.raises(InfeasibleTarget):
        anyquant.quantize(tiny_llama, tmp_path / "out", job)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UsageError):
        anyquant.quantize(tmp_path / "nothing here", tmp_path / "out", job)
    assert (tmp_path / "out" / "mine").read_text() == "mine"
