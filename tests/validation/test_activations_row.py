"""Quantized activations in a validation: the row, its place in every form of the report, the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyquant import ir
from anyquant.validation import ValidationSettings, format_table, validate
from anyquant.validation.activations import quantized_activations
from anyquant.validation.gates import Gate
from anyquant.validation.html import to_html
from anyquant.validation.plots import plots
from anyquant.validation.report import to_json
from anyquant.validation.results import ValidationReport
from anyquant.validation.runners import RunnerSpec, open_runner

IDS = [5, 9, 300, 17, 200, 9, 41, 33, 2, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 380, 381]


@pytest.fixture(scope="module")
def settings(small_validation: Callable[..., ValidationSettings]) -> ValidationSettings:
    return small_validation(activations="bfp5", max_kl=1e-9, windows=3, generate=4)


@pytest.fixture(scope="module")
def report(settings: ValidationSettings) -> ValidationReport:
    return validate(settings)


ROW = "IR, A bfp5"


def test_the_row_is_measured_and_not_gated(report: ValidationReport) -> None:
    assert [row.name for row in report.rows] == ["source", "IR", ROW]
    assert {(c.reference, c.candidate) for c in report.comparisons} == {("source", "IR"), ("source", ROW), ("IR", ROW)}
    assert [(g.name, g.subject) for g in report.failed] == [("--max-kl", "IR")]
    assert ROW not in {g.subject for g in report.gates}
    weights, both = report.rows[1:]
    assert both.nbytes == weights.nbytes
    assert both.arithmetic == "quantized"
    assert len(both.token_ids) == 4
    own = report.comparison("IR", ROW)
    assert own is not None
    assert own.kl_mean.value > 1e-4
    assert own.perplexity_change.value == pytest.approx(both.perplexity.value - weights.perplexity.value)


def test_the_row_is_what_the_model_gives_in_python(report: ValidationReport, tiny_ir: Path, tiny_text: Path) -> None:
    import anyquant
    from anyquant.validation import texts

    tokenizer = texts.load_tokenizer(tiny_ir)
    windows, _ = texts.cut_text(tiny_text, tokenizer, ir.open_ir(tiny_ir).config, window=64, windows=3, seed=0)
    model = anyquant.load(tiny_ir, dequantize=True)
    losses = []
    with quantized_activations(model, "bfp5"):
        for ids in windows.ids:
            with torch.inference_mode():
                found = model(torch.tensor([ids.tolist()]), use_cache=False).logits
            chances = found[0].double().log_softmax(-1)
            losses += [-float(chances[at, token]) for at, token in enumerate(ids[1:].tolist())]
    assert report.rows[2].perplexity.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_the_row_is_in_every_form_of_the_report(
    report: ValidationReport, check_page: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = format_table(report)
    assert max(map(len, text.splitlines())) <= 80
    at = next(at for at, line in enumerate(text.splitlines()) if line.startswith(" IR,  "))
    line, rest = text.splitlines()[at : at + 2]
    assert line.endswith("\u2013")  # no gate
    assert "\u2026" not in line
    assert rest.strip() == "A bfp5"
    assert f"{ROW} against the IR in float32: max" in text
    data = json.loads(json.dumps(to_json(report)))
    assert data["rows"][2]["name"] == ROW
    assert "attention products in bfp5, blocks of 16 (5.5 bits)" in data["rows"][2]["arithmetic_reason"]
    page = to_html(report)
    check_page(page)
    assert f"perplexity, {ROW}" in page
    assert "quantized: inputs of linear layers" in page
    assert f"{ROW} file" not in page
    pytest.importorskip("matplotlib")
    drawn = plots(report)["Distance to PyTorch on the same weights"]
    assert "gate" not in drawn


def test_logits_that_are_not_finite_still_fail(settings: ValidationSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    import anyquant.validation.activations as activations

    monkeypatch.setattr(activations, "round_to_bfp", lambda x, *_: x * math.nan)
    failed: list[Gate] = validate(replace(settings, max_kl=None, source=None, windows=1, generate=0)).failed
    assert [(gate.name, gate.subject) for gate in failed] == [("finite logits", ROW)]


def test_the_runner_generates_in_the_same_arithmetic(tiny_ir: Path) -> None:
    runner = open_runner(RunnerSpec(ROW, "ir", str(tiny_ir), 64, 1, activations="bfp5"))
    exact = open_runner(RunnerSpec("IR", "ir", str(tiny_ir), 64, 1))
    ids = np.array(IDS)
    assert np.abs(runner.logits(ids) - exact.logits(ids)).max() > 1e-3
    assert runner.generate(IDS, 1) == [int(runner.logits(ids)[-1].argmax())]
    assert len(runner.generate(IDS, 5)) == 5


def test_command_line(settings: ValidationSettings, invoke: Callable[..., Any]) -> None:
    """Without a source, and each model in a process of its own."""
    command = ("validate", settings.model, "--text", settings.text, "--json", "--activations")
    wrong = invoke(*command, "int8")
    assert wrong.code == 2
    assert "it must be one of bfp2, bfp3, bfp4, bfp5, bfp6, bfp7, bfp8" in wrong.err
    done = invoke(*command, "bfp5", "--windows", 1, "--window", 32)
    assert (done.code, done.data["failed"]) == (0, [])
    here = validate(replace(settings, source=None, max_kl=None, windows=1, window=32, generate=0))
    assert [row["name"] for row in done.data["rows"]] == [row.name for row in here.rows] == ["IR", ROW]
    assert done.data["rows"][1]["perplexity"]["value"] == pytest.approx(here.rows[1].perplexity.value, rel=1e-5)
    assert "against IR: change" in to_html(here)
