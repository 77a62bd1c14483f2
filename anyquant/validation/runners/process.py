"""A runner in a process of its own.

A runtime that crashes (an assertion in C++, no memory) then ends as an error message, its peak memory is its own, and
the OpenMP libraries of three runtimes do not meet in one process.

Requests and answers are one JSON line each; logits follow their answer as raw float32 bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from anyquant import errors
from anyquant.errors import AnyquantError, MachineError
from anyquant.validation.runners.protocol import RunnerSpec

_TAIL = 600


def revive(kind: str, message: str) -> AnyquantError:
    """The exception that the other process raised, by class name; the message is kept as it is."""
    found = getattr(errors, kind, AnyquantError)
    if not (isinstance(found, type) and issubclass(found, AnyquantError)):
        found = AnyquantError
    error = found.__new__(found)
    Exception.__init__(error, message)
    return error


def import_path() -> str:
    """PYTHONPATH for the other process: sys.path without the current folder, whose files are not to be run."""
    here = Path.cwd().resolve()
    return os.pathsep.join(entry for entry in sys.path if os.path.isabs(entry) and Path(entry).resolve() != here)


class ProcessRunner:
    """A runner behind a pipe; the same protocol, and the same exceptions.

    Attributes:
        name: of the row in the report.
        runtime: what computes, with version.
        load_seconds: the model took to open, in its process.
    """

    def __init__(self, spec: RunnerSpec, command: list[str] | None = None) -> None:
        """Start the process and open the model there.

        Args:
            spec: of the runner.
            command: in place of the worker, for tests.

        Raises:
            AnyquantError: whatever opening the runner raises.
            MachineError: the process died.
        """
        self.name, self._spec = spec.name, spec
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(spec.thread_count),
            # The runners take turns: threads that wait must leave the cores to the others.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
            "PYTHONPATH": import_path(),
        }
        self._process = subprocess.Popen(
            command or [sys.executable, "-P", "-m", "anyquant.validation.runners.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
        )
        try:
            answer = self._ask({"op": "open", "spec": asdict(spec)})
        except BaseException:
            self.close()
            raise
        self.runtime, self.load_seconds = str(answer["runtime"]), float(answer["seconds"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = b""
        if not line:
            raise self._death(str(request["op"]))
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise revive(answer["error"], answer["message"])
        return answer

    def _death(self, doing: str) -> MachineError:
        code = self._process.wait()
        self._stderr.seek(0)
        tail = self._stderr.read().decode("utf-8", "replace").strip()[-_TAIL:]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        memory = " That is how Linux ends what needs more memory than there is." if code == -9 else ""
        return MachineError(
            f"{self.name}: the process of its runtime {how} during {doing!r} ({self._spec.path}).{memory}"
            + (f" It last said: {tail}" if tail else "")
        )

    def logits(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Runner."""
        answer = self._ask({"op": "logits", "ids": [int(i) for i in token_ids]})
        result = np.empty(answer["shape"], dtype=np.float32)
        view = result.data.cast("B")
        assert self._process.stdout is not None
        done = 0
        while done < len(view):
            count = self._process.stdout.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise self._death("logits")
            done += count
        return result

    def generate(self, prompt_ids: list[int], n: int) -> list[int]:
        """See Runner."""
        return [int(i) for i in self._ask({"op": "generate", "ids": list(prompt_ids), "n": n})["ids"]]

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """See TextRunner."""
        return [int(i) for i in self._ask({"op": "tokenize", "text": text, "special": special})["ids"]]

    def peak_memory(self) -> int | None:
        """Bytes, the most the process ever held; None if unknown."""
        value = self._ask({"op": "memory"})["bytes"]
        return None if value is None else int(value)

    def close(self) -> None:
        """End the process; at once, as there is nothing to save."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with suppress(OSError):  # a request that never arrived
                    stream.close()
