"""For benchmarks: commands that have to succeed, and measurements in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a command and return what it printed.

    Args:
        command: the program and its arguments.
        environment: variables beside ours.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def anyquant(*arguments: str) -> None:
    """Run the command line of this installation; see :func:`run`."""
    run(str(Path(sys.executable).with_name("anyquant")), *arguments)


def measured(script: str, *arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, float]:
    """Run a script in a process of its own; return the JSON object in its last line of output. See :func:`run`."""
    lines = run(sys.executable, script, *arguments, environment=environment).splitlines()
    found: dict[str, float] = json.loads(lines[-1])
    return found


def memory(key: str) -> float:
    """Megabytes of this process: VmRSS is what it holds, VmHWM what it held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024 / 1e6
