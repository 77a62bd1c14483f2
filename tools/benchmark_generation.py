"""A whole model, token by token, in torch, ONNX Runtime and onnxruntime-genai: packed, in FP32, in the builder's int4.

    python tools/benchmark_generation.py --work W [--bits 4,3] [--model MODEL] [--threads 2] [--tokens 64] [--rounds 3]

Quantizes the model with skim to each number of bits, exports it (both stay in --work), lets onnxruntime-genai's builder
make its int4 of it, and writes --tokens tokens after a prompt with each, in a process of its own, in turns. Prints
medians of tokens per second, and what the processes hold in memory in the end. Without --model: SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fetch
import numpy as np
import processes

PROMPT = "<|im_start|>user\nWhy is the sea salty?<|im_end|>\n<|im_start|>assistant\n"
WARM = 8
"""Tokens that are written before time is taken."""


def in_torch(folder: Path, tokens: int, threads: int, *, dequantize: bool) -> float:
    """Seconds of so many tokens by transformers' generate."""
    import torch

    import anyquant

    torch.set_num_threads(threads)
    model: Any = anyquant.load(folder, dequantize=dequantize)
    ids = torch.tensor([_prompt(folder)])

    def write(count: int) -> None:
        options: Any = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)

    return _seconds(write, tokens)


def in_onnxruntime(folder: Path, tokens: int, threads: int) -> float:
    """Seconds of so many tokens in ONNX Runtime, whose cache stays with it."""
    import onnxruntime as ort

    import anyquant

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = anyquant.onnx_session(folder, options)
    past = [node.name for node in session.get_inputs() if node.name.startswith("past_key_values.")]
    sizes = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    shape = (1, sizes["num_key_value_heads"], 0, sizes["head_size"])
    outputs = ["logits", *(name.replace("past_key_values.", "present.") for name in past)]
    known = {node.name for node in session.get_inputs()}
    prompt = _prompt(folder)

    def write(count: int) -> None:
        cache = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name in past}
        step, length = np.array([prompt]), 0
        for _ in range(count):
            length += step.shape[1]
            given = {
                "input_ids": step,
                "attention_mask": np.ones((1, length), np.int64),
                "position_ids": np.arange(length - step.shape[1], length)[None],
            }
            feed = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in given.items() if name in known}
            logits, *present = session.run_with_ort_values(outputs, feed | cache)
            cache = dict(zip(past, present, strict=True))
            step = logits.numpy()[:, -1:].argmax(-1)

    return _seconds(write, tokens)


def in_genai(folder: Path, tokens: int, threads: int) -> float:
    """Seconds of so many tokens in onnxruntime-genai."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)
    prompt = _prompt(folder)

    def write(count: int) -> None:
        parameters = genai.GeneratorParams(model)
        size = len(prompt) + count
        parameters.set_search_options(max_length=size, min_length=size, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        for _ in range(count):
            generator.generate_next_token()

    return _seconds(write, tokens)


RUNTIMES: dict[str, Callable[[Path, int, int], float]] = {
    "torch, FP32": lambda *given: in_torch(*given, dequantize=True),
    "torch": lambda *given: in_torch(*given, dequantize=False),
    "ONNX Runtime": in_onnxruntime,
    "onnxruntime-genai": in_genai,
}


def _prompt(folder: Path) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    return ids


def _seconds(write: Callable[[int], None], tokens: int) -> float:
    """Of the tokens after the first ones, which cost more."""
    write(WARM)
    times = []
    for count in (WARM, WARM + tokens):
        start = time.perf_counter()
        write(count)
        times.append(time.perf_counter() - start)
    return times[1] - times[0]


def prepare(work: Path, model: str, bits: list[str]) -> list[tuple[str, str, Path]]:
    """Make what is not there yet: (runtime, label, folder) of all that is run."""
    for each in bits:
        if not (work / f"ir{each}").exists():
            processes.anyquant("quantize", model, "-o", str(work / f"ir{each}"), "--method", "skim", "--bits", each)
        if not (work / f"onnx{each}").exists():
            processes.anyquant(
                "export", "onnx", str(work / f"ir{each}"), "-o", str(work / f"onnx{each}"), "--with-runtime"
            )
    first = str(work / f"ir{bits[0]}")
    if not (work / "onnx-fp32").exists():
        processes.anyquant("export", "onnx", first, "-o", str(work / "onnx-fp32"), "--layout", "f32")
    if not (work / "onnx-int4").exists():
        import anyquant

        anyquant.load(first, dequantize=True).save_pretrained(work / "huggingface")
        for path in (work / "onnx-fp32").glob("*token*"):
            (work / "huggingface" / path.name).write_bytes(path.read_bytes())
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(work / "huggingface")]
        made = str(work / "onnx-int4.partial")
        processes.run(*builder, "-o", made, "-p", "int4", "-e", "cpu", "-c", str(work / "cache"))
        Path(made).rename(work / "onnx-int4")
    rows = [("torch, FP32", "FP32", Path(first))]
    rows += [("torch", f"{each} bits", work / f"ir{each}") for each in bits]
    for runtime in ("ONNX Runtime", "onnxruntime-genai"):
        rows += [(runtime, "FP32", work / "onnx-fp32"), (runtime, "builder's int4", work / "onnx-int4")]
        rows += [(runtime, f"{each} bits", work / f"onnx{each}") for each in bits]
    return rows


def measure(runtime: str, folder: Path, tokens: int, threads: int) -> dict[str, float]:
    """Tokens per second and memory, by a process of its own."""
    options = [f"--tokens={tokens}", f"--threads={threads}"]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    return processes.measured(__file__, "--one", runtime, "--work", str(folder), *options, environment=environment)


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder in which everything stays")
    parser.add_argument("--model", help="instead of SmolLM2-135M-Instruct")
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=RUNTIMES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        seconds = RUNTIMES[arguments.one](arguments.work, arguments.tokens, arguments.threads)
        held, most = processes.memory("VmRSS"), processes.memory("VmHWM")
        print(json.dumps({"speed": arguments.tokens / seconds, "held": held, "most": most}))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = arguments.model or str(fetch.fetch("gguf")["gguf"])
    rows = prepare(arguments.work, model, arguments.bits.split(","))
    found: list[list[dict[str, float]]] = [[] for _ in rows]
    for _ in range(arguments.rounds):
        for (runtime, _label, folder), each in zip(rows, found, strict=True):
            each.append(measure(runtime, folder, arguments.tokens, arguments.threads))
    speeds = [statistics.median(one["speed"] for one in each) for each in found]
    slow = dict(zip(((runtime, label) for runtime, label, _ in rows), speeds, strict=True))
    print("| runtime | matrices | tokens/s | of FP32 there | of FP32 in torch | MB held | MB at most |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for (runtime, label, _), speed, each in zip(rows, speeds, found, strict=True):
        here = slow["torch, FP32" if runtime.startswith("torch") else runtime, "FP32"]
        memory = (f"{statistics.median(one[key] for one in each):,.0f}" for key in ("held", "most"))
        ratios = (f"{speed / other:.2f}" for other in (here, slow["torch, FP32", "FP32"]))
        print(f"| {' | '.join([runtime.split(',')[0], label, f'{speed:.1f}', *ratios, *memory])} |")


if __name__ == "__main__":
    main()
