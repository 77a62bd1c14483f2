"""What a validation is asked to do."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from anyquant.errors import UsageError
from anyquant.validation.activation_formats import activation_format

DEFAULT_PROMPT = "What is the capital of France?"


@dataclass(frozen=True)
class ValidationSettings:
    """Settings of one validation.

    Attributes:
        model: the IR folder.
        text: UTF-8 file to measure on.
        source: the unquantized model (folder, hub id or .gguf file); without it nothing is said of quality loss.
        gguf: an exported GGUF file, run by llama.cpp.
        onnx: an exported ONNX folder, run by ONNX Runtime.
        activations: "bfp2" to "bfp8": measure the IR with activations of this format too; None does not.
        device: "cuda" or "cuda:1": measure the IR on that GPU too, with our kernels, in FP32; "cpu" does not.
        report: folder for report.json and report.html; None writes nothing.
        window: tokens per window, cut to the model's context.
        windows: at most this many windows, drawn with ``seed`` where the text has more.
        seed: for the choice of windows and the bootstrap.
        resamples: of the bootstrap.
        threads: per runner; None takes the cores there are.
        max_kl: gate on the mean KL(source || candidate), in nats.
        min_top1: gate on the top-1 agreement with the source, 0..1.
        tie_tolerance: a differing top-1 counts as a near tie where the reference's logits of the two tokens
            differ by less than this.
        prompt: sent through the chat template; all models continue it greedily.
        generate: tokens of greedy text; 0 for none.
        revision: of a hub source.
        trust_remote_code: for a source that brings its own code.
        isolate: run every model in a process of its own: a crash of a runtime becomes an error message, and peak
            memory is that of the model alone.
    """

    model: Path
    text: Path
    source: str | None = None
    gguf: Path | None = None
    onnx: Path | None = None
    activations: str | None = None
    device: str = "cpu"
    report: Path | None = None
    window: int = 512
    windows: int = 16
    seed: int = 0
    resamples: int = 1000
    threads: int | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    tie_tolerance: float = 0.05
    prompt: str = DEFAULT_PROMPT
    generate: int = 32
    revision: str | None = None
    trust_remote_code: bool = False
    isolate: bool = True

    def check(self) -> None:
        """Refuse settings that contradict themselves, before anything is loaded.

        Raises:
            UsageError: a number is out of range, a format unknown, or a gate has nothing to compare with.
        """
        for name, least in (("window", 2), ("windows", 1), ("resamples", 2), ("generate", 0), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"{name} is {value}; it must be at least {least}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads is {self.threads}; it must be at least 1")
        if not (math.isfinite(self.tie_tolerance) and self.tie_tolerance >= 0):
            raise UsageError(f"tie_tolerance is {self.tie_tolerance}; it must be a number of at least 0")
        if self.activations is not None:
            activation_format(self.activations)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"--device is {self.device!r}; it is cpu, cuda, or cuda and the number of a GPU: cuda:1")
        if self.max_kl is not None and not (math.isfinite(self.max_kl) and self.max_kl >= 0):
            raise UsageError(f"--max-kl is {self.max_kl}; it must be a number of at least 0, in nats")
        if self.min_top1 is not None and not 0 <= self.min_top1 <= 1:
            raise UsageError(f"--min-top1 is {self.min_top1}; it is a share between 0 and 1, such as 0.95")
        if self.source is None and (self.max_kl is not None or self.min_top1 is not None):
            raise UsageError(
                "--max-kl and --min-top1 are measured against the unquantized source: name it with --source MODEL"
            )
