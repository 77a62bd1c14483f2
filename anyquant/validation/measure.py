"""Running models over the windows: logits of one window at a time, numbers of all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from anyquant.errors import InputError
from anyquant.reporting.estimate import Estimate
from anyquant.validation.bootstrap import Bootstrap
from anyquant.validation.metrics import (
    Floats,
    WindowComparison,
    compare_logits,
    log_normalizers,
    token_losses,
)
from anyquant.validation.results import Comparison
from anyquant.validation.runners.process import ProcessRunner
from anyquant.validation.runners.protocol import Runner
from anyquant.validation.runners.worker import peak_memory

GPU = "CUDA"
"""The name of the IR on a GPU, with our kernels."""
_LISTED = 20


@dataclass
class Station:
    """A runner with what was measured of it.

    Attributes:
        runner: the model.
        losses: per window, [n - 1] float64.
        nonfinite: logits that were NaN or infinite.
        seconds: spent on logits.
        load_seconds: spent on opening.
    """

    runner: Runner
    losses: list[Floats] = field(default_factory=list)
    nonfinite: int = 0
    seconds: float = 0.0
    load_seconds: float = 0.0

    @property
    def name(self) -> str:
        """Of the runner."""
        return self.runner.name

    def logits(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], Floats]:
        """Logits of a window with the logarithm of every row's sum; the loss is noted."""
        started = time.monotonic()
        logits = self.runner.logits(ids)
        self.seconds += time.monotonic() - started
        if logits.ndim != 2 or logits.shape[0] != len(ids):
            raise InputError(f"{self.name} gave logits of shape {list(logits.shape)} for {len(ids)} tokens")
        self.nonfinite += int(np.count_nonzero(~np.isfinite(logits)))
        normalizers = log_normalizers(logits)
        self.losses.append(token_losses(logits, ids, normalizers))
        return logits, normalizers

    def peak_memory(self) -> int | None:
        """Bytes: of the runner's own process, or of this one where it runs here."""
        return self.runner.peak_memory() if isinstance(self.runner, ProcessRunner) else peak_memory()


Pairs = dict[tuple[str, str], list[WindowComparison]]


def measure_window(
    stations: list[Station], pairs: Pairs, window: int, ids: NDArray[np.int64], tie_tolerance: float
) -> Iterator[str]:
    """Run all models on one window and compare them.

    The first stations are the references (the source, if there is one, the IR, and the IR on a GPU); their logits are
    kept while the others follow one by one.

    Args:
        stations: in the order source, IR, IR on a GPU, files.
        pairs: filled with one comparison per window.
        window: its number.
        ids: [n] of the window.
        tie_tolerance: see compare_logits.

    Yields:
        The name of each runner when it is done.

    Raises:
        InputError: two models have vocabularies of different size.
    """
    references: dict[str, tuple[NDArray[np.float32], Floats]] = {}
    for station in stations:
        logits, normalizers = station.logits(ids)
        for name, (reference, reference_normalizers) in references.items():
            if reference.shape != logits.shape:
                raise InputError(
                    f"{station.name} has a vocabulary of {logits.shape[1]:,} tokens, {name} one of "
                    f"{reference.shape[1]:,}: they are not the same model"
                )
            pairs.setdefault((name, station.name), []).append(
                compare_logits(
                    reference,
                    logits,
                    window=window,
                    tie_tolerance=tie_tolerance,
                    reference_normalizers=reference_normalizers,
                    candidate_normalizers=normalizers,
                )
            )
        if station.name in ("source", "IR", GPU):
            references[station.name] = (logits, normalizers)
        yield station.name


def perplexity(station: Station, bootstrap: Bootstrap) -> Estimate:
    """exp of the mean loss, with its error over windows."""
    return bootstrap.mean(station.losses, np.exp)


def summarize(reference: Station, candidate: Station, windows: list[WindowComparison], boot: Bootstrap) -> Comparison:
    """All windows of a pair in one comparison."""
    kl = [window.kl for window in windows]
    flat = np.concatenate(kl)
    differences = [difference for window in windows for difference in window.differences]
    differences.sort(key=lambda d: -d.gap)
    worst = windows[int(np.argmax([window.max_abs_logit for window in windows]))]  # a NaN counts as the most
    return Comparison(
        reference=reference.name,
        candidate=candidate.name,
        max_abs_logit=worst.max_abs_logit,
        max_abs_at=worst.max_abs_at,
        logit_scale=float(np.max([window.logit_scale for window in windows])),
        nonfinite=sum(window.nonfinite for window in windows),
        kl_mean=boot.mean(kl),
        kl_median=boot.quantile(kl, 0.5),
        kl_p99=boot.quantile(kl, 0.99),
        kl_max=Estimate(float(flat.max()), flat.size),
        top1=boot.mean([~window.differs for window in windows]),
        near_ties=sum(difference.near_tie for difference in differences),
        differences=tuple(differences[:_LISTED]),
        perplexity_change=boot.difference(candidate.losses, reference.losses, np.exp),
        kl_per_token=tuple(float(value) for value in flat),
    )
