"""Measuring many quantizations of one model on one text: the source runs once, its logits wait in a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anyquant import ir
from anyquant.calibration.tokens import load_tokenizer
from anyquant.checkpoint import Checkpoint
from anyquant.errors import InputError, MachineError, UsageError
from anyquant.reporting.estimate import Estimate
from anyquant.validation import texts
from anyquant.validation.bootstrap import Bootstrap
from anyquant.validation.metrics import compare_logits, log_normalizers, token_losses

if TYPE_CHECKING:
    from anyquant.validation.runners.torch import TorchRunner

Floats = NDArray[np.float64]
Values = Iterator[tuple[str, NDArray[np.float32]]]
"""(name, FP32 values) of all tensors of a model, in any order."""


RESAMPLES = 1000


@dataclass(frozen=True)
class TextSettings:
    """What is measured on.

    Attributes:
        path: UTF-8 file.
        windows: at most this many, drawn with ``seed`` where the text has more.
        window: tokens in each, cut to the model's context.
        seed: for the choice of windows and the bootstrap.
        resamples: of the bootstrap.
    """

    path: Path
    windows: int = 16
    window: int = 512
    seed: int = 0
    resamples: int = RESAMPLES

    def check(self) -> None:
        """Refuse settings out of range, before anything is loaded.

        Raises:
            UsageError: names the setting.
        """
        for name, least in (("windows", 1), ("window", 2), ("resamples", 2), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"{name} is {value}; it must be at least {least}")


def text_windows(
    checkpoint: Checkpoint, text: TextSettings, note: Callable[[str], None]
) -> tuple[texts.Windows, dict[str, Any]]:
    """The windows of a text, and what there is to say of them as JSON; ``note`` is told how far they can be trusted.

    Raises:
        UsageError: a setting is out of range.
        InputError: the text cannot be used, is too short, or the model has no tokenizer.
    """
    text.check()
    tokenizer = load_tokenizer(checkpoint)
    windows, notes = texts.cut_text(
        text.path, tokenizer, checkpoint.config, window=text.window, windows=text.windows, seed=text.seed
    )
    for each in notes:
        note(each)
    return windows, {
        "text": text.path.name,
        "tokens": windows.tokens,
        "windows": len(windows.ids),
        "windows_available": windows.available,
        "window": int(windows.ids.shape[1]),
        "leading_token": windows.leading,
        "seed": text.seed,
        "resamples": text.resamples,
    }


class Meter:
    """Windows of text, and what the unquantized model says to them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: texts.Windows,
        *,
        seed: int = 0,
        resamples: int = RESAMPLES,
        progress: ir.Progress | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        """No weight is read.

        Args:
            checkpoint: the source.
            windows: what to measure on.
            seed: of the bootstrap.
            resamples: of the bootstrap.
            progress: called after each window of a model.
            note: told how much room the source's logits take.
        """
        self._checkpoint, self._windows, self._progress, self._note = checkpoint, windows, progress, note
        self._boot = Bootstrap(len(windows.ids), resamples, seed)
        self._normalizers: list[Floats] = []
        self._losses: list[Floats] = []

    def run_source(self) -> Estimate:
        """Run the unquantized model, keep its logits, and return its perplexity.

        Raises:
            MachineError: the disk has no room for the logits.
        """
        names = self._checkpoint.tensors
        values = ((name, self._checkpoint.read(name)) for name in names)
        for number, logits in enumerate(self._logits(values, "source")):
            if number == 0:
                self._source = self._scratch((len(self._windows.ids), *logits.shape))
            self._source[number] = logits
            self._normalizers.append(log_normalizers(logits))
            self._losses.append(token_losses(logits, self._windows.ids[number], self._normalizers[-1]))
        return self._boot.mean(self._losses, np.exp)

    def measure(self, values: Values, name: str) -> dict[str, Any]:
        """Run another model of the same architecture, after the source; what it lost, as fields of a ``Point``.

        Raises:
            InputError: it has another vocabulary.
        """
        kl, agrees, losses = [], [], []
        for number, logits in enumerate(self._logits(values, name)):
            reference = self._source[number]
            if reference.shape != logits.shape:
                raise InputError(f"{name} has a vocabulary of {logits.shape[1]:,}, the source {reference.shape[1]:,}")
            normalizers = log_normalizers(logits)
            compared = compare_logits(
                reference,
                logits,
                reference_normalizers=self._normalizers[number],
                candidate_normalizers=normalizers,
            )
            kl.append(compared.kl)
            agrees.append(~compared.differs)
            losses.append(token_losses(logits, self._windows.ids[number], normalizers))
        return {
            "kl": self._boot.mean(kl),
            "perplexity": self._boot.mean(losses, np.exp),
            "perplexity_change": self._boot.difference(losses, self._losses, np.exp),
            "top1": self._boot.mean(agrees),
            "kl_per_window": tuple(float(window.mean()) for window in kl),
        }

    def _logits(self, values: Values, name: str) -> Iterator[NDArray[np.float32]]:
        """Yield float32 [n, vocabulary] of every window; the model is in memory until the last."""
        with _runner(self._checkpoint, values, name) as runner:
            for number, ids in enumerate(self._windows.ids):
                yield runner.logits(ids)
                if self._progress:
                    self._progress(f"running {name}", number + 1, len(self._windows.ids))

    def _scratch(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A float32 array in a file that is gone with the process, however that ends."""
        nbytes = 4 * int(np.prod(shape, dtype=np.int64))
        folder = tempfile.gettempdir()
        if self._note:
            self._note(f"The source's logits take {nbytes:,} bytes in {folder} while the models run.")
        try:
            with tempfile.TemporaryFile(prefix="anyquant-", dir=folder) as file:
                # Not a sparse file: a mapped page that finds no room later would kill the process.
                os.posix_fallocate(file.fileno(), 0, nbytes)
                return np.memmap(file, np.float32, "r+", shape=shape)
        except OSError as error:
            raise MachineError(
                f"no room in {folder} for {nbytes:,} bytes of the source's logits: {error.strerror or error}. "
                "Choose fewer --windows, or another folder with TMPDIR=..."
            ) from error


@contextmanager
def _runner(checkpoint: Checkpoint, values: Values, name: str) -> Iterator[TorchRunner]:
    """The checkpoint's architecture with other values, in PyTorch and FP32."""
    from anyquant.runtime.model import model_of
    from anyquant.validation.runners.torch import TorchRunner, quiet

    quiet()
    waiting: dict[str, NDArray[np.float32]] = {}

    def read(wanted: str) -> NDArray[np.float32]:
        while wanted not in waiting:
            found, array = next(values)
            waiting[found] = array
        return waiting.pop(wanted)

    runner = TorchRunner(name, model_of(checkpoint, read))
    try:
        yield runner
    finally:
        runner.close()
