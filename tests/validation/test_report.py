"""JSON, HTML and the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from anyquant.errors import MachineError
from anyquant.reporting.estimate import Estimate
from anyquant.validation import ValidationReport, format_table
from anyquant.validation.html import to_html
from anyquant.validation.plots import plots
from anyquant.validation.report import to_json, write_report
from anyquant.validation.results import (
    Comparison,
    Gate,
    LogitIndex,
    ModelRow,
    TensorComparison,
    TensorDifference,
    TopDifference,
)

HOSTILE = '<script src="https://evil.example/x.js">&[bold]'
NAN = float("nan")


def estimate(value: float, error: float | None = 0.01) -> Estimate:
    return Estimate(value, 8192, error, *((None, None) if error is None else (value - 0.02, value + 0.02)))


def compared(reference: str, candidate: str, kl: float, max_abs: float = 0.5) -> Comparison:
    tops = (TopDifference(1, 7, 5, 9, 0.3, False), TopDifference(0, 3, 5, 6, 0.01, True))
    tail = tuple(kl * (i + 1) / 50 for i in range(100))
    kls = (estimate(kl), estimate(kl / 2), estimate(kl * 9), estimate(kl * 30, None))
    at = LogitIndex(1, 7, 5)
    return Comparison(
        reference, candidate, max_abs, at, 38.2, 0, *kls, estimate(0.91), 1, tops, estimate(0.7), tail
    )  # fmt: skip


def row(name: str, nbytes: int, perplexity: float, kind: str = "fp32") -> ModelRow:
    found = estimate(perplexity, 0.4)
    text = f"Paris {HOSTILE}"
    return ModelRow(
        name, f"runtime {name}", nbytes, 4.5, kind, "reasons", found, text, (1, 2, 3), 12.0, 1.5, 2.5, 512 << 20
    )


@pytest.fixture
def report() -> ValidationReport:
    return ValidationReport(
        model={
            "name": f"smol {HOSTILE}", "architecture": "llama", "method": "block", "settings": {"block": 32},
            "source": "smollm2.gguf", "weights": 134_515_008, "quantized_bits": 4.25, "bits_per_weight": 5.2,
        },
        data={
            "text": "news.txt", "tokens": 80_000, "windows": 16, "windows_available": 156, "window": 512,
            "leading_token": None, "seed": 0, "resamples": 1000, "tie_tolerance": 0.05,
        },
        environment={
            "packages": {"numpy": "2.4", "torch": "2.13"}, "python": "3.11", "system": "Linux", "cpu": "A CPU",
            "cores": 2, "threads": 2,
        },
        rows=(
            row("source", 98_000_000, 21.3), row("IR", 86_000_000, 24.1), row("GGUF", 91_727_360, 24.2, "rounded"),
            row("ONNX", 89_000_000, 24.1),
        ),
        comparisons=(
            compared("source", "IR", 0.09), compared("source", "GGUF", 0.1), compared("source", "ONNX", 0.09),
            compared("IR", "GGUF", 0.004), compared("IR", "ONNX", 1e-11, 1e-4),
        ),
        tensors=(
            TensorComparison("IR", 272, 272, (), "", 134_515_008), TensorComparison("GGUF", 272, 272, ()),
            TensorComparison(
                "ONNX", 271, 272, (TensorDifference(f"q {HOSTILE}", "1 of 9 values differ", (0, 3), 0.5, NAN),)
            ),
        ),
        gates=(
            Gate("tensors equal", "GGUF", 0.0, 0.0, True, "272 of 272 tensors equal bit for bit"),
            Gate("KL to PyTorch", "GGUF", 0.004, 0.01, True, "fine"),
            Gate("tensors equal", "ONNX", 1.0, 0.0, False, f"first q {HOSTILE}"),
        ),
        notes=(f"a note {HOSTILE}",),
        prompt=f"What? {HOSTILE}",
        seconds=321.0,
    )  # fmt: skip


def test_html_is_whole_escaped_and_self_contained(report: ValidationReport, check_page: Callable[[str], None]) -> None:
    pytest.importorskip("matplotlib")
    page = to_html(report)
    check_page(page)
    assert page.count("<svg") == 3
    assert "FAILED" in page
    assert page.count("&lt;script src=") >= 8
    assert "24.10 ± 0.40" in page
    assert "271/272 equal" in page


def test_html_is_the_same_for_the_same_report(report: ValidationReport) -> None:
    pytest.importorskip("matplotlib")
    assert to_html(report) == to_html(report)


def test_html_without_matplotlib_says_so(report: ValidationReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = to_html(report)
    assert "<svg" not in page
    assert "matplotlib is not installed" in page
    assert "anyquant[report]" in page


def test_a_report_with_little_in_it(report: ValidationReport) -> None:
    """No source, one window, and numbers that are not finite."""
    bare = replace(
        report,
        rows=(replace(report.rows[1], perplexity=Estimate(NAN, 5), peak_memory=None, token_ids=()),),
        comparisons=(replace(report.comparisons[3], kl_per_token=(NAN,), kl_mean=Estimate(NAN, 5), max_abs_logit=NAN),),
        tensors=report.tensors[:1],
        gates=(),
        notes=(),
    )
    page = to_html(bare)
    assert "not finite" in page
    assert "PASSED" in page
    assert "not finite" in format_table(bare)
    json.dumps(to_json(bare), allow_nan=False)
    pytest.importorskip("matplotlib")
    assert plots(bare) == {}


def test_json_is_strict_and_complete(report: ValidationReport, tmp_path: Path) -> None:
    first = replace(report.comparisons[0], kl_mean=Estimate(0.25, 8192, 0.01, 0.125, 0.5))
    report = replace(report, comparisons=(first, *report.comparisons[1:]))
    json_path, html_path = write_report(report, tmp_path / "deep" / "report")
    data = json.loads(json_path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert data["schema"] == "anyquant.validation/1"
    assert (data["passed"], data["exit_code"]) == (False, 4)
    assert to_json(replace(report, gates=report.gates[:2]))["exit_code"] == 0
    assert data["tensors"][2]["differences"][0]["found"] is None
    assert data["comparisons"][0]["kl_mean"] == {
        "value": 0.25,
        "n": 8192,
        "error": 0.01,
        "low": 0.125,
        "high": 0.5,
    }
    assert "kl_per_token" not in data["comparisons"][0]
    assert data["failed"] == [data["gates"][2]]
    assert html_path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(p.name for p in json_path.parent.iterdir()) == ["report.html", "report.json"]


def test_an_unwritable_folder_is_a_clear_error(report: ValidationReport, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot write the report"):
        write_report(report, tmp_path / "file")


def test_temporary_names_are_never_used_twice(
    report: ValidationReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of two containers may have the same number; and a failure leaves no temporary file."""
    seen = []

    def fail(self: Path, target: Path) -> None:
        seen.append(self.name)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    for _ in range(2):
        with pytest.raises(MachineError, match="No space left"):
            write_report(report, tmp_path)
    assert len(set(seen)) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_table_fits_80_columns(report: ValidationReport) -> None:
    text = format_table(report)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in text
    assert "\x1b[" in format_table(report, color=True)
    (line,) = [line for line in lines if line.strip().startswith("GGUF  ")]
    assert line.split()[-1] == "pass"
    assert "91.7 MB" in line
    assert "272/272" in line
    assert any(line.strip().startswith("ONNX ") and line.endswith("FAIL") for line in lines)
    assert "2 of 3 gates passed" in text
    assert "Greedy answers to: What? " in text
    assert sum(line.startswith(("source: Paris", "IR: Paris", "GGUF: Paris", "ONNX: Paris")) for line in lines) == 4
    assert "FAILED" not in text  # the command line says which failed, and why
    assert "[bold]" in text  # markup of the outside stays text
