"""Running a command to its end: exit code, seconds, and the peak memory of all its processes together."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import measure  # the script tools/measure.py

TOOLS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Finished:
    """A command that came to its end.

    Attributes:
        code: exit code.
        seconds: by the clock, the start of Python included.
        peak: bytes that its processes held at once, at most, as seen every tenth of a second.
        out: its standard output.
        err: its standard error.
    """

    code: int
    seconds: float
    peak: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """The last line that it wrote to standard error."""
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else f"it ended with exit code {self.code} and said nothing"


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Finished:
    """Run a command. When this is interrupted, the command is ended."""
    started, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(list(command), stdout=out, stderr=err, env=environment)
        try:
            while process.poll() is None:
                looked = time.monotonic()
                peak = max(peak, measure.memory(process.pid))
                pause = max(measure.INTERVAL, measure.SHARE * (time.monotonic() - looked))
                try:
                    process.wait(pause)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        seconds = time.monotonic() - started
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return Finished(process.returncode, seconds, 1024 * peak, *texts)


def anyquant(*arguments: str) -> Finished:
    """The command line of anyquant, without the network."""
    return run([sys.executable, "-m", "anyquant", *arguments], {**os.environ, "HF_HUB_OFFLINE": "1"})


def worker(task: Path) -> Finished:
    """A task of :mod:`accuracy.worker`, without the network."""
    path = os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return run([sys.executable, "-m", "accuracy.worker", str(task)], environment)
