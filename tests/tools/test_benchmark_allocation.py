"""The benchmark of allocations: which jobs it runs, what it concludes, and the real model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from anyquant.checkpoint import open_checkpoint
from anyquant.job import Job, Target
from anyquant.planning import plan
from anyquant.reporting.estimate import Estimate
from anyquant.sweep import Point, Sweep


@pytest.fixture(scope="module")
def tool(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("benchmark_allocation")


def made_up(kl: list[list[float]], allocations: list[str]) -> Sweep:
    points = tuple(
        Point({"bits": 3.0, "allocation": allocation}, "", 3.0, 3.0, 10, 0.1, Estimate(float(np.mean(row)), 9),
              kl_per_window=tuple(row))
        for row, allocation in zip(kl, allocations, strict=True)
    )  # fmt: skip
    data = {"text": "t", "windows": len(kl[0]), "window": 9, "seed": 0, "resamples": 500}
    return Sweep({"name": "m", "perplexity": Estimate(9.0, 9)}, "skim", {}, "nats", None, data, {}, points)


def test_equal_bytes_for_every_allocation(tool: ModuleType, tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    jobs = tool.jobs_of(checkpoint, Job("block", Target(bits=1.0)), [2, 5], [3.0, 6.5])
    assert [(j.allocation, j.target.bits) for j in jobs] == [
        ("uniform", 2.25), ("model", 2.25), ("uniform", 5.25), ("model", 5.25), ("model", 3.0), ("model", 6.5),
    ]  # fmt: skip
    assert plan(checkpoint, jobs[2]).model.quantized_bits == 5.25
    rows = tool.jobs_of(checkpoint, Job("skim", Target(bits=1.0)), [3], [])
    assert [j.allocation for j in rows] == ["uniform", "model", "matrix"]
    uniform = plan(checkpoint, rows[0])
    assert {int(level) for levels in uniform.levels.values() for level in levels} == {3}


def test_mixed_must_win_with_its_whole_interval(tool: ModuleType) -> None:
    uniform, better, unclear = [1.0, 1.2, 0.8, 1.1], [0.9, 1.0, 0.7, 0.9], [0.2, 1.9, 0.1, 1.8]
    found = made_up([uniform, better, unclear], ["uniform", "model", "matrix"])
    model, matrix = tool.checks_of(found, [3], [])
    assert (model.name, model.passed) == ("3 bits: model", True)
    assert model.difference.value == pytest.approx(np.mean(better) - np.mean(uniform))
    assert matrix.difference.value < 0 < matrix.difference.high
    assert not matrix.passed
    text = tool.report(found, [model, matrix])
    assert "FAIL: mixed widths beat uniform ones" in text
    assert "1 of 2" in text
    assert "PASS: KL falls monotonically: 0 of 0" in text


def test_kl_must_fall_at_every_step(tool: ModuleType) -> None:
    found = made_up([[3.0, 3.5], [2.0, 2.5], [2.1, 2.6]], ["model"] * 3)
    checks = tool.checks_of(found, [], [2.5, 3.0, 4.0])
    assert [(c.name, c.passed) for c in checks] == [("3 bits below 2.5", True), ("4 bits below 3", False)]
    data = json.loads(json.dumps(tool.to_json(found, checks), allow_nan=False))
    assert data["passed"] is False
    assert [(c["better"], c["worse"]) for c in data["checks"]] == [(1, 0), (2, 1)]
    assert data["sweep"]["schema"] == "anyquant.sweep/1"
    assert tool.to_json(found, checks[:1])["passed"]


def run(tool: ModuleType, *arguments: object) -> int:
    code: int = tool.main(list(map(str, arguments)))
    return code


def test_a_small_run(
    tool: ModuleType, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog; " * 40, encoding="utf-8")
    arguments = ["--model", tiny_llama, "--text", tmp_path / "text", "--method", "block", "--widths", "4", "--targets"]
    arguments += ["2.25,5,8.25", "--windows", "4", "--window", "32", "--workers", "1", "--work-dir", tmp_path / "w"]
    code = run(tool, *arguments, "--output", tmp_path / "out.json")
    captured = capsys.readouterr()
    data = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert code == (0 if data["passed"] else 1)
    assert len(data["sweep"]["points"]) == 5
    assert "PASS: KL falls monotonically: 2 of 2 steps" in captured.out
    assert "bytes in" in captured.err
    assert run(tool, *arguments[:-6], "--text", tmp_path / "none") == 3
    failing = tool.checks_of

    def all_failed(*rest: Any) -> list[Any]:
        return [replace(check, passed=False) for check in failing(*rest)]

    monkeypatch.setattr(tool, "checks_of", all_failed)
    assert run(tool, *arguments) == 1


@pytest.mark.slow
def test_the_real_model(tool: ModuleType, real_gguf: Path, real_text: Path, tmp_path: Path) -> None:
    """Few windows and targets; the whole of it is for the benchmark itself."""
    arguments = [
        "--model",
        real_gguf,
        "--text",
        real_text,
        "--windows",
        "4",
        "--widths",
        "3",
        "--targets",
        "",
    ]
    # Sampling a text would take a minute more, and is another test's.
    calibration = ["--calib", real_text, "--calib-windows", "8"]
    code = run(tool, *arguments, *calibration, "--output", tmp_path / "out.json")
    data = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert data["passed"], [c["name"] for c in data["checks"] if not c["passed"]]
    assert code == 0
    uniform, model, matrix = data["sweep"]["points"]
    for mixed in (model, matrix):
        assert abs(mixed["bits"] - uniform["bits"]) < 0.001
