"""What inspect says of an IR folder: which rows are hard, from the stored arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.calibration import CalibrationSettings
from anyquant.checkpoint import open_checkpoint
from anyquant.inspection import inspect_ir
from anyquant.job import Job, Target
from anyquant.pipeline import run
from anyquant.planning import plan
from anyquant.report.hard import hard_rows, hard_text


@pytest.fixture(scope="module")
def skim(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    """The tiny llama at 4.2 bits, rows of mixed widths."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 40, encoding="utf-8")
    calibration = CalibrationSettings(str(folder / "text.txt"), windows=2, window=32)
    job = Job("skim", Target(bits=4.2), calibration=calibration)
    return run(plan(open_checkpoint(str(tiny_llama)), job), folder / "ir")


def test_hard_rows_of_the_stored_arrays(skim: ir.Model) -> None:
    data = inspect_ir(skim)["hard"]
    bits = {n: skim.tensor(n).arrays[".bits"].tolist() for n, e in skim.entries.items() if e.quantized}
    assert data["units"] == "rows"
    assert list(data["kinds"]) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for kind, found in data["kinds"].items():
        own = [b for name, rows in bits.items() if kind in name for b in rows]
        assert found["widths"] == [own.count(width) for width in range(9)]
        assert found["mean_width"] == pytest.approx(np.mean(own))
        assert found["matrices"] == 2
    widest = sorted((b for rows in bits.values() for b in rows), reverse=True)
    assert [row["bits"] for row in data["widest"]] == widest[:10]
    assert all(bits[row["matrix"]][row["index"]] == row["bits"] for row in data["widest"])
    for key, value in (
        ("most_bits", lambda e: e.spec.bits_per_weight),
        ("largest_error", lambda e: e.error),
        ("largest_output_error", lambda e: e.output_error),
    ):
        ranked = sorted((value(skim.entries[name]) for name in bits), reverse=True)[:10]
        assert [m["value"] for m in data[key]] == ranked
        assert all(m["value"] == value(skim.entries[m["matrix"]]) for m in data[key])


def test_the_text_is_short(skim: ir.Model) -> None:
    text = hard_text(hard_rows(skim))
    lines = text.splitlines()
    assert len(lines) == 12  # a table of seven kinds, and three lines
    head, _, first = lines[:3]
    assert head.startswith("% of rows")
    assert first.startswith("q_proj")
    shares = [float(word) for word in first.split()[1:-1]]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert "most bits: layer" in text
    assert "of outputs: layer" in text


def test_reading_stops_at_the_widths(skim: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of many gigabytes is looked at in no time."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("codes were read")

    monkeypatch.setattr(ir.Model, "tensor", refuse)
    assert hard_rows(skim)["kinds"]


def test_blocks_have_a_width_per_matrix(tiny_llama: Path, tmp_path: Path) -> None:
    model = run(plan(open_checkpoint(str(tiny_llama)), Job("block", Target(bits=3.4))), tmp_path / "ir")
    data = hard_rows(model)
    assert data["units"] == "matrices"
    assert data["widest"] == data["largest_output_error"] == []
    widths = [e.spec.width for e in model.entries.values() if isinstance(e.spec, ir.BlockSpec)]
    assert sum(np.array(kind["widths"]) for kind in data["kinds"].values()).tolist() == [
        widths.count(width) for width in range(9)
    ]
    text = hard_text(data)
    assert "of outputs" not in text
    assert "most bits: layer" in text


def test_many_kinds_are_cut(skim: ir.Model) -> None:
    data = hard_rows(skim)
    data["kinds"] = {f"kind{i}": data["kinds"]["q_proj"] for i in range(30)}
    text = hard_text(data)
    assert "and 22 kinds more" in text
    assert len(text.splitlines()) == 14


def test_nothing_quantized() -> None:
    assert hard_text({"kinds": {}}) == "nothing is quantized"


def test_the_verb(invoke: Callable[..., Any], skim: ir.Model) -> None:
    assert skim.path is not None
    data = invoke("inspect", skim.path, "--json").data
    assert data["hard"] == hard_rows(skim)
    text = invoke("inspect", skim.path).out
    assert "% of rows" in text
    assert "hard " not in text  # the details are for programs
