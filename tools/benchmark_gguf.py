"""GGUF files in one llama.cpp, side by side: tensor types of our own, and stock ones of the same model.

    python tools/benchmark_gguf.py --work W [--bits 4,3,2.5] [--model MODEL] [--threads 2] [--tokens 64] [--rounds 3]

Quantizes the model with skim to each number of bits and with block to Q4_0 and Q8_0, exports all of them, and FP16 and
FP32 besides (all stay in --work). Each file runs in a process of its own, in turns, in the llama.cpp inside the package
xllamacpp: --prompt tokens at once, then --tokens one by one, with a cache in FP32. Prints medians of tokens per second,
and what the processes hold in memory. Without --model: SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import fetch
import numpy as np
import processes

WARM = 8
"""Tokens that are written before time is taken; the first of all also has tensors repacked."""
STOCK = {"Q4_0": "4.25", "Q8_0": "8.25"}
"""Types, and bits of block floating point that lead to them."""


def prepare(work: Path, model: str, bits: list[str]) -> dict[str, Path]:
    """Make what is not there yet: label -> file."""

    def quantized(method: str, each: str) -> Path:
        folder = work / f"{method}-{each}"
        if not folder.exists():
            # Speed does not depend on which weights get more bits; that takes minutes to find out.
            importance = ["--importance", "norms"] if method == "skim" else []
            processes.anyquant("quantize", model, "-o", str(folder), "--method", method, "--bits", each, *importance)
        return folder

    def exported(folder: Path, *options: str) -> Path:
        file = work / f"{folder.name}{''.join(options)}.gguf"
        if not file.exists():
            processes.anyquant("export", "gguf", str(folder), "-o", str(file), *options)
        return file

    first = quantized("skim", bits[0])
    files = {f"ours, skim @ {each}": exported(quantized("skim", each)) for each in bits}
    files |= {name: exported(quantized("block", each)) for name, each in STOCK.items()}
    files["F16"] = exported(first, "--layout=f16", "--allow-rounding")
    files["F32"] = exported(first, "--layout=f32")
    return files


def run_one(file: Path, prompt: int, tokens: int, threads: int) -> dict[str, float]:
    """Tokens per second at once and one by one, and megabytes."""
    from anyquant.validation.runners.llamacpp import LlamaCppRunner

    runner = LlamaCppRunner(file.name, file, context=prompt + tokens + WARM, threads=threads)
    given = (np.random.default_rng(0).integers(0, runner.vocabulary, prompt)).tolist()
    runner.generate(given, WARM)

    def seconds(ids: list[int], count: int) -> float:
        start = time.perf_counter()
        runner.generate(ids, count)
        return time.perf_counter() - start

    at_once = min(seconds(given, 1) for _ in range(3))
    one_by_one = seconds(given[:4], WARM + tokens) - seconds(given[:4], WARM)
    return {"prefill": prompt / at_once, "decode": tokens / one_by_one, "held": processes.memory("VmRSS")}


def measure(file: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """The same by a process of its own."""
    options = [f"--{name}={getattr(arguments, name)}" for name in ("prompt", "tokens", "threads")]
    return processes.measured(__file__, "--one", str(file), "--work", str(file.parent), *options)


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder in which everything stays")
    parser.add_argument("--model", help="instead of SmolLM2-135M-Instruct")
    parser.add_argument("--bits", default="4,3,2.5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_one(arguments.one, arguments.prompt, arguments.tokens, arguments.threads)))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    files = prepare(arguments.work, arguments.model or str(fetch.fetch("gguf")["gguf"]), arguments.bits.split(","))
    found: dict[str, list[dict[str, float]]] = {label: [] for label in files}
    for _ in range(arguments.rounds):
        for label, file in files.items():
            found[label].append(measure(file, arguments))
    medians = {
        label: {key: statistics.median(one[key] for one in each) for key in each[0]} for label, each in found.items()
    }
    print("| file | MB | tokens/s one by one | of Q4_0 | tokens/s at once | of Q4_0 | MB held |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for label, one in medians.items():
        shown = [f"{files[label].stat().st_size / 1e6:,.1f}"]
        for key in ("decode", "prefill"):
            shown += [f"{one[key]:.1f}", f"{one[key] / medians['Q4_0'][key]:.2f}"]
        print(f"| {label} | {' | '.join(shown)} | {one['held']:,.0f} |")


if __name__ == "__main__":
    main()
