"""What the numbers were taken on: versions, processor; and the size of what was measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from anyquant import ir
from anyquant.validation.arithmetic import onnx_model_file

PACKAGES = ("anyquant", "numpy", "torch", "transformers", "tokenizers", "gguf", "xllamacpp", "onnx", "onnxruntime")


def environment(threads: int) -> dict[str, Any]:
    """Versions of the packages that matter, processor, cores, threads used."""
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
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def ir_bytes(model: ir.Model) -> int:
    """Bytes of the IR folder's weight files and manifest; tokenizer and other side files are not counted."""
    return sum(ir.file_sizes(model).values())


def onnx_bytes(path: Path) -> int:
    """Bytes of the graph and of the files its weights lie in."""
    import onnx

    file = onnx_model_file(path)
    model = onnx.load(str(file), load_external_data=False)
    locations = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location" and tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    beside = (file.parent / location for location in locations)
    total: int = file.stat().st_size + sum(part.stat().st_size for part in beside if part.is_file())
    return total
