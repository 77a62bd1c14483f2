"""The file that a check on a GPU leaves, with what there is so far, whatever comes after; and commands that may take so
many seconds and no longer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, FAILED, NOT_RUN = "ok", "failed", "not run"
_TAIL = 3000  # characters of output that are kept


class Report:
    """A JSON file: what was checked, in steps, each with its outcome."""

    def __init__(self, path: Path) -> None:
        """Begin it."""
        self._path = path
        self.content: dict[str, Any] = {"finished": False, "steps": {}}
        self.write()

    def write(self) -> None:
        """Write what there is; the file is always a whole one."""
        new = self._path.with_name(f".{self._path.name}.new")
        new.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        new.replace(self._path)

    def add(self, name: str, outcome: str, since: float, **details: Any) -> None:
        """A step is over; since: time.monotonic() when it began."""
        self.content["steps"][name] = {"outcome": outcome, "seconds": round(time.monotonic() - since, 1), **details}
        self.write()

    @property
    def failed(self) -> list[str]:
        """Steps that did not succeed, though they were run."""
        return [name for name, step in self.content["steps"].items() if step["outcome"] == FAILED]


@dataclass(frozen=True)
class Done:
    """A command that ended: its exit code, none where it was stopped, and the end of what it printed."""

    code: int | None
    output: str


def limited(command: Sequence[str], seconds: float, environment: Mapping[str, str], folder: Path) -> Done:
    """Run a command in a folder; with all that it started, it is stopped after so many seconds."""
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(seconds, 1))
        return Done(process.returncode, output[-_TAIL:])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return Done(None, f"{output[-_TAIL:]}\nstopped after {seconds:.0f} seconds")
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
