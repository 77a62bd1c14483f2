"""All that a machine with an NVIDIA GPU can tell of the CUDA kernels, in under 8 minutes, written to one JSON file.

    tools/gpu_check [--out gpu-check.json] [--material .cache/gpu-material] [--seconds 460]
    tools/gpu_check --prepare            make the material, on a machine with a network: 35 MB

Runs from the source tree, without installing, by any Python that has torch for CUDA, cuda-core, NVRTC, safetensors,
transformers and pytest; it needs no network. Steps: the tests marked cuda; four real layers of SmolLM2 and their
logits; every kernel by itself; tools/benchmark_cuda.py; every kernel in compute-sanitizer (memcheck, racecheck,
synccheck, initcheck), where there is one. The file is rewritten after each step, so that what was found before a crash
is kept.

Exit codes: 0 all checks that were run succeeded; 4 some did not; 6 there is no GPU that the kernels run on. Speed is
reported and decides nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fetch  # the script tools/fetch.py
import torch
from benchmark_cuda import about, lines_of

from anyquant.errors import AnyquantError, MachineError
from anyquant.runtime.cuda.launcher import require_gpu
from gpu.material import prepare
from gpu.report import FAILED, NOT_RUN, OK, Report, limited

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = ["tests/runtime/test_cuda_gpu.py"]
WORKER = (sys.executable, "-m", "gpu.worker")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Seconds that steps may take, the benchmark before the sanitizers: those repeat what others found.
TESTS_LIMIT, MATERIAL_LIMIT, LAUNCHES_LIMIT, BENCHMARK_LIMIT, SANITIZER_LIMIT = 200.0, 60.0, 40.0, 150.0, 45.0


class Check:
    """The steps, which share a report and the time that is left."""

    def __init__(self, report: Report, material: Path, seconds: float, work: Path) -> None:
        """Args: report: to add to; material: see there; seconds: for all steps; work: folder for what is in between."""
        self._report, self._material, self._work = report, material, work
        self._end = time.monotonic() + seconds
        self._environment = {
            "ANYQUANT_CACHE": str(work / "cache"),
            "HF_HUB_OFFLINE": "1",
            "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",  # some containers set it: FP32 is no FP32 then
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tools"), *_inherited("PYTHONPATH")]),
        }

    def run(self) -> None:
        """All of them."""
        self._tests()
        self._layers()
        self._launches()
        self._benchmark()
        self._sanitizers()

    def _step(self, name: str, limit: float, command: Sequence[str], **environment: str) -> tuple[str, dict[str, Any]]:
        """Run a command; its outcome, and what it printed where it did not succeed."""
        left = self._end - time.monotonic()
        if left < 1:
            return NOT_RUN, {"reason": "no time was left"}
        print(f"{name} ...", file=sys.stderr, flush=True)
        done = limited(command, min(limit, left), {**self._environment, **environment}, REPOSITORY)
        return (OK, {}) if done.code == 0 else (FAILED, {"code": done.code, "output": done.output})

    def _tests(self) -> None:
        since, xml = time.monotonic(), self._work / "tests.xml"
        beside = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
        outcome, details = self._step(
            "tests", TESTS_LIMIT,
            [sys.executable, "-m", "pytest", "-v", "-m", "cuda and not slow", "-W", "default", "-p", "no:cacheprovider",
             *beside, f"--junitxml={xml}", *TESTS],
        )  # fmt: skip
        if xml.is_file():
            details |= counts(xml)
            if outcome == OK and not details["passed"]:
                outcome = FAILED
        self._report.add("tests", outcome, since, **details)

    def _layers(self) -> None:
        since, result = time.monotonic(), self._work / "material.json"
        if not self._material.is_dir():
            reason = f"there is no {self._material}: tools/gpu_check --prepare makes it, where there is a network"
            self._report.add("material", NOT_RUN, since, reason=reason)
            return
        outcome, details = self._step(
            "material", MATERIAL_LIMIT, [*WORKER, "material", str(self._material.resolve()), str(result)]
        )
        if result.is_file():
            details["results"] = json.loads(result.read_text(encoding="utf-8"))
        self._report.add("material", outcome, since, **details)

    def _launches(self) -> None:
        since = time.monotonic()
        outcome, details = self._step("launches", LAUNCHES_LIMIT, [*WORKER, "launches"])
        self._report.add("launches", outcome, since, **details)

    def _benchmark(self) -> None:
        since, result = time.monotonic(), self._work / "benchmark.json"
        command = [sys.executable, str(REPOSITORY / "tools" / "benchmark_cuda.py"), "--json", str(result)]
        outcome, details = self._step("benchmark", BENCHMARK_LIMIT, command)
        if result.is_file():
            details["results"] = json.loads(result.read_text(encoding="utf-8"))
        self._report.add("benchmark", outcome, since, **details)

    def _sanitizers(self) -> None:
        program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        for tool in SANITIZERS:
            since = time.monotonic()
            if program is None:
                self._report.add(tool, NOT_RUN, since, reason="compute-sanitizer is not installed")
                continue
            # torch would give kernels pieces of larger memory, where what is out of bounds is in other pieces.
            outcome, details = self._step(
                tool, SANITIZER_LIMIT, [program, "--tool", tool, "--error-exitcode", "99", *WORKER, "launches"],
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )  # fmt: skip
            self._report.add(tool, outcome, since, **details)


def _inherited(variable: str) -> list[str]:
    return [os.environ[variable]] if os.environ.get(variable) else []


def counts(xml: Path) -> dict[str, Any]:
    """What pytest wrote: how many tests passed, failed and were skipped, and why the first ones failed."""
    cases = list(ElementTree.parse(xml).iter("testcase"))
    failed = [(case, found) for case in cases if (found := [*case.iter("failure"), *case.iter("error")])]
    skipped = [reason.get("message", "") for case in cases for reason in case.iter("skipped")]
    first = [{"test": case.get("name"), "message": (found[0].text or "")[-1500:]} for case, found in failed[:5]]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "reasons_of_skipped": sorted(set(skipped)),
        "failures": first,
    }


def machine() -> dict[str, Any]:
    """The GPU, the driver, the versions of what was used, and the state of the sources.

    Raises:
        MachineError: there is no GPU that the kernels run on.
    """

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    def said(*command: str) -> str:
        try:
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=20)
            return done.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return "unknown"

    architecture = require_gpu(torch.device("cuda"))
    packages = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "transformers", "triton")
    return {
        **about(torch.device("cuda")),
        "tf32_override": os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
        "architecture": architecture,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        **{package: installed(package) for package in packages},
        "commit": said("git", "rev-parse", "HEAD"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps, or make the material."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--material", type=Path, default=REPOSITORY / ".cache" / "gpu-material")
    parser.add_argument("--seconds", type=float, default=460, help="for all steps together")
    parser.add_argument("--prepare", action="store_true", help="make the material and do nothing else")
    given = parser.parse_args(arguments)
    try:
        if given.prepare:
            print(f"{given.material}: {make_material(given.material):,} bytes")
            return 0
        try:
            report = Report(given.out)
        except OSError as error:
            raise MachineError(f"cannot write {given.out}: {error.strerror or error}") from error
        try:
            report.content["machine"] = machine()
        except AnyquantError as error:
            report.content["machine"] = {"problem": str(error)}
            report.write()
            raise
    except (AnyquantError, fetch.FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    with tempfile.TemporaryDirectory(prefix="anyquant-gpu-") as work:
        Check(report, given.material, given.seconds, Path(work)).run()
    report.content["finished"] = True
    report.write()
    print("\n".join(summary(report.content)))
    print(f"\n{given.out}")
    return 4 if report.failed else 0


def make_material(folder: Path) -> int:
    """Make it out of what tools/fetch.py fetches; its bytes."""
    paths = fetch.fetch("gguf", "text")
    return prepare(paths["gguf"], paths["text"], folder)


def summary(content: dict[str, Any]) -> list[str]:
    """What a reader wants to know first; speed is all of it in Markdown."""
    found_on = content["machine"]
    lines = [f"{found_on['gpu']}, driver {found_on['driver']}, torch {found_on['torch']}", ""]
    for name, step in content["steps"].items():
        said = step.get("reason", "")
        if "passed" in step:
            said = f"{step['passed']} passed, {step['failed']} failed, {step['skipped']} skipped"
        lines.append(f"{name:10} {step['outcome']:8} {step['seconds']:6.1f} s  {said}")
    if found := content["steps"].get("benchmark", {}).get("results"):
        lines += ["", *lines_of(found)]
    return lines
