"""The whole validation of a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anyquant.errors import CorruptFileError, InputError, MachineError, UsageError, ValidationFailed
from anyquant.reporting.estimate import Estimate
from anyquant.validation import ValidationReport, ValidationSettings, validate
from anyquant.validation.arithmetic import Arithmetic
from anyquant.validation.gates import all_gates, runtime_gates
from anyquant.validation.measure import Station, measure_window
from anyquant.validation.results import Comparison, LogitIndex


@pytest.fixture(scope="module")
def settings(small_validation: Callable[..., ValidationSettings], tiny_gguf: Path) -> ValidationSettings:
    pytest.importorskip("xllamacpp")
    return small_validation(gguf=tiny_gguf, windows=5, generate=6)


@pytest.fixture(scope="module")
def report(settings: ValidationSettings) -> ValidationReport:
    return validate(settings)


def test_a_faithful_export_passes(report: ValidationReport) -> None:
    assert report.failed == []
    report.require()
    assert [row.name for row in report.rows] == ["source", "IR", "GGUF"]
    assert {(c.reference, c.candidate) for c in report.comparisons} == {
        ("source", "IR"),
        ("source", "GGUF"),
        ("IR", "GGUF"),
    }
    assert [(t.file, t.equal == t.total) for t in report.tensors] == [("IR", True), ("GGUF", True)]
    names = {"tensors equal", "same tokens", "max |d logit| to PyTorch", "KL to PyTorch"}
    assert {gate.name for gate in report.gates} == names


def test_numbers_agree_with_each_other(report: ValidationReport, tiny_llama: Path, tiny_gguf: Path) -> None:
    source, quantized, exported = report.rows
    runtime = report.comparison("IR", "GGUF")
    quality = report.comparison("source", "IR")
    assert runtime is not None
    assert quality is not None
    assert runtime.max_abs_logit < 1e-3
    assert runtime.kl_mean.value < 1e-6 < quality.kl_mean.value
    assert runtime.kl_mean.n == len(runtime.kl_per_token) == 5 * 64
    assert quality.kl_median.value <= quality.kl_mean.value * 3
    assert quality.kl_median.value <= quality.kl_p99.value <= quality.kl_max.value
    assert exported.perplexity.value == pytest.approx(quantized.perplexity.value, rel=1e-4)
    assert quality.perplexity_change.value == pytest.approx(quantized.perplexity.value - source.perplexity.value)
    assert source.perplexity.n == 5 * 63
    assert source.perplexity.error is not None
    assert exported.nbytes == tiny_gguf.stat().st_size
    assert source.nbytes == pytest.approx((tiny_llama / "model.safetensors").stat().st_size, rel=0.05)
    assert source.bits_per_weight == pytest.approx(32)
    assert quantized.bits_per_weight < 20
    assert exported.token_ids == quantized.token_ids
    assert len(exported.token_ids) == 6
    assert all(row.peak_memory and row.seconds > 0 for row in report.rows)


def test_the_same_settings_give_the_same_numbers(report: ValidationReport, settings: ValidationSettings) -> None:
    again = validate(replace(settings, gguf=None))
    assert again.comparison("source", "IR") == report.comparison("source", "IR")


def test_short_windows_and_other_doubts_are_noted(report: ValidationReport, settings: ValidationSettings) -> None:
    assert any("64 tokens" in note for note in report.notes)
    single = validate(replace(settings, gguf=None, source=None, windows=1, generate=0))
    assert any("single window" in note for note in single.notes)
    assert any("No --source" in note for note in single.notes)
    assert single.rows[0].perplexity.error is None
    assert single.rows[0].text == ""
    assert single.comparisons == ()


def test_another_source_is_noted(settings: ValidationSettings, tiny_checkpoint: object) -> None:
    other = tiny_checkpoint("llama", seed=9)  # type: ignore[operator]
    found = validate(replace(settings, gguf=None, source=str(other), windows=1, generate=0))
    assert any("fingerprints differ" in note for note in found.notes)


def test_user_gates(settings: ValidationSettings, report: ValidationReport) -> None:
    quality = report.comparison("source", "IR")
    assert quality is not None
    strict = validate(replace(settings, max_kl=quality.kl_mean.value / 2, min_top1=0.0))
    assert {(g.name, g.subject) for g in strict.failed} == {("--max-kl", "IR"), ("--max-kl", "GGUF")}
    with pytest.raises(ValidationFailed, match=r"2 of \d+ gates failed") as caught:
        strict.require()
    assert caught.value.exit_code == 4
    gates = all_gates(replace(settings, min_top1=1.0), (), [quality], {}, {})
    assert [g.passed for g in gates] == [quality.top1.value == 1.0]


def test_an_edited_tensor_is_found_and_fails(settings: ValidationSettings, tmp_path: Path) -> None:
    """One matrix of the IR is edited after the export, manifest and all: both kinds of proof notice."""
    from anyquant import ir

    folder = tmp_path / "edited"
    shutil.copytree(settings.model, folder)
    arrays = load_file(folder / "anyquant.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    arrays[name + ".exponents"][:] += 1
    save_file(arrays, folder / "anyquant.safetensors", {"format": "anyquant"})
    manifest = json.loads((folder / "anyquant.json").read_text())
    manifest["tensors"][name]["sha256"] = ir.tensor_digest(ir.open_ir(folder).tensor(name))
    (folder / "anyquant.json").write_text(json.dumps(manifest))

    calls: list[str] = []
    report = validate(
        replace(settings, model=folder, source=None, windows=2, isolate=True, report=tmp_path / "report"),
        lambda what, done, total: calls.append(what),
    )
    failed = {g.name: g for g in report.failed}
    assert set(failed) == {"tensors equal", "max |d logit| to PyTorch", "KL to PyTorch"}
    assert {g.subject for g in report.failed} == {"GGUF"}
    assert name in failed["tensors equal"].detail
    (difference,) = report.tensors[1].differences
    assert difference.index == (0, 0)
    assert difference.expected == pytest.approx(2 * (difference.found or 0))
    with pytest.raises(ValidationFailed):
        report.require()
    written = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert written["passed"] is False
    assert {g["name"] for g in written["failed"]} == set(failed)
    assert "FAILED" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert any(call.startswith("window 2 of 2") for call in calls)


def test_refusals_before_anything_is_loaded(
    settings: ValidationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("anyquant.validation.run.open_runner", refuse)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(InputError, match=r"short\.txt has \d+ tokens, but one window needs 64"):
        validate(replace(settings, text=short))
    with pytest.raises(InputError, match="there is no"):
        validate(replace(settings, onnx=tmp_path / "none"))
    with pytest.raises(InputError, match="cannot read"):
        validate(replace(settings, gguf=tmp_path / "none.gguf"))
    with pytest.raises(CorruptFileError, match=r"short\.txt: is not a GGUF file"):
        validate(replace(settings, gguf=short))
    with pytest.raises(InputError):
        validate(replace(settings, model=tmp_path))


def test_a_report_that_cannot_be_written_is_refused_first(
    settings: ValidationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anyquant.validation.run._Validation", lambda *_: pytest.fail("the work was begun"))
    (tmp_path / "report.json").write_text('{"schema": "anyquant.report/1"}')
    with pytest.raises(UsageError, match=r"its schema is 'anyquant\.report/1', not 'anyquant\.validation/1'"):
        validate(replace(settings, report=tmp_path))
    with pytest.raises(MachineError, match="cannot write the report"):
        validate(replace(settings, report=tmp_path / "report.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_nothing_is_left_of_a_report_that_was_not_made(settings: ValidationSettings, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        validate(replace(settings, text=tmp_path / "none", report=tmp_path / "deep" / "report"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": None, "max_kl": 0.1}, "name it with --source"),
        ({"source": None, "min_top1": 0.1}, "name it with --source"),
        ({"max_kl": -1.0}, "--max-kl is -1"),
        ({"max_kl": float("nan")}, "--max-kl is nan"),
        ({"min_top1": 95.0}, "share between 0 and 1"),
        ({"window": 1}, "window is 1"),
        ({"windows": 0}, "windows is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"tie_tolerance": float("nan")}, "tie_tolerance"),
    ],
)
def test_settings_that_make_no_sense(settings: ValidationSettings, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate(replace(settings, **changes))  # type: ignore[arg-type]


# --- gates on given numbers


def comparison(max_abs: float, kl: float, scale: float = 20.0) -> Comparison:
    number = Estimate(kl, 10)
    at, top1 = LogitIndex(2, 118, 42), Estimate(1, 10)
    return Comparison("IR", "GGUF", max_abs, at, scale, 0, number, number, number, number, top1, 0, (), number)


@pytest.mark.parametrize(
    ("kind", "max_abs", "kl", "passed"),
    [
        ("fp32", 9e-4, 2.9e-4, True),
        ("fp32", 1.1e-3, 1e-9, False),
        ("fp32", 1e-5, 3.1e-4, False),
        ("fp32", float("nan"), 1e-9, False),
        ("fp32", 1e-5, float("nan"), False),
        ("rounded", 3.0, 9e-3, True),
        ("rounded", 3.0, 1.1e-2, False),
        ("rounded", 3.0, float("nan"), False),
    ],
)
def test_limits_of_the_runtime_gates(kind: str, max_abs: float, kl: float, passed: bool) -> None:
    gates = runtime_gates(comparison(max_abs, kl), Arithmetic(kind, "because"))
    assert all(g.passed for g in gates) == passed
    assert len(gates) == (2 if kind == "fp32" else 1)


@pytest.mark.parametrize(("scale", "limit"), [(5.0, 1e-3), (20.0, 1e-3), (40.0, 2e-3)])
def test_the_logit_gate_is_in_proportion_to_large_logits(scale: float, limit: float) -> None:
    for max_abs, passed in ((limit * 0.99, True), (limit * 1.01, False)):
        gate = runtime_gates(comparison(max_abs, 1e-9, scale), Arithmetic("fp32", "because"))[0]
        assert gate.limit == pytest.approx(limit)
        assert gate.passed == passed
        assert gate.detail.endswith("in window 2, position 118, token 42")


class Table:
    """A runner that looks its logits up."""

    runtime = "table"

    def __init__(self, name: str, rows: np.ndarray) -> None:
        self.name, self.rows = name, rows.astype(np.float32)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return self.rows[: len(ids)]

    def generate(self, ids: list[int], n: int) -> list[int]:
        return [0] * n

    def close(self) -> None:
        """Nothing to free."""


def test_nonfinite_logits_fail_a_gate() -> None:
    rows = np.random.default_rng(0).normal(size=(4, 5))
    bad = rows.copy()
    bad[2, 1] = np.nan
    stations = [Station(Table("IR", rows)), Station(Table("GGUF", bad))]
    pairs: dict[tuple[str, str], list[object]] = {}
    assert list(measure_window(stations, pairs, 0, np.array([0, 1, 2, 3]), 0.0)) == ["IR", "GGUF"]  # type: ignore[arg-type]
    assert [s.nonfinite for s in stations] == [0, 1]
    (gate,) = all_gates(ValidationSettings(Path(), Path()), (), (), {}, {s.name: s.nonfinite for s in stations})
    assert (gate.subject, gate.passed) == ("GGUF", False)


def test_models_of_different_vocabulary_or_length_are_refused() -> None:
    rows = np.zeros((4, 5))
    ids = np.array([0, 1, 2, 3])
    with pytest.raises(InputError, match="GGUF has a vocabulary of 4 tokens, IR one of 5"):
        list(measure_window([Station(Table("IR", rows)), Station(Table("GGUF", rows[:, :4]))], {}, 0, ids, 0.0))
    with pytest.raises(InputError, match=r"IR gave logits of shape \[3, 5\] for 4 tokens"):
        list(measure_window([Station(Table("IR", rows[:3]))], {}, 0, ids, 0.0))
