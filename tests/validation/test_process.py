"""A runner behind a pipe."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import errors
from anyquant.errors import AnyquantError, InputError, MachineError, MissingDependency, NonFiniteError
from anyquant.validation.runners import RunnerSpec, open_runner
from anyquant.validation.runners import worker as worker_module
from anyquant.validation.runners.process import ProcessRunner, revive
from anyquant.validation.runners.worker import peak_memory, serve


@pytest.fixture(scope="module")
def remote(tiny_gguf: Path) -> Iterator[ProcessRunner]:
    pytest.importorskip("xllamacpp")
    runner = ProcessRunner(RunnerSpec("GGUF", "gguf", str(tiny_gguf), 64, 1))
    yield runner
    runner.close()


def test_the_same_numbers_as_in_this_process(remote: ProcessRunner, tiny_gguf: Path) -> None:
    here = open_runner(RunnerSpec("GGUF", "gguf", str(tiny_gguf), 64, 1))
    ids = np.array([4, 9, 300, 17])
    np.testing.assert_array_equal(remote.logits(ids), here.logits(ids))
    assert remote.generate([4, 9], 5) == here.generate([4, 9], 5)
    assert remote.runtime == here.runtime
    here.close()


def test_its_memory_is_its_own(remote: ProcessRunner) -> None:
    mine, others = peak_memory(), remote.peak_memory()
    assert mine is not None
    assert others is not None
    assert 10 << 20 < others < mine  # this process has PyTorch loaded, that one has not


def test_errors_come_through_and_the_runner_lives_on(remote: ProcessRunner) -> None:
    with pytest.raises(InputError, match="token id 999"):
        remote.logits(np.array([999]))
    assert remote.logits(np.array([1])).shape == (1, 389)


def test_an_error_of_opening_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.gguf"):
        ProcessRunner(RunnerSpec("GGUF", "gguf", str(tmp_path / "none.gguf"), 64, 1))


@pytest.mark.parametrize("entry", [None, "", ".", "absolute"])
def test_the_current_folder_is_not_imported_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str | None
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the module of the current folder was run')")
    monkeypatch.chdir(tmp_path)
    if entry is not None:
        monkeypatch.syspath_prepend(str(tmp_path) if entry == "absolute" else entry)
    with pytest.raises(InputError, match=r"cannot read .*none\.gguf"):
        ProcessRunner(RunnerSpec("GGUF", "gguf", "none.gguf", 64, 1))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "import sys; print('assertion: x > 0', file=sys.stderr); sys.exit(3)",
            r"ended with code 3 .*assertion: x > 0",
        ),
        ("import os; os.kill(os.getpid(), 9)", r"killed by signal 9 .*more memory than there is"),
        ("import os; os.close(1); input(); os.abort()", r"killed by signal 6 during 'open' \(model\.gguf\)"),
    ],
)
def test_a_death_is_an_error_message(script: str, message: str) -> None:
    with pytest.raises(MachineError, match=message):
        ProcessRunner(RunnerSpec("GGUF", "gguf", "model.gguf", 64, 1), [sys.executable, "-c", script])


def test_a_death_in_the_middle_of_logits() -> None:
    script = (
        "import sys; i = sys.stdin.readline\n"
        'i(); print(\'{"ok": true, "runtime": "x", "seconds": 0}\', flush=True)\n'
        "i(); print('{\"ok\": true, \"shape\": [2, 3]}', flush=True); sys.stdout.buffer.write(b'abcd')"
    )
    runner = ProcessRunner(RunnerSpec("GGUF", "gguf", "model.gguf", 64, 1), [sys.executable, "-c", script])
    with pytest.raises(MachineError, match="during 'logits'"):
        runner.logits(np.array([1, 2]))
    with pytest.raises(MachineError, match="during 'generate'"):
        runner.generate([1], 1)
    runner.close()


def test_revived_errors_keep_class_and_message() -> None:
    missing = revive("MissingDependency", "needs x")
    assert isinstance(missing, MissingDependency)
    assert (str(missing), missing.exit_code) == ("needs x", 5)
    assert isinstance(revive("NonFiniteError", "bad"), NonFiniteError)
    for odd in ("NoSuchError", "annotations", "Exception"):
        assert type(revive(odd, "m")) is AnyquantError
    assert errors.AnyquantError.exit_code == 1


class Fake:
    """A runner that fails as asked."""

    name, runtime = "fake", "fake 1"

    def __init__(self) -> None:
        self.closed = False

    def logits(self, ids: np.ndarray) -> np.ndarray:
        if ids[0] == 0:
            raise MemoryError
        if ids[0] == 1:
            raise ZeroDivisionError("by nothing")
        return np.arange(6, dtype=np.float64).reshape(2, 3)

    def generate(self, ids: list[int], n: int) -> list[int]:
        return ids * n

    def close(self) -> None:
        self.closed = True


def answers(requests: list[dict[str, Any]]) -> io.BytesIO:
    out = io.BytesIO()
    serve(io.BytesIO(b"".join(json.dumps(r).encode() + b"\n" for r in requests)), out)
    out.seek(0)
    return out


def test_the_worker_answers_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setattr(worker_module, "open_runner", lambda spec: fake)
    out = answers(
        [
            {"op": "generate", "ids": [1], "n": 1},
            {"op": "open", "spec": asdict(RunnerSpec("x", "ir", "y", 8))},
            {"op": "logits", "ids": [0]},
            {"op": "logits", "ids": [1]},
            {"op": "memory"},
            {"op": "generate", "ids": [7], "n": 2},
            {"op": "dance"},
            {"op": "logits", "ids": [2]},
        ]
    )
    lines = [json.loads(out.readline()) for _ in range(8)]
    assert [line["ok"] for line in lines] == [False, True, False, False, True, True, False, True]
    assert lines[0]["message"] == "no runner is open"
    assert lines[1]["runtime"] == "fake 1"
    assert lines[2]["error"] == "MachineError"
    assert lines[3]["error"] == "AnyquantError"
    assert "ZeroDivisionError: by nothing (test_process.py, line" in lines[3]["message"]
    assert lines[5]["ids"] == [7, 7]
    assert "unknown request 'dance'" in lines[6]["message"]
    assert lines[7]["shape"] == [2, 3]
    np.testing.assert_array_equal(np.frombuffer(out.read(), dtype=np.float32), np.arange(6))
    assert fake.closed
