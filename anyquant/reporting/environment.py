"""What the numbers were taken on: versions, processor."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("anyquant", "numpy", "torch", "transformers", "tokenizers", "gguf", "xllamacpp", "onnx", "onnxruntime")


def versions() -> dict[str, Any]:
    """Versions of the packages that matter, of Python and the system."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "packages": packages,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def environment(threads: int) -> dict[str, Any]:
    """The versions, the processor, its cores and the threads used."""
    return {
        **versions(),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
    }


def processor() -> str:
    """Its name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
