"""A sweep: its numbers against single runs and a validation, statistics that are taken once, and its verb."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import measuring
from anyquant.calibration import CalibrationSettings
from anyquant.checkpoint import Checkpoint, open_checkpoint
from anyquant.errors import AnyquantError, CorruptFileError, InfeasibleTarget, InputError, MachineError, UsageError
from anyquant.job import Job, Target
from anyquant.methods.block import BlockMethod
from anyquant.methods.skim import SkimMethod
from anyquant.pipeline import run
from anyquant.planning import Plan, plan
from anyquant.sweep import Point, Sweep, TextSettings, load_sweep, sweep
from anyquant.validation import ValidationSettings, validate
from anyquant.workfolder import work_folder


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_llama))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextSettings:
    path = tmp_path_factory.mktemp("sweep") / "text.txt"
    lines = (f"number {i} of the quick brown fox, who said: what is the time? [{i * i}]\n" for i in range(60))
    path.write_text("".join(lines), encoding="utf-8")
    return TextSettings(path, windows=5, window=48, seed=3, resamples=200)


def block(bits: float, allocation: str = "model") -> Job:
    return Job("block", Target(bits=bits), allocation=allocation)


@pytest.fixture(scope="module")
def found(checkpoint: Checkpoint, text: TextSettings) -> Sweep:
    """Three targets that can be met, one that cannot."""
    return sweep(checkpoint, [block(bits) for bits in (3.4, 2.25, 20.0, 8.25)], text=text)


def test_bits_and_bytes_are_those_of_the_written_folders(found: Sweep, checkpoint: Checkpoint, tmp_path: Path) -> None:
    for place in (0, 1, 3):
        point = found.points[place]
        planned = plan(checkpoint, block(point.target["bits"]))
        model = run(planned, tmp_path / str(place))
        assert model.path is not None
        assert point.nbytes == sum((model.path / file).stat().st_size for file in planned.files)
        assert (point.bits, point.bits_per_weight) == (model.quantized_bits, model.bits_per_weight)
        # The tables hold the relative error of each matrix times its weights.
        chosen = [e for e in model.entries.values() if e.quantized]
        lost = sum((e.error or 0) * e.spec.numel for e in chosen) / sum(e.spec.numel for e in chosen)
        assert point.loss == pytest.approx(lost, rel=1e-5)
        if planned.loss is not None:
            assert point.loss == pytest.approx(planned.loss)


def test_an_infeasible_target_does_not_stop_the_others(found: Sweep) -> None:
    missed = found.points[2]
    assert "--bits 20 is outside the feasible interval 2.2500 .. 8.2500" in missed.problem
    assert missed == Point({"bits": 20.0, "size_of": "ir", "count": "all", "allocation": "model"}, missed.problem)
    assert [p.target["bits"] for p in found.found] == [2.25, 3.4, 8.25]
    with pytest.raises(AnyquantError, match="can be compared"):
        found.difference(missed, found.points[0])


def test_losses_are_those_of_a_validation(
    found: Sweep, checkpoint: Checkpoint, tiny_llama: Path, text: TextSettings, tmp_path: Path
) -> None:
    run(plan(checkpoint, block(3.4)), tmp_path / "ir")
    settings = ValidationSettings(
        tmp_path / "ir", text.path, str(tiny_llama), window=text.window, windows=text.windows, seed=text.seed,
        resamples=text.resamples, generate=0, isolate=False,
    )  # fmt: skip
    report = validate(settings)
    compared = report.comparison("source", "IR")
    point = found.points[0]
    assert compared is not None
    for ours, theirs in (
        (point.kl, compared.kl_mean),
        (point.top1, compared.top1),
        (point.perplexity_change, compared.perplexity_change),
        (point.perplexity, report.rows[1].perplexity),
        (found.model["perplexity"], report.rows[0].perplexity),
    ):
        assert ours is not None
        assert vars(ours) == pytest.approx(vars(theirs), rel=1e-4, abs=1e-6)
    assert len(point.kl_per_window) == text.windows
    assert point.kl is not None
    assert np.mean(point.kl_per_window) == pytest.approx(point.kl.value)
    assert found.data == {key: report.data[key] for key in found.data or {}}


def test_kl_falls_with_the_size(found: Sweep) -> None:
    values = [point.kl.value for point in found.found if point.kl]
    assert len(values) == 3
    assert values == sorted(values, reverse=True)


def test_differences_are_paired(found: Sweep, text: TextSettings) -> None:
    """Against the bootstrap written out: the same windows are drawn for both."""
    a, b = found.points[0], found.points[1]
    change = np.array(a.kl_per_window) - np.array(b.kl_per_window)
    drawn = np.random.default_rng(text.seed).integers(0, text.windows, (text.resamples, text.windows))
    means = np.array([change[row].mean() for row in drawn])
    found_difference = found.difference(a, b)
    assert found_difference.value == pytest.approx(change.mean())
    assert found_difference.error == pytest.approx(means.std(ddof=1))
    low, high = np.quantile(means, [0.025, 0.975])
    assert (found_difference.low, found_difference.high) == pytest.approx((low, high))
    assert found_difference.low is not None
    assert found.difference(a, a).value == 0.0


def test_tables_are_taken_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path
) -> None:
    measured: Counter[int] = Counter()
    errors = BlockMethod.errors

    def count(self: Any, weight: np.ndarray, *rest: Any) -> Any:
        measured[weight.size] += 1
        return errors(self, weight, *rest)

    monkeypatch.setattr(BlockMethod, "errors", count)
    jobs = [block(2.9), block(4.25, "uniform"), block(3.4), block(5.1)]
    with work_folder(tmp_path / "work", jobs[0].identity(checkpoint), resume=False, keep=True) as work:
        first = sweep(checkpoint, jobs, work)
        assert measured.total() == 14
        assert sweep(checkpoint, jobs[:2], work).points == first.points[:2]
    assert measured.total() == 14
    assert all(point.kl is None for point in first.points)
    assert first.data is None
    # Without a folder of the caller's there is one for the time of the sweep.
    assert sweep(checkpoint, jobs[:2]).points == first.points[:2]
    assert measured.total() == 28


def test_the_calibration_is_taken_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, text: TextSettings, tmp_path: Path
) -> None:
    folders, tables, quantized = [], [], []
    calibrate, errors, quantize = measuring.calibrate, SkimMethod.errors, SkimMethod.quantize

    def counted_calibrate(checkpoint: Any, names: Any, settings: Any, folder: Path, *rest: Any) -> Any:
        folders.append((folder, (folder / "about.json").exists()))
        return calibrate(checkpoint, names, settings, folder, *rest)

    def counted_errors(self: Any, weight: Any, statistics: Any, settings: Any) -> Any:
        tables.append(statistics)
        return errors(self, weight, statistics, settings)

    def counted_quantize(self: Any, weight: Any, levels: Any, statistics: Any, settings: Any) -> Any:
        quantized.append(statistics)
        return quantize(self, weight, levels, statistics, settings)

    monkeypatch.setattr(measuring, "calibrate", counted_calibrate)
    monkeypatch.setattr(SkimMethod, "errors", counted_errors)
    monkeypatch.setattr(SkimMethod, "quantize", counted_quantize)
    little = CalibrationSettings(str(text.path), windows=3, window=24)
    jobs = [Job("skim", Target(bits=bits), calibration=little) for bits in (4.0, 5.5)]
    found = sweep(checkpoint, jobs, text=replace(text, windows=2))
    assert len({folder for folder, _ in folders}) == 1
    assert [there for _, there in folders].count(False) == 1  # all others found it complete
    assert len(tables) == 14
    assert len(quantized) == 28
    assert all(known is not None and known.tokens > 0 for known in tables + quantized)
    assert found.calibration is not None
    assert found.calibration["fingerprint"] != "0" * 64
    assert found.points[0].loss > found.points[1].loss > 0  # type: ignore[operator]
    assert not folders[0][0].exists()
    assert any("on the text of the calibration" in note for note in found.notes)


def test_any_architecture(tiny_checkpoint: Callable[..., Path], text: TextSettings) -> None:
    """Weights stored as [in, out], and experts in 3-D, come back as the model stores them."""
    mixture = tiny_checkpoint("mixtral", num_local_experts=4, num_experts_per_tok=2)
    for folder in (tiny_checkpoint("gpt2"), mixture):
        found = sweep(open_checkpoint(str(folder)), [block(8.25)], text=replace(text, windows=2))
        [point] = found.points
        assert point.kl is not None
        assert 0 < point.kl.value < 0.01


def test_json_there_and_back(found: Sweep, tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(found.to_json(), allow_nan=False), encoding="utf-8")
    read = load_sweep(path)
    assert read == found
    a, b = read.points[0], read.points[3]
    assert vars(read.difference(a, b)) == vars(found.difference(found.points[0], found.points[3]))


def test_what_is_not_finite_becomes_null(found: Sweep, tmp_path: Path) -> None:
    from anyquant.report.sweeps import sweep_text
    from anyquant.reporting.estimate import Estimate

    broken = replace(found.points[0], kl=Estimate(math.nan, 9), kl_per_window=(math.nan, 1.0))
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(replace(found, points=(broken,)).to_json(), allow_nan=False), encoding="utf-8")
    [point] = load_sweep(path).points
    assert point.kl is None
    assert math.isnan(point.kl_per_window[0])
    assert f"{broken.bits:.3f}" in sweep_text(load_sweep(path))


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "anyquant.sweep/2"},
        {"points": [3]},
        {"points": [{"target": {}, "bits": "many"}]},
        {"model": {"name": 3, "fingerprint": "", "bytes": 1}},
        {"data": {"text": "t"}},
        {"seconds": None},
        {"environment": []},
    ],
)
def test_a_file_that_is_no_sweep(found: Sweep, tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(found.to_json() | change), encoding="utf-8")
    with pytest.raises(CorruptFileError, match=r"sweep\.json"):
        load_sweep(path)


def test_a_damaged_point(found: Sweep, tmp_path: Path) -> None:
    data = found.to_json()
    for key, value in (("kl_per_window", ["x"]), ("nbytes", 1.5), ("kl", {"value": 1.0}), ("target", None)):
        path = tmp_path / "sweep.json"
        path.write_text(json.dumps(data | {"points": [data["points"][0] | {key: value}]}), encoding="utf-8")
        with pytest.raises(CorruptFileError, match=r"sweep\.json"):
            load_sweep(path)


def test_what_is_refused(checkpoint: Checkpoint, text: TextSettings, tmp_path: Path) -> None:
    with pytest.raises(InfeasibleTarget, match="--bits 20"):
        sweep(checkpoint, [block(20.0), block(1.0)])
    with pytest.raises(UsageError, match="target and allocation alone"):
        sweep(checkpoint, [block(4.25), Job("block", Target(bits=4.5), {"block": 16})])
    with pytest.raises(UsageError, match="at least one"):
        sweep(checkpoint, [])
    with pytest.raises(UsageError, match="leave out sequential"):
        sweep(checkpoint, [Job("skim", Target(bits=3.3), sequential=True)])
    for setting in ({"windows": 0}, {"window": 1}, {"resamples": 1}, {"seed": -1}):
        with pytest.raises(UsageError, match=next(iter(setting))):
            sweep(checkpoint, [block(4.25)], text=replace(text, **setting))
    with pytest.raises(InputError, match="cannot read the text"):
        sweep(checkpoint, [block(4.25)], text=TextSettings(tmp_path / "none"))
    (tmp_path / "short").write_text("two words")
    with pytest.raises(InputError, match="tokens, but one window needs"):
        sweep(checkpoint, [block(4.25)], text=TextSettings(tmp_path / "short"))


def test_no_room_for_the_logits(checkpoint: Checkpoint, text: TextSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    before = set(os.listdir(tempfile.gettempdir()))
    monkeypatch.setattr(os, "posix_fallocate", full)
    notes: list[str] = []
    nbytes = f"{5 * 48 * 389 * 4:,} bytes"
    with pytest.raises(MachineError, match=f"no room in .* for {nbytes} of the source's logits.*--windows"):
        sweep(checkpoint, [block(4.25)], text=text, note=notes.append)
    assert any(nbytes in note for note in notes)  # said before it was tried
    assert not {name for name in set(os.listdir(tempfile.gettempdir())) - before if name.startswith("anyquant-")}


def test_notes_say_how_far_errors_can_be_trusted(checkpoint: Checkpoint, text: TextSettings, found: Sweep) -> None:
    assert any("48 tokens" in note for note in found.notes)
    assert any("5 windows are rough" in note for note in found.notes)
    single = sweep(checkpoint, [block(4.25)], text=replace(text, windows=1))
    assert any("single window" in note for note in single.notes)
    assert single.points[0].kl is not None
    assert single.points[0].kl.error is None


def test_progress(checkpoint: Checkpoint, text: TextSettings) -> None:
    seen: list[tuple[str, int, int]] = []
    sweep(checkpoint, [block(4.25)], text=replace(text, windows=2), progress=lambda *step: seen.append(step))
    assert [step for step in seen if step[0].startswith("running")] == [
        ("running source", 1, 2), ("running source", 2, 2), ("running 4.250 bits", 1, 2), ("running 4.250 bits", 2, 2),
    ]  # fmt: skip
    assert all(0 < done <= total for _, done, total in seen)


def test_the_verb(
    invoke: Callable[..., Any], tiny_llama: Path, tmp_path: Path, text: TextSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--text", text.path, "--windows", 2, "--window", 32, "--report", tmp_path / "report")
    work = ("--work-dir", tmp_path / "work")
    result = invoke("sweep", tiny_llama, "--targets", "4.25,3.4,20", *options, *work, "--json")
    assert result.code == 0, result.err
    assert [p["target"]["bits"] for p in result.data["points"]] == [4.25, 3.4, 20.0]
    assert result.data == json.loads((tmp_path / "report" / "sweep.json").read_text(encoding="utf-8"))
    assert (tmp_path / "report" / "sweep.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "bytes in" in result.err  # what the logits will take
    assert (tmp_path / "work" / "tables").is_dir()

    result = invoke("sweep", tiny_llama, "--targets", "4.25,20", *work)
    assert result.code == 0
    assert "4.250" in result.out
    assert "20: --bits 20 is outside" in result.out
    assert "KL" not in result.out
    assert invoke("sweep", tiny_llama, "--targets", "4.25", "--quiet").out == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--targets", "3,many"), 2, "is not a list of bits"),
        ((), 2, "--targets"),
        (("--targets", "-3"), 2, "positive"),
        (("--targets", "20,1"), 2, "feasible interval"),
        (("--targets", "4.25", "--text", "nothing.txt"), 3, "nothing.txt"),
        (("--targets", "4.25", "--method", "none"), 2, "none"),
    ],
)
def test_what_the_verb_refuses(
    invoke: Callable[..., Any], tiny_llama: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    result = invoke("sweep", tiny_llama, *arguments, "--json")
    assert result.code == code
    assert words in result.err
    assert result.data["exit_code"] == code


def test_a_work_folder_of_another_job(invoke: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> None:
    assert invoke("sweep", tiny_llama, "--targets", "4.25", "--work-dir", tmp_path / "w").code == 0
    result = invoke("sweep", tiny_llama, "--targets", "4.5", "--block", "16", "--work-dir", tmp_path / "w")
    assert result.code == 2
    assert "belongs to another job" in result.err


def test_a_plan_knows_the_same_loss(checkpoint: Checkpoint) -> None:
    planned = plan(checkpoint, block(3.4))
    assert isinstance(planned, Plan)
    [point] = sweep(checkpoint, [block(3.4)]).points
    assert point.loss == pytest.approx(planned.loss)
