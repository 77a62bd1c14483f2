"""One sweep from beginning to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from anyquant import ir
from anyquant.checkpoint import Checkpoint
from anyquant.errors import InfeasibleTarget, UsageError
from anyquant.forms import Forms
from anyquant.job import Job
from anyquant.measuring import calibration_record, measure, statistics_of
from anyquant.pipeline import dequantized
from anyquant.planning import Plan, forms_of, plan, predicted_loss
from anyquant.reporting.environment import environment
from anyquant.sweep.measure import Meter, TextSettings, text_windows
from anyquant.sweep.results import Point, Sweep
from anyquant.workers import default_threads
from anyquant.workfolder import WorkFolder, temporary_work_folder


def sweep(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    work: WorkFolder | None = None,
    text: TextSettings | None = None,
    *,
    progress: ir.Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Sweep:
    """Work out several jobs on one model, and measure what each loses.

    Statistics and tables of errors are taken once. One quantized model is in memory at a time; nothing of it is
    written.

    Args:
        checkpoint: the source.
        jobs: they differ in target and allocation alone.
        work: keeps what is measured; a temporary folder, unless given.
        text: what to measure on; without it there are bits, bytes and predicted losses.
        progress: called with (what is being done, steps done, steps in all).
        note: told each note as soon as it is known.

    Returns:
        A point for each job, in order; one whose target cannot be met has a problem and nothing else.

    Raises:
        UsageError: the jobs have not one set of statistics, are sequential, or their options are wrong.
        InfeasibleTarget: no target can be met.
        InputError: the text or the model cannot be used.
        MachineError: the disk has no room for the source's logits.
    """
    started = time.monotonic()
    if not jobs or any(job.identity(checkpoint) != jobs[0].identity(checkpoint) for job in jobs[1:]):
        raise UsageError(
            "the jobs of a sweep differ in target and allocation alone, and there is at least one. Settings that "
            "follow from the target, such as the palette of claq and cmpq with --profile paper and --count index, have "
            "to be set: for example --set palette=2,3,4."
        )
    if any(job.sequential for job in jobs):
        raise UsageError("a sweep does not quantize in the order of the model: leave out sequential.")
    notes: list[str] = []

    def say(text: str) -> None:
        notes.append(text)
        if note:
            note(text)

    if text and _same_file(jobs[0], text):
        say("Losses are measured on the text of the calibration: on other texts they are larger.")
    meter, data = None, None
    if text:
        windows, data = text_windows(checkpoint, text, say)
        meter = Meter(
            checkpoint, windows, seed=text.seed, resamples=text.resamples, progress=progress, note=say
        )  # fmt: skip
    with nullcontext(work) if work else temporary_work_folder(jobs[0].identity(checkpoint)) as folder:
        planned = [_plan(checkpoint, job, folder, progress) for job in jobs]
        infeasible = [found for found in planned if isinstance(found, InfeasibleTarget)]
        if len(infeasible) == len(jobs):
            raise infeasible[0]
        forms = forms_of(checkpoint, jobs[0])
        tables = measure(checkpoint, jobs[0], forms, folder, progress)
        points = [_point(job, found, forms, tables) for job, found in zip(jobs, planned, strict=True)]
        with statistics_of(checkpoint, jobs[0], forms.names, folder, progress) as statistics:
            perplexity = meter.run_source() if meter else None
            for number, found in enumerate(planned):
                if meter and isinstance(found, Plan):
                    began = time.monotonic()
                    lost = meter.measure(dequantized(found, statistics), f"{points[number].bits:.3f} bits")
                    points[number] = replace(points[number], seconds=time.monotonic() - began, **lost)
    return Sweep(
        model={
            "name": checkpoint.name,
            "kind": checkpoint.kind,
            "fingerprint": checkpoint.fingerprint(),
            "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
            "perplexity": perplexity,
        },
        method=jobs[0].method,
        settings={**forms.settings, "quantize_embeddings": jobs[0].quantize_embeddings},
        loss_unit="nats" if jobs[0].has_gradients else "relative",
        calibration=calibration_record(jobs[0].calibration_settings, statistics) if statistics else None,
        data=data,
        environment=environment(default_threads()),
        points=tuple(points),
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )


def _same_file(job: Job, text: TextSettings) -> bool:
    calibration = job.calibration_settings
    return (
        job.needs_statistics
        and calibration.kind == "text"
        and text.path.resolve() == Path(calibration.source).resolve()
    )


def _plan(checkpoint: Checkpoint, job: Job, work: WorkFolder, progress: ir.Progress | None) -> Plan | InfeasibleTarget:
    try:
        return plan(checkpoint, job, work, progress)
    except InfeasibleTarget as error:
        return error


def _point(job: Job, found: Plan | InfeasibleTarget, forms: Forms, tables: list[np.ndarray]) -> Point:
    """All that is known without running anything."""
    target = job.recorded_target()
    if isinstance(found, InfeasibleTarget):
        return Point(target, problem=str(found))
    return Point(
        target,
        bits=found.model.quantized_bits,
        bits_per_weight=found.model.bits_per_weight,
        nbytes=sum(found.files.values()),
        loss=predicted_loss(job, forms, tables, list(found.levels.values())),
    )
