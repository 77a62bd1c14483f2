"""Commands of anyquant, read by its own command line: which job they are, and what that job shares with others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anyquant.cli import cli
from anyquant.job import Job
from anyquant.options import job_of as job_of_options

_NOT_THE_JOB = ("model", "output", "revision", "trust_remote_code", "work_dir", "resume", "as_json", "quiet")


@dataclass(frozen=True)
class Calibration:
    """The text that everyone is calibrated on.

    Attributes:
        text: a file, or "self".
        windows: of it.
        window: tokens in each.
        seed: of the choice of windows.
    """

    text: str
    windows: int
    window: int
    seed: int = 0

    def arguments(self) -> list[str]:
        """As anyquant takes them."""
        return [
            "--calib", self.text, "--calib-windows", f"{self.windows}", "--calib-window", f"{self.window}",
            "--seed", f"{self.seed}",
        ]  # fmt: skip


def job_of(model: str, arguments: Sequence[str]) -> Job:
    """The job of ``anyquant quantize MODEL ARGUMENTS``.

    Raises:
        UsageError: anyquant does not take them.
        click.UsageError: likewise.
    """
    context = cli.commands["quantize"].make_context("quantize", [model, "-o", "unused", *arguments])
    with context:
        options: dict[str, Any] = {key: value for key, value in context.params.items() if key not in _NOT_THE_JOB}
        job: Job = job_of_options(**options)
    return job


def complete(model: str, arguments: Sequence[str], calibration: Calibration) -> list[str]:
    """The arguments with those of the calibration, where the method needs one."""
    given = list(arguments)
    return [*given, *calibration.arguments()] if job_of(model, given).needs_statistics else given


def key(identity: dict[str, Any]) -> str:
    """A short name for what an identity describes."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
