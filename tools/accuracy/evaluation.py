"""What a quantized language model loses on a text, token by token; the source runs once and its answers are kept.

Per token: the negative log-probability of the text, the divergence KL(source || candidate), and whether the likeliest
next token is the source's. The source's log-probabilities are kept in float16, which is 2 bytes for each token of the
vocabulary at each position (3.0 GB for 60 windows of 512 tokens of SmolLM2). Probable tokens have small logarithms, so
they are kept best: what that rounding costs in KL is measured when they are written, and told.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accuracy.interface import Floats
from accuracy.products import by_onednn
from anyquant.checkpoint import Checkpoint
from anyquant.errors import InputError, MachineError
from anyquant.runtime.model import model_of
from anyquant.validation import texts
from anyquant.validation.metrics import compare_logits, log_normalizers, token_losses

Read = Callable[[str], Floats]
Tick = Callable[[int, int], None]

_LEAST = float(np.finfo(np.float16).min)
_ROOM = 1.05  # of what a file takes, free on the disk


@dataclass(frozen=True)
class Lost:
    """What is known of each token.

    Attributes:
        losses: float64 [windows, n - 1], nats.
        kl: float64 [windows, n], nats; 0 for the source.
        agrees: bool [windows, n], the likeliest next token is the source's.

    Or the means of each window, float64 [windows, 1].
    """

    losses: NDArray[np.float64]
    kl: NDArray[np.float64]
    agrees: NDArray[np.bool_ | np.float64]

    def by_window(self) -> Lost:
        """The means of each window; nothing of what is not known of any token."""
        losses, kl, agrees = (
            part.mean(axis=1, keepdims=True, dtype=np.float64) if part.shape[1] else part.astype(np.float64)
            for part in (self.losses, self.kl, self.agrees)
        )
        return Lost(losses, kl, agrees)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all. Losses and divergences are kept in float32."""
        temporary = path.with_suffix(".partial")
        with temporary.open("wb") as file:
            np.savez(file, losses=np.float32(self.losses), kl=np.float32(self.kl), agrees=self.agrees)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Lost:
        """Read what :meth:`save` wrote."""
        with np.load(path) as found:
            losses, kl = (found[name].astype(np.float64) for name in ("losses", "kl"))
            return cls(losses, kl, found["agrees"])


class Reference:
    """The folder of the source's answers: ids.npy, logprobs.npy, top.npy, normalizers.npy."""

    def __init__(self, folder: Path) -> None:
        """Nothing is opened."""
        self._folder = folder

    def cut(self, checkpoint: Checkpoint, text: Path, windows: int, window: int, seed: int) -> texts.Windows:
        """The windows of a text that are measured on.

        Raises:
            InputError: the text has fewer, or the model no tokenizer.
        """
        from anyquant.calibration.tokens import load_tokenizer

        tokenizer = load_tokenizer(checkpoint)
        found, _ = texts.cut_text(text, tokenizer, checkpoint.config, window=window, windows=windows, seed=seed)
        if found.ids.shape != (windows, window):
            raise InputError(
                f"{text} gives {found.ids.shape[0]} windows of {found.ids.shape[1]} tokens to {checkpoint.name}, not "
                f"{windows} of {window}. Ask for fewer --windows, or a shorter --window."
            )
        return found

    def run(self, checkpoint: Checkpoint, ids: NDArray[np.int64], tick: Tick) -> tuple[Lost, float]:
        """Run the source and keep its answers.

        Returns:
            What it says of the text, and the mean KL of its own log-probabilities in float16 to the exact ones.

        Raises:
            MachineError: the disk has no room.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        vocabulary = int(checkpoint.config["vocab_size"])
        self._require_room(2 * ids.size * vocabulary)
        path = self._folder / "logprobs.npy"
        stored = np.lib.format.open_memmap(path, "w+", np.float16, (*ids.shape, vocabulary))
        normalizers = np.empty(ids.shape)
        top = np.empty(ids.shape, np.int32)
        losses, rounded = [], []
        with _Running(checkpoint, checkpoint.read, "the source") as running:
            for number, window in enumerate(ids):
                logits = running.logits(window)
                exact = log_normalizers(logits)
                stored[number] = np.maximum(logits - exact[:, None].astype(np.float32), _LEAST)
                kept = stored[number].astype(np.float32)
                normalizers[number] = log_normalizers(kept)
                compared = compare_logits(
                    logits, kept, reference_normalizers=exact, candidate_normalizers=normalizers[number]
                )
                rounded.append(compared.kl)
                losses.append(token_losses(logits, window, exact))
                top[number] = logits.argmax(axis=1)
                tick(number + 1, len(ids))
        stored.flush()
        np.save(self._folder / "ids.npy", ids)
        np.save(self._folder / "top.npy", top)
        np.save(self._folder / "normalizers.npy", normalizers)
        return Lost(np.stack(losses), np.zeros(ids.shape), np.ones(ids.shape, np.bool_)), float(np.mean(rounded))

    def measure(self, checkpoint: Checkpoint, read: Read, name: str, activations: str | None, tick: Tick) -> Lost:
        """Run a quantized model.

        Args:
            checkpoint: the source.
            read: gives the values of each of its tensors in the quantized model.
            name: of the model, for messages.
            activations: format that activations are rounded to, such as bfp6.
            tick: called with (windows done, all).
        """
        ids, top, normalizers = (np.load(self._folder / f"{part}.npy") for part in ("ids", "top", "normalizers"))
        stored = np.load(self._folder / "logprobs.npy", mmap_mode="r")
        losses, kl, agrees = [], [], []
        with _Running(checkpoint, read, name, activations) as running:
            for number, window in enumerate(ids):
                logits = running.logits(window)
                own = log_normalizers(logits)
                compared = compare_logits(
                    stored[number].astype(np.float32), logits,
                    reference_normalizers=normalizers[number], candidate_normalizers=own,
                )  # fmt: skip
                kl.append(compared.kl)
                losses.append(token_losses(logits, window, own))
                agrees.append(logits.argmax(axis=1) == top[number])
                tick(number + 1, len(ids))
        return Lost(np.stack(losses), np.stack(kl), np.stack(agrees))

    def _require_room(self, nbytes: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < _ROOM * nbytes:
            raise MachineError(
                f"the source's log-probabilities take {nbytes:,} bytes, and {self._folder} has {free:,} free. Choose "
                "another --work, or fewer --windows."
            )


class _Running:
    """A model of the checkpoint's architecture, in PyTorch and FP32, as long as the context lasts."""

    def __init__(self, checkpoint: Checkpoint, read: Read, name: str, activations: str | None = None) -> None:
        from anyquant.validation.runners.torch import TorchRunner, quiet

        quiet()
        model = model_of(checkpoint, read)
        if activations is None:  # what rounds them looks for PyTorch's own products
            by_onednn(model)
        self._runner = TorchRunner(name, model, activations=activations)

    def __enter__(self) -> _Running:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._runner.close()

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [n, vocabulary]."""
        return self._runner.logits(ids)
