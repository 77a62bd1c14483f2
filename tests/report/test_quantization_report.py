"""The report of a quantization: its numbers against recounts from the folder, its page, its verb."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.checkpoint import open_checkpoint
from anyquant.errors import CorruptFileError, InputError, MachineError, UsageError
from anyquant.job import Job, Target
from anyquant.pipeline import run
from anyquant.planning import plan
from anyquant.report.detail import Unit
from anyquant.report.facts import HARDEST, Facts, collect
from anyquant.report.html import to_html
from anyquant.report.plots import TICKS, bits_heat, unit_values
from anyquant.report.run import ReportSettings, report, report_text
from anyquant.reporting.estimate import Estimate
from anyquant.sweep import Sweep
from anyquant.testing import codebook_tensor

HOSTILE = '<script src="https://evil.example/x.js">&$\\frac{_[bold]'


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds, and says nothing where tables are looked at."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def facts(llama: ir.Model, source_of: Callable[..., Any], sweep_found: Sweep) -> Facts:
    return collect(llama, source_of(llama), sweep=sweep_found)


def test_the_numbers_are_those_of_the_folder(facts: Facts, llama: ir.Model) -> None:
    data = json.loads(json.dumps(facts.to_json(), allow_nan=False))
    assert data["schema"] == "anyquant.report/1"
    assert llama.path is not None
    sizes = {file.name: file.stat().st_size for file in llama.path.iterdir()}
    assert data["bytes"]["files"] == sizes
    assert data["bytes"]["total"] == sum(sizes.values()) == sum(data["bytes"]["parts"].values())
    quantized = {name: entry for name, entry in llama.entries.items() if entry.quantized}
    nbytes = sum(a.nbytes for name in quantized for a in llama.tensor(name).arrays.values())
    numel = sum(llama.dequantize(name).size for name in quantized)
    assert data["bits"]["counted"] == pytest.approx(8 * nbytes / numel)
    error = sum((e.output_error or 0) * e.spec.numel for e in quantized.values()) / numel
    assert data["output_error"]["value"] == pytest.approx(error)
    assert data["output_error"]["error"] > 0

    assert [m["name"] for m in data["matrices"]] == list(quantized)
    for matrix in data["matrices"]:
        bits = llama.tensor(matrix["name"]).arrays[".bits"].tolist()
        assert matrix["widths"] == [bits.count(width) for width in range(9)]
        assert (matrix["error"], matrix["output_error"]) == (
            llama.entries[matrix["name"]].error, llama.entries[matrix["name"]].output_error,
        )  # fmt: skip
    assert {k["kind"]: k["matrices"] for k in data["kinds"]} == {"q_proj": 3, "down_proj": 3}

    rows = [(m, r, b) for m in quantized for r, b in enumerate(llama.tensor(m).arrays[".bits"].tolist())]
    assert len(data["hardest_rows"]) == HARDEST
    assert sorted(r["bits"] for r in data["hardest_rows"]) == sorted(b for _, _, b in rows)[-HARDEST:]
    digests = "".join(
        f"{n} {hashlib.sha256(llama.dequantize(n).tobytes()).hexdigest()}\n" for n in sorted(llama.entries)
    )
    assert data["model"]["weights"] == hashlib.sha256(digests.encode()).hexdigest()


def test_rows_against_the_source(facts: Facts, llama: ir.Model, source_of: Callable[..., Any]) -> None:
    source = source_of(llama)
    for row in facts.hardest:
        before, after = source.values[row.matrix].astype(np.float64), llama.dequantize(row.matrix)
        lost = ((before - after) ** 2).sum(axis=1)
        assert row.share == pytest.approx(lost[row.index] / lost.sum())
        size = np.sqrt((before[row.index] ** 2).mean() / (before**2).mean())
        assert row.size == pytest.approx(size)


def test_the_matrix_that_loses_most_is_shown(facts: Facts, llama: ir.Model) -> None:
    worst = max(llama.entries, key=lambda name: llama.entries[name].output_error or 0.0)
    assert facts.detail.matrix.name == worst
    other = "model.layers.2.mlp.down_proj.weight"
    assert collect(llama, chosen=other).detail.matrix.name == other
    with pytest.raises(UsageError, match=r"no quantized matrix 'down_proj'; there are model\.layers\.0\.mlp"):
        collect(llama, chosen="down_proj")


def test_progress(llama: ir.Model, source_of: Callable[..., Any]) -> None:
    seen: list[tuple[str, int, int]] = []
    collect(llama, source_of(llama), progress=lambda *step: seen.append(step))
    assert seen
    assert all(0 < done <= total for _, done, total in seen)


def test_the_page_is_whole_and_self_contained(facts: Facts, check_page: Callable[[str], None]) -> None:
    pytest.importorskip("matplotlib")
    page = to_html(facts)
    check_page(page)
    # Rows by layer, heat map, two errors, three or four of the matrix, three of the sweep.
    assert 10 <= page.count("<svg") <= 11
    assert bits_heat(facts.matrices) in page  # the same numbers give the same text
    assert f"{facts.model.quantized_bits:.4f}" in page
    assert f"{facts.nbytes:,}" in page
    assert facts.weights in page
    assert "outliers: 0.0, target bits: 3.0" in page
    assert "99 model: too many &lt;script" in page


def test_names_from_outside_are_escaped(write: Callable[..., ir.Model], check_page: Callable[[str], None]) -> None:
    pytest.importorskip("matplotlib")
    tensors = {f"model.layers.{layer}.{HOSTILE}.weight": codebook_tensor((4, 8), 0, [1, 2, 3, 8]) for layer in range(2)}
    model = write(tensors, name="<b>folder")
    model.settings["note"] = model.source["name"] = HOSTILE
    facts = collect(model)
    page = to_html(facts)
    check_page(page)
    assert "<script" not in page
    assert "<b>folder" not in page
    assert page.count("&lt;script src=") >= 8
    assert "&lt;b&gt;folder" in page


@pytest.mark.usefixtures("no_plots")
def test_without_matplotlib_there_are_tables(facts: Facts) -> None:
    page = to_html(facts)
    assert "<svg" not in page
    assert "anyquant[report]" in page
    assert page.count("<table") >= 6
    assert "model.layers.0.self_attn.q_proj.weight" in page


def test_a_block_model(tiny_llama: Path, tmp_path: Path, check_page: Callable[[str], None]) -> None:
    """One width per matrix, no calibration: what does not apply is left out."""
    pytest.importorskip("matplotlib")
    checkpoint = open_checkpoint(str(tiny_llama))
    model = run(plan(checkpoint, Job("block", Target(bits=3.4))), tmp_path / "ir")
    facts = collect(model, checkpoint)
    page = to_html(facts)
    check_page(page)
    assert facts.hardest == []
    assert facts.output_error is None
    assert "Largest error of the weights" in page
    assert "Largest error of the outputs" not in page
    assert any("no calibration" in note for note in facts.notes)
    assert facts.source_bytes == sum(info.nbytes for info in checkpoint.tensors.values())
    json.dumps(facts.to_json(), allow_nan=False)


def test_thousands_of_experts_stay_readable(write: Callable[..., ir.Model], check_page: Callable[[str], None]) -> None:
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    tensors = {
        f"model.layers.{layer}.mlp.experts.{kind}#{expert}": codebook_tensor((6, 8), 0, rng.integers(0, 5, 6))
        for layer in range(4)
        for kind in ("gate_up_proj", "down_proj")
        for expert in range(128)
    }
    losses = {name: (float(rng.random()), float(rng.random())) for name in tensors}
    facts = collect(write(tensors, losses))
    page = to_html(facts)
    check_page(page)
    assert len(facts.to_json()["matrices"]) == 1024
    assert page.count("<tr>") < 80
    assert len(page) < 700_000
    assert "Experts of a layer are one point" in page
    assert "1,024 matrices of 2 kinds" in page


def test_matrices_outside_of_layers(write: Callable[..., ir.Model], check_page: Callable[[str], None]) -> None:
    pytest.importorskip("matplotlib")
    facts = collect(write({"lm_head.weight": codebook_tensor((4, 9), 0, [2, 2, 0, 1])}))
    page = to_html(facts)
    check_page(page)
    assert facts.error == Estimate(pytest.approx(0.01), 1)
    assert "lm_head" in page


@pytest.mark.usefixtures("no_plots")
def test_columns_are_called_columns(write: Callable[..., ir.Model], source_of: Callable[..., Any]) -> None:
    model = write({"model.layers.0.q.weight": codebook_tensor((9, 5), 1, [1, 2, 3, 4, 4])})
    page = to_html(collect(model, source_of(model)))
    assert "Columns with the most bits" in page
    assert "Bits of the columns" in page


def test_another_source(llama: ir.Model, source_of: Callable[..., Any], sweep_found: Sweep) -> None:
    source = source_of(llama)
    source.mark = "0" * 64
    assert any("fingerprints differ" in note for note in collect(llama, source).notes)
    name = "model.layers.1.mlp.down_proj.weight"
    source.tensors[name] = replace(source.tensors[name], shape=(7, 32))
    with pytest.raises(InputError, match=r"source has a \[7, 32\] .*; the model holds a \[7, 33\]"):
        collect(llama, source)
    del source.tensors[name]
    with pytest.raises(InputError, match=f"source has no {name}"):
        collect(llama, source)
    other = replace(sweep_found, model={**sweep_found.model, "fingerprint": "0" * 64})
    assert any("sweep is of another source" in note for note in collect(llama, sweep=other).notes)


def test_nothing_quantized(write: Callable[..., ir.Model]) -> None:
    dense = ir.Tensor(ir.DenseSpec((3,), "F32"), {".dense": np.ones(3, np.float32)})
    with pytest.raises(InputError, match="no quantized matrix"):
        collect(write({"norm": dense}))


@pytest.mark.usefixtures("no_plots")
def test_files_are_replaced_and_text_is_short(
    llama: ir.Model, tmp_path: Path, sweep_found: Sweep, source_of: Callable[..., Any]
) -> None:
    assert llama.path is not None
    (tmp_path / "sweep.json").write_text(json.dumps(sweep_found.to_json()), encoding="utf-8")
    settings = ReportSettings(llama.path, tmp_path / "deep" / "report", sweep=tmp_path / "sweep.json")
    for _ in range(2):
        facts = report(settings)
    assert sorted(p.name for p in settings.output.iterdir()) == ["report.html", "report.json"]
    data = json.loads((settings.output / "report.json").read_text(encoding="utf-8"))
    assert data == json.loads(json.dumps(facts.to_json()))
    assert data["sweep"] == sweep_found.to_json()
    text = report_text(facts, settings.output)
    assert f"{llama.quantized_bits:.4f} bits per weight in 6 matrices" in text
    assert "No --source was given" in text
    assert len(text.splitlines()) < 10
    assert "times the common size" in report_text(collect(llama, source_of(llama)), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot write the report"):
        report(replace(settings, output=tmp_path / "file"))


def test_a_report_that_cannot_be_written_is_refused_first(
    llama: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert llama.path is not None
    monkeypatch.setattr(ir, "open_ir", lambda _: pytest.fail("the work was begun"))
    (tmp_path / "report.json").write_text('{"schema": "anyquant.validation/1"}')
    with pytest.raises(UsageError, match=r"its schema is 'anyquant\.validation/1', not 'anyquant\.report/1'"):
        report(ReportSettings(llama.path, tmp_path))
    with pytest.raises(MachineError, match="cannot write the report"):
        report(ReportSettings(llama.path, tmp_path / "report.json" / "deep"))
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("count", [3, 300, 1000])
@pytest.mark.parametrize("with_source", [True, False])
def test_many_values_of_a_row_are_thinned_evenly(
    count: int, with_source: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes_module = pytest.importorskip("matplotlib.axes")
    drawn: list[Any] = []
    vlines = axes_module.Axes.vlines

    def kept(self: Any, x: Any, *rest: Any, **options: Any) -> Any:
        drawn.append(x)
        return vlines(self, x, *rest, **options)

    monkeypatch.setattr(axes_module.Axes, "vlines", kept)
    values = np.linspace(-2, 5, count).astype(np.float32)
    before = np.ones(48, np.int64) if with_source else None
    unit = Unit(0, 8, None, values, np.ones(count, np.int64), np.linspace(-2, 5, 49), before)
    page = unit_values(unit)
    assert f"<!-- {count:,} values after -->" in page  # matplotlib names every text in a comment
    for x in drawn:
        assert len(x) == min(count, TICKS)
        assert (x[0], x[-1]) == (values[0], values[-1])
        assert np.diff(x).max() <= 2 * np.diff(x).min() + 1e-5
    assert len(drawn) == (2 if with_source else 1)


@pytest.mark.usefixtures("no_plots")
def test_the_verb(invoke: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> None:
    ir_folder, output = tmp_path / "ir", tmp_path / "report"
    checkpoint = open_checkpoint(str(tiny_llama))
    run(plan(checkpoint, Job("block", Target(bits=4.25))), ir_folder)
    result = invoke("report", ir_folder, "-o", output, "--source", tiny_llama, "--json")
    assert result.code == 0, result.err
    assert result.data == json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert result.data["matrix"]["before"] is not None
    assert f"wrote {output}" in invoke("report", ir_folder, "-o", output).out.replace("\n  ", " ")
    assert invoke("report", ir_folder, "-o", output, "--matrix", "nothing").code == 2
    assert invoke("report", ir_folder).code == 2
    assert invoke("report", ir_folder, "-o", output / "report.json").code == 6
    assert invoke("report", tiny_llama, "-o", output).code == 3
    assert invoke("report", ir_folder, "-o", output, "--source", tmp_path / "none").code == 3
    (tmp_path / "report.json").write_text('{"schema": "anyquant.validation/1"}')
    result = invoke("report", ir_folder, "-o", tmp_path)
    assert result.code == 2
    assert "would be replaced" in result.err
    wrong = tmp_path / "sweep.json"
    wrong.write_text('{"schema": "anyquant.validation/1"}')
    result = invoke("report", ir_folder, "-o", output, "--sweep", wrong, "--json")
    assert (result.code, result.data["exit_code"]) == (CorruptFileError.exit_code, 3)
    assert "anyquant.sweep/1" in result.err
