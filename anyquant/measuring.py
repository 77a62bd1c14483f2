"""Measuring what each level costs each unit: calibration, then a table of errors per matrix."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anyquant import ir
from anyquant.calibration import CalibrationSettings, Statistics, calibrate
from anyquant.checkpoint import Checkpoint
from anyquant.errors import InputError
from anyquant.estimates import in_words, seconds
from anyquant.forms import Forms
from anyquant.workers import in_order

if TYPE_CHECKING:
    from anyquant.job import Job
    from anyquant.workfolder import WorkFolder


@contextmanager
def naming(tensor: str) -> Iterator[None]:
    """What a method says of a matrix, whose name it does not know, becomes a message about this one.

    Raises:
        InputError: with the name before the words.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{tensor}: {error}") from error


@contextmanager
def statistics_of(
    checkpoint: Checkpoint, job: Job, names: list[str], work: WorkFolder | None, progress: ir.Progress | None = None
) -> Iterator[Statistics | None]:
    """The statistics that a job's method needs, taken now or found in the work folder; None where it needs none.

    Without a work folder they are in a temporary one, which ends with the context.
    """
    if not job.needs_statistics:
        yield None
    elif work is not None:
        yield calibrate(checkpoint, names, job.calibration_settings, work.calibration, progress)
    else:
        with tempfile.TemporaryDirectory(prefix="anyquant-") as folder:
            yield calibrate(checkpoint, names, job.calibration_settings, Path(folder), progress)


def calibration_record(settings: CalibrationSettings, statistics: Statistics | None = None) -> dict[str, Any]:
    """What the IR says of its calibration; of the same length before there are statistics."""
    return {**settings.identity(), "fingerprint": statistics.fingerprint if statistics else "0" * 64}


def with_calibration(model: ir.Model, settings: CalibrationSettings, statistics: Statistics | None) -> ir.Model:
    """The description with the calibration that was done."""
    return replace(model, calibration=calibration_record(settings, statistics)) if statistics else model


def measure(
    checkpoint: Checkpoint,
    job: Job,
    forms: Forms,
    work: WorkFolder | None,
    progress: ir.Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> list[np.ndarray]:
    """Of each matrix the errors float64 [units, levels]; see :meth:`anyquant.methods.Method.errors`.

    ``note`` is told how long it will take, unless all of it is in the work folder.

    Raises:
        NonFiniteError: a weight holds NaN or Inf.
    """
    known: dict[str, np.ndarray | None] = {}
    for index, (name, levels) in enumerate(zip(forms.names, forms.levels, strict=True)):
        known[name] = work.table(index, name, (levels.units, levels.count)) if work else None
    if note and any(table is None for table in known.values()):
        stages = seconds(checkpoint, job, forms, ("calibration", "errors"))
        note(f"Bits go where measured errors say: {in_words(stages)}. --work-dir keeps them for other targets.")
    with statistics_of(checkpoint, job, forms.names, work, progress) as statistics:

        def unit(name: str) -> np.ndarray:
            found = known[name]
            if found is not None:
                return found
            weight = checkpoint.read(name)
            with naming(name):
                return forms.method.errors(weight, statistics.matrix(name) if statistics else None, forms.settings)

        tables = []
        results = in_order(unit, [(name,) for name in forms.names], job.workers)
        for index, (name, table) in enumerate(zip(forms.names, results, strict=True)):
            if work and known[name] is None:
                work.save_table(index, name, table)
            tables.append(table)
            if progress:
                progress(name, index + 1, len(forms.names))
        if statistics and job.has_gradients:
            sizes = [out * columns for out, columns in forms.shapes]
            return _comparable(tables, sizes, [statistics.has_gradient(name) for name in forms.names])
    return tables


def _comparable(tables: list[np.ndarray], sizes: list[int], learned: list[bool]) -> list[np.ndarray]:
    """All tables in nats: a matrix of which no gradient is known counts as much for a weight as the median matrix.

    Its own errors are relative; what they are scaled to is the error that a weight has at the first level.
    """
    means = [float(table[:, 0].sum()) / size for table, size in zip(tables, sizes, strict=True)]
    known = [mean for mean, graded in zip(means, learned, strict=True) if graded and mean > 0]
    typical = float(np.median(known)) if known else 1.0
    return [
        table if graded or mean <= 0 else table * (typical / mean)
        for table, mean, graded in zip(tables, means, learned, strict=True)
    ]
