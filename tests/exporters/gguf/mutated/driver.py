"""A process that opens GGUF files, which may be meant to end it: by our reader, and by llama.cpp with the plug-in.

A line of stdin is a JSON object, and the line of stdout after it the answer:

    {"read": path}      {"values": [[name, shape, digest], ...]} or {"error": class, "code": of the exit, "says": text}
    {"compute": path}   {"logits": FP32 numbers in hex} or {"refused": what llama.cpp says}

What takes too long or too much memory ends as it does anywhere: by a signal, or by an exception.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from anyquant import ir
from anyquant.errors import AnyquantError, InputError
from anyquant.exporters.gguf import GGUFExporter
from anyquant.runtime import ggml_plugin
from anyquant.validation.runners import llama_abi, llamacpp

SECONDS = 30
MEMORY = 6 << 30
TOKENS = np.arange(5, 13)
TAKEN = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_libc = ctypes.CDLL(None)


def read(path: str) -> dict[str, Any]:
    try:
        found = [[name, values.shape, ir.digest(values)] for name, values in GGUFExporter().read(Path(path))]
    except AnyquantError as error:
        return {"error": type(error).__name__, "code": error.exit_code, "says": str(error)}
    return {"values": found}


def mapped(path: str) -> list[tuple[int, int]]:
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(os.path.realpath(path))]
    return [(int(begin, 16), int(end, 16)) for begin, end in (line.split()[0].split("-") for line in lines)]


def compute(path: str) -> dict[str, Any]:
    try:
        runner = llamacpp.LlamaCppRunner("mutant", Path(path), context=16, threads=1)
    except InputError as error:
        return {"refused": str(error)}
    logits, places = runner.logits(TOKENS), mapped(path)
    runner.close()
    # Nothing else comes to where this file was: what the plug-in knows of tensors there shall not answer for others.
    for begin, end in places:
        _libc.mmap(_POINTER(begin), _SIZE(end - begin), mmap.PROT_READ, TAKEN, -1, _SIZE(0))
    return {"logits": logits.tobytes().hex()}


def prepare() -> None:
    llama_abi.library()
    ggml_plugin.register()
    # The runner has our parser look through a file first, which a server has not.
    anything: Any = SimpleNamespace(tensors={})
    setattr(llamacpp, "parse", lambda data, name: anything)  # noqa: B010


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    prepared = False
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print
        for line in sys.stdin:
            [(what, path)] = json.loads(line).items()
            if what == "compute" and not prepared:
                prepare()
                prepared = True
            signal.alarm(SECONDS)
            answer = read(path) if what == "read" else compute(path)
            signal.alarm(0)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
