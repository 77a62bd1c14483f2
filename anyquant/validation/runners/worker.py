"""The other end of :mod:`anyquant.validation.runners.process`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from anyquant.errors import AnyquantError
from anyquant.validation.runners.protocol import Runner, RunnerSpec, TextRunner, open_runner


def peak_memory() -> int | None:
    """Bytes of memory this process held at most; None where Linux's /proc is missing.

    Not getrusage: what that reports survives exec, so a child would start with its parent's peak.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are no more. An error of a request is its answer, not the end."""
    runner: Runner | None = None
    for line in requests:
        payload: NDArray[np.float32] | None = None
        try:
            request = json.loads(line)
            if request["op"] == "open":
                started = time.monotonic()
                runner = open_runner(RunnerSpec(**request["spec"]))
                answer = {"runtime": runner.runtime, "seconds": time.monotonic() - started}
            else:
                answer, payload = _compute(runner, request)
            answer["ok"] = True
        except AnyquantError as error:
            answer = {"ok": False, "error": type(error).__name__, "message": str(error)}
        except MemoryError:
            answer = {"ok": False, "error": "MachineError", "message": "memory is not sufficient for this model"}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
            answer = {"ok": False, "error": "AnyquantError", "message": message}
        answers.write(json.dumps(answer).encode() + b"\n")
        if payload is not None:
            answers.write(payload.data)
        answers.flush()
    if runner is not None:
        runner.close()


def _compute(runner: Runner | None, request: dict[str, Any]) -> tuple[dict[str, Any], NDArray[np.float32] | None]:
    if request["op"] == "memory":
        return {"bytes": peak_memory()}, None
    if runner is None:
        raise AnyquantError("no runner is open")
    if request["op"] == "logits":
        logits = np.ascontiguousarray(runner.logits(np.asarray(request["ids"], dtype=np.int64)), dtype=np.float32)
        return {"shape": list(logits.shape)}, logits
    if request["op"] == "generate":
        return {"ids": runner.generate([int(i) for i in request["ids"]], int(request["n"]))}, None
    if request["op"] == "tokenize" and isinstance(runner, TextRunner):
        return {"ids": runner.tokenize(request["text"], request["special"])}, None
    raise AnyquantError(f"unknown request {request['op']!r}")


def main() -> None:
    """Serve on the pipes; what libraries print goes to stderr and cannot garble the answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
