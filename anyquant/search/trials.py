"""Bits per matrix by search: what a whole model loses on a text, tried out, instead of a sum of errors.

Source: the mixed-precision search of arXiv 2310.05079, section 3.3, with its TPE (:mod:`anyquant.search.tpe`). Tried
are levels next to those of the greedy allocation; what counts is the mean KL to the source on the calibration's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from anyquant import ir
from anyquant.allocation import Assignment
from anyquant.calibration import Statistics
from anyquant.checkpoint import Checkpoint
from anyquant.errors import MissingDependency, UsageError
from anyquant.forms import Forms
from anyquant.job import Job
from anyquant.measuring import statistics_of
from anyquant.search.tpe import tpe_search
from anyquant.unit import quantize_matrix
from anyquant.workfolder import WorkFolder

_TOKENS = 2048  # of the calibration, that every trial is run on
_REACH = 1  # levels up or down from the greedy solution


def require_searchable(job: Job, forms: Forms) -> None:
    """Refuse what cannot be searched, before anything is measured.

    Raises:
        UsageError: rows or columns choose their bits, all have the same, there is no text to try on, or the result is
            not made of the matrices that are tried.
        MissingDependency: optuna is not installed.
    """
    if not forms.whole or job.scope == "uniform":
        raise UsageError(
            f"--search tpe chooses the bits of matrices as a whole; the method {job.method} with --allocation "
            f"{job.scope} has no such choice. Leave it out."
        )
    if not job.needs_statistics:
        raise UsageError(
            f"--search tpe tries models on the text of the calibration, and the method {job.method} needs none with "
            "these settings. For block add --set sensitivity=gradient."
        )
    if job.sequential:
        raise UsageError(
            "--search tpe tries matrices that were quantized for what the unquantized model feeds them, which is not "
            "what --sequential makes. Leave one of them out."
        )
    if find_spec("optuna") is None:
        raise MissingDependency("optuna", "search", "--search tpe")


def search(
    checkpoint: Checkpoint,
    job: Job,
    forms: Forms,
    start: Assignment,
    cost: Callable[[Assignment], float],
    limit: float,
    work: WorkFolder | None,
    progress: ir.Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Assignment:
    """The assignment of least KL among those tried; ``start`` where none is better.

    Args:
        checkpoint: the source.
        job: how often to try, and the seed.
        forms: what each matrix can choose from.
        start: the greedy solution.
        cost: of an assignment.
        limit: that its cost stays within.
        work: keeps the result for the same target.
        progress: called after each trial.
        note: told what came of it.

    Raises:
        MissingDependency: optuna is not installed.
        MachineError: the disk has no room for the source's logits.
    """
    target = job.recorded_target()
    known = work.searched(target) if work else None
    if known is not None and len(known) == len(start):
        return [np.array([level], np.uint8) for level in known]
    from anyquant.calibration.run import torch_threads

    with ExitStack() as stack:
        statistics = stack.enter_context(statistics_of(checkpoint, job, forms.names, work, progress))
        assert statistics is not None
        stack.enter_context(torch_threads(statistics.threads))  # which sums depend on, and what is best with them
        loss = _Trials(checkpoint, job, forms, statistics).loss
        positions = [allowed.index(int(level[0])) for allowed, level in zip(forms.allowed, start, strict=True)]

        def levels_of(chosen: list[int]) -> Assignment:
            return [np.array([allowed[p]], np.uint8) for allowed, p in zip(forms.allowed, chosen, strict=True)]

        found = tpe_search(
            [len(allowed) for allowed in forms.allowed],
            lambda chosen: cost(levels_of(chosen)),
            limit,
            lambda chosen: loss(levels_of(chosen)),
            trials=job.trials,
            seed=job.calibration_settings.seed,
            start=positions,
            reach=_REACH,
            progress=progress,
        )
    if note:
        note(f"--search tpe: KL {found.start_loss:.4g} to begin with, {found.loss:.4g} after {found.trials} trials.")
    best = levels_of(found.levels)
    if work:
        work.save_searched(target, [int(level[0]) for level in best])
    return best


class _Trials:
    """Runs assignments; every quantized matrix is kept, packed."""

    def __init__(self, checkpoint: Checkpoint, job: Job, forms: Forms, statistics: Statistics) -> None:
        from anyquant.sweep.measure import Meter
        from anyquant.validation.texts import Windows

        ids = statistics.ids()
        ids = ids[: max(1, _TOKENS // ids.shape[1])]
        self._checkpoint, self._job, self._forms, self._statistics = checkpoint, job, forms, statistics
        self._meter = Meter(checkpoint, Windows(ids, ids.size, len(ids), None), seed=job.calibration_settings.seed)
        self._meter.run_source()
        self._made: dict[tuple[str, int], ir.Tensor] = {}

    def loss(self, chosen: Assignment) -> float:
        """Mean KL to the source, in nats per token."""
        levels = dict(zip(self._forms.names, chosen, strict=True))
        measured = self._meter.measure(self._values(levels), "a trial")["kl"]
        return float(measured.value)

    def _values(self, levels: dict[str, NDArray[np.uint8]]) -> Iterator[tuple[str, NDArray[np.float32]]]:
        for name in self._checkpoint.tensors:
            values = self._checkpoint.read(name)
            yield name, values if name not in levels else self._quantized(name, values, levels[name])

    def _quantized(self, name: str, weight: NDArray[np.float32], level: NDArray[np.uint8]) -> NDArray[np.float32]:
        key = (name, int(level[0]))
        if key not in self._made:
            self._made[key] = quantize_matrix(self._job, name, weight, level, self._statistics.matrix(name))
        return ir.dequantize(self._made[key])
