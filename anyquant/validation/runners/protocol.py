"""What a runner is, and how one is described and opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from anyquant.errors import AnyquantError, InputError
from anyquant.workers import default_threads

KINDS = ("checkpoint", "ir", "gguf", "onnx")


class Runner(Protocol):
    """One model in one runtime. All runners get the same token ids; none adds any of its own."""

    name: str
    runtime: str

    def logits(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of one window, read from an empty cache.

        Args:
            token_ids: [n] ids, n at most the context the runner was opened with.

        Returns:
            [n, vocabulary] float32: row i is the prediction after tokens 0..i.
        """

    def generate(self, prompt_ids: list[int], n: int) -> list[int]:
        """The n most probable tokens after a prompt, one after the other; does not stop at an end token."""

    def close(self) -> None:
        """Free the model."""


@runtime_checkable
class TextRunner(Runner, Protocol):
    """A runner whose file brings a tokenizer."""

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text by the file's own tokenizer.

        Args:
            text: of any length.
            special: whether names of special tokens are these tokens; then none is put before the text.
        """


@dataclass(frozen=True)
class RunnerSpec:
    """A runner to be opened, here or in another process.

    Attributes:
        name: of the row in the report.
        kind: one of KINDS.
        path: file, folder or hub id.
        context: tokens that a window, or a prompt with its answer, may have.
        threads: to compute with; 0 takes the cores there are.
        revision: of a hub checkpoint.
        trust_remote_code: for a checkpoint with code of its own.
        activations: of an IR, quantized to this format ("bfp6"); None leaves them in float32.
        device: of an IR: "cuda" runs our kernels on that GPU, "cpu" torch's on dequantized weights.
    """

    name: str
    kind: str
    path: str
    context: int
    threads: int = 0
    revision: str | None = None
    trust_remote_code: bool = False
    activations: str | None = None
    device: str = "cpu"

    @property
    def thread_count(self) -> int:
        """Threads, resolved."""
        return self.threads or default_threads()


def open_runner(spec: RunnerSpec) -> Runner:
    """Open a runner in this process.

    Raises:
        InputError: the model cannot be read.
        MissingDependency: its runtime is not installed.
        MachineError: the runtime cannot be used here.
    """
    if spec.kind == "checkpoint":
        from anyquant.validation.runners.torch import open_checkpoint_runner

        return open_checkpoint_runner(spec)
    if spec.kind == "ir":
        from anyquant.validation.runners.torch import open_ir_runner

        return open_ir_runner(spec)
    if spec.kind == "gguf":
        from anyquant.validation.runners.llamacpp import LlamaCppRunner

        return LlamaCppRunner(spec.name, Path(spec.path), context=spec.context, threads=spec.thread_count)
    if spec.kind == "onnx":
        from anyquant.validation.runners.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(spec.name, Path(spec.path), threads=spec.thread_count)
    raise AnyquantError(f"runner kind {spec.kind!r} is none of {', '.join(KINDS)}")


def check_ids(token_ids: NDArray[np.int64], vocabulary: int, name: str) -> None:
    """Refuse ids that the model has no embedding for.

    Raises:
        InputError: the tokenizer and the model do not belong together.
    """
    if token_ids.size and not (int(token_ids.min()) >= 0 and int(token_ids.max()) < vocabulary):
        bad = int(np.flatnonzero((token_ids < 0) | (token_ids >= vocabulary))[0])
        raise InputError(
            f"{name}: token id {int(token_ids[bad])} at position {bad}, but the model has {vocabulary:,} tokens. "
            "The tokenizer does not belong to this model."
        )
