"""Killed at random moments, resumed, and the same to the byte."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

import pytest

TRIALS = 25
ARGUMENTS = ["--method", "skim", "--bits", "3.3", "--outliers", "0.5", "--calib-windows", "6", "--calib-window", "48"]


def quantize(arguments: list[str], log: str) -> None:
    """The verb, in a process that has everything imported already; its words go to a file."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    from anyquant.cli import main

    sys.argv = ["anyquant", "quantize", *arguments]
    main()


@pytest.fixture(scope="module")
def server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "transformers.models.llama.modeling_llama", "anyquant.cli", "anyquant.pipeline"]
    )
    return context


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


class Runs:
    """Runs of the verb on one model, each in a process of its own."""

    def __init__(self, server: multiprocessing.context.ForkServerContext, model: Path, folder: Path) -> None:
        self.server, self.model, self.folder = server, model, folder

    def start(self, out: str, *more: str) -> multiprocessing.context.ForkServerProcess:
        arguments = [str(self.model), "-o", str(self.folder / out), *ARGUMENTS, *more]
        process = self.server.Process(target=quantize, args=(arguments, str(self.folder / "log")))
        process.start()
        return process

    def finish(self, out: str, *more: str) -> dict[str, str]:
        process = self.start(out, *more)
        process.join(300)
        assert process.exitcode == 0, (self.folder / "log").read_text()
        return hashes(self.folder / out)


@pytest.fixture
def runs(server: multiprocessing.context.ForkServerContext, tiny_llama: Path, tmp_path: Path) -> Runs:
    return Runs(server, tiny_llama, tmp_path)


def stage(folder: Path) -> str:
    """How far a killed run has come."""
    work = folder / "out.work"
    if (folder / "out").exists():
        return "finished"
    if list(folder.glob(".out.partial-*")):
        return "writing"
    if (work / "tensors").exists():
        return "quantizing"
    if (work / "tables").exists():
        return "measuring"
    return "calibrating" if (work / "calibration").exists() else "starting"


def begun(folder: Path) -> bool:
    """Whether there is something to resume."""
    return (folder / "out.work" / "job.json").exists()


def ended(folder: Path) -> bool:
    """Whether all was written, even if the run was killed while it removed its work folder."""
    return stage(folder) == "finished" and not begun(folder)


@pytest.mark.slow
def test_killed_at_25_random_moments(runs: Runs) -> None:
    folder, calibrated = runs.folder, runs.folder / "calibrated"
    runs.finish("warm", "--work-dir", str(calibrated))
    for later in ("tables", "tensors"):
        shutil.rmtree(calibrated / later)
    durations = []
    for out, more in (("whole", []), ("rest", ["--work-dir", str(folder / "copy")])):
        if more:
            shutil.copytree(calibrated, folder / "copy")
        began = time.monotonic()
        expected = runs.finish(out, *more)
        durations.append(time.monotonic() - began)
    assert not (folder / "whole.work").exists()
    rng = random.Random(0)
    seen: dict[str, int] = {}
    for trial in range(TRIALS):
        # Most of the time goes into the calibration: every other trial begins behind it.
        if trial % 2:
            shutil.copytree(calibrated, folder / "out.work")
        process = runs.start("out")
        time.sleep(rng.uniform(0, durations[trial % 2]))
        process.kill()
        process.join()
        where = stage(folder)
        seen[where] = seen.get(where, 0) + 1
        resume = ["--resume"] if begun(folder) else []
        found = hashes(folder / "out") if ended(folder) else runs.finish("out", *resume)
        assert found == expected, where
        assert not (folder / "out.work").exists()
        known = {"warm", "whole", "rest", "calibrated", "copy", "out", "log", "out.work"}
        assert not {path.name for path in folder.iterdir()} - known
        shutil.rmtree(folder / "out")
        shutil.rmtree(folder / "out.work", ignore_errors=True)
    print(f"killed while: {seen}")
    assert len(seen) >= 3, seen


@pytest.mark.slow
def test_killed_while_the_work_folder_is_removed(runs: Runs) -> None:
    """Files go in any order; what is left of the calibration is as good as what an interrupted one leaves."""
    kept, work = runs.folder / "kept", runs.folder / "out.work"
    runs.finish("warm", "--work-dir", str(kept))
    expected = runs.finish("out")
    files = sorted(path.name for path in (kept / "calibration").iterdir())
    assert len(files) == 6
    for gone in files:
        shutil.copytree(kept, work)
        for name in {gone, "about.json"}:
            (work / "calibration" / name).unlink()
        assert runs.finish("out", "--resume") == expected, gone
        assert not work.exists()


@pytest.mark.slow
def test_killed_again_and_again_it_still_ends(runs: Runs) -> None:
    expected = runs.finish("whole")
    delay = 0.2
    for _ in range(40):
        process = runs.start("out", *(["--resume"] if begun(runs.folder) else []))
        process.join(delay)
        if process.exitcode is not None:
            assert process.exitcode == 0, (runs.folder / "log").read_text()
            break
        process.kill()
        process.join()
        if ended(runs.folder):
            break
        delay += 0.1  # a step that takes longer than the time it gets would never end
    assert hashes(runs.folder / "out") == expected


def test_killed_when_all_but_the_work_folder_was_done(runs: Runs) -> None:
    work = runs.folder / "kept"
    expected = runs.finish("out", "--work-dir", str(work))
    work.rename(runs.folder / "out.work")
    assert runs.finish("out", "--resume") == expected
    assert not (runs.folder / "out.work").exists()
    # Something else under that name stays as it is.
    runs.finish("other", "--work-dir", str(work))
    (runs.folder / "other" / "anyquant.json").unlink()
    process = runs.start("other", "--resume", "--work-dir", str(work))
    process.join(300)
    assert process.exitcode == 2
    assert "exists and is not empty" in (runs.folder / "log").read_text()


def test_any_number_of_workers_gives_the_same_bytes(runs: Runs) -> None:
    assert runs.finish("one", "--workers", "1") == runs.finish("five", "--workers", "5")
