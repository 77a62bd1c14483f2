"""What a quantization will make of a checkpoint: every form and every byte, before it is done.

Planning reads headers alone, except where a target has to be met by mixing forms: which unit gets how many bits is
then decided by measured errors, for which every matrix is read once (and, for methods that weight errors by what
passes through a matrix, the model is run once on a little text).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from anyquant import __version__, ir
from anyquant.allocation import Assignment, Table, allocate, walk, within
from anyquant.checkpoint import Checkpoint
from anyquant.errors import InfeasibleTarget, UsageError
from anyquant.estimates import peak_memory
from anyquant.forms import Forms, chosen_matrices
from anyquant.job import Job
from anyquant.measuring import calibration_record, measure
from anyquant.methods import get_method
from anyquant.refinement import is_refinable
from anyquant.search import require_searchable, search

if TYPE_CHECKING:
    from anyquant.exporters.protocol import ExportPlan
    from anyquant.workfolder import WorkFolder

_ROUNDING = 1e-9
_TOLERANCE = 0.01  # bits per weight that a uniform width may lie from what was asked for
_MISSES, _SLOW_MISSES = 4096, 64  # upgrades tried in vain when matrices as a whole fill a budget; exporters are slow


@dataclass(frozen=True, eq=False)
class Plan:
    """A job worked out: every form decided, every byte known.

    Attributes:
        model: the description of the result, without values.
        checkpoint: the source.
        job: what was asked for.
        levels: name -> levels of the matrix' units, uint8 [units].
        feasible: fewest and most of what the target counts (bits or bytes).
        measured: whether errors were measured to mix forms.
        loss: what these forms lose by the errors that were measured: with gradients the expected rise of the loss, in
            nats per token, half the weighted squared error; without, the mean relative squared error. None where
            nothing was measured, or something else.
        peak_memory: bytes of memory that quantizing needs, estimated from shapes.
        notes: what a user should know of matrices that the method cannot treat like all others.
    """

    model: ir.Model
    checkpoint: Checkpoint
    job: Job
    levels: dict[str, np.ndarray]
    feasible: tuple[float, float]
    measured: bool
    loss: float | None
    peak_memory: int
    notes: tuple[str, ...]

    @property
    def files(self) -> dict[str, int]:
        """Exact bytes of each file of the IR folder that anyquant makes; side files are copied beside them."""
        return ir.file_sizes(self.model)


def forms_of(checkpoint: Checkpoint, job: Job) -> Forms:
    """The matrices of a job and all forms that they can take.

    Raises:
        UsageError: a bad option.
        InputError: nothing to quantize.
    """
    method = get_method(job.method)
    names = chosen_matrices(checkpoint, job.quantize_embeddings)
    return Forms.of(checkpoint, method, job.settings, names)


def feasible_bits(checkpoint: Checkpoint, job: Job) -> tuple[float, float]:
    """Fewest and most counted bits per weight that a job's method offers, whatever the job's target.

    Raises:
        UsageError: a bad option.
        InputError: nothing to quantize.
    """
    forms = forms_of(checkpoint, job)
    ladder = forms.ladder()
    return forms.bits(ladder[0], job.target.count), forms.bits(ladder[-1], job.target.count)


def plan(
    checkpoint: Checkpoint,
    job: Job,
    work: WorkFolder | None = None,
    progress: ir.Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Plan:
    """Work out a job.

    Args:
        checkpoint: the source.
        job: what is to be done.
        work: keeps what is measured, and is asked first.
        progress: called with (what, done, all) while the model is run and errors are measured, if they have to be.
        note: told before that how long it will take, unless all of it is in the work folder.

    Raises:
        InfeasibleTarget: the target lies outside the feasible interval; raised before any weight is read.
        UsageError: a bad option.
        InputError: nothing to quantize.
    """
    forms = forms_of(checkpoint, job)
    if job.allocation == "matrix" and forms.whole:
        raise UsageError(
            f"--allocation matrix spreads bits over the rows of a matrix, but the method {job.method} gives a matrix "
            "one number of bits. Leave it out: bits are spread over the matrices then."
        )
    if job.refine and not all(map(is_refinable, forms.pick(forms.ladder()[0]).values())):
        raise UsageError(
            f"--refine is for codebooks and affine blocks, which the method {job.method} does not make. Leave it out."
        )
    if job.search == "tpe":
        require_searchable(job, forms)
    if job.target.size_of != "ir":
        forms = _exportable(checkpoint, job, forms)
    limit, cost = _budget(checkpoint, job, forms)
    ladder = forms.ladder()
    feasible = (cost(ladder[0]), cost(ladder[-1]))
    _require_feasible(job, forms.settings, limit, feasible)
    chosen: Assignment | None = None
    if job.scope == "uniform":
        chosen = _one_for_all(job, forms, cost, limit)
    elif job.search != "tpe":  # which has levels to try next to one for all
        chosen = ladder[-1] if limit >= feasible[1] else _exact_width(forms, cost, limit)
    loss = None
    measured = chosen is None
    if chosen is None:
        tables = measure(checkpoint, job, forms, work, progress, note)
        chosen = _mix(job, forms, tables, cost, limit)
        if job.search == "tpe":
            chosen = search(checkpoint, job, forms, chosen, cost, limit + _ROUNDING, work, progress, note)
        loss = predicted_loss(job, forms, tables, chosen)
    model = describe(checkpoint, job, forms.settings, forms.pick(chosen))
    levels = dict(zip(forms.names, chosen, strict=True))
    notes = forms.method.notes(dict(zip(forms.names, forms.shapes, strict=True)), forms.settings)
    memory = peak_memory(checkpoint, job, forms, model)
    return Plan(model, checkpoint, job, levels, feasible, measured, loss, memory, tuple(notes))


def describe(checkpoint: Checkpoint, job: Job, settings: dict[str, Any], forms: dict[str, ir.Spec]) -> ir.Model:
    """The model that results, without values."""
    entries = {}
    for name in checkpoint.tensors:
        spec = forms.get(name) or checkpoint.spec(name)
        entries[name] = ir.Entry(spec, quantized=name in forms, source_transposed=name in checkpoint.transposed)
    source = {"kind": checkpoint.kind, "name": checkpoint.name, "fingerprint": checkpoint.fingerprint()}
    return ir.Model(
        path=None,
        config=checkpoint.config,
        method=job.method,
        settings={**settings, "target": job.recorded_target()},
        source=source,
        entries=entries,
        aliases=dict(checkpoint.aliases),
        files=checkpoint.side_files(),
        anyquant_version=__version__,
        calibration=calibration_record(job.calibration_settings) if job.needs_statistics else None,
    )


def _budget(checkpoint: Checkpoint, job: Job, forms: Forms) -> tuple[float, Callable[[Assignment], float]]:
    """The limit, and the function of an assignment that has to stay within it."""
    target = job.target
    if target.bits is not None:
        return target.bits, lambda chosen: forms.bits(chosen, target.count)
    assert target.size is not None

    def model_of(chosen: Assignment) -> ir.Model:
        return describe(checkpoint, job, forms.settings, forms.pick(chosen))

    if target.size_of == "ir":
        return target.size, lambda chosen: sum(ir.file_sizes(model_of(chosen)).values())
    return target.size, lambda chosen: export_plan(model_of(chosen), target.size_of).bytes


def export_plan(model: ir.Model, exporter: str, layout: str = "native") -> ExportPlan:
    """What an exporter would write in a layout, its other options left as they are.

    Raises:
        AnyquantError: there is no such exporter, or it cannot tell; see the exporter.
    """
    from anyquant.exporters.protocol import ExportOptions
    from anyquant.exporters.registry import get_exporter

    return get_exporter(exporter).check(model, ExportOptions(layout=layout))


def _exportable(checkpoint: Checkpoint, job: Job, forms: Forms) -> Forms:
    """Leave the levels that the target's exporter takes, and of those that it writes alike just the best.

    Raises:
        InfeasibleTarget: it takes no form of a matrix.
    """
    kept: list[dict[Any, int]] = [{} for _ in forms.names]
    reasons: dict[str, str] = {}
    for chosen in forms.ladder():
        picked = forms.pick(chosen)
        export = export_plan(describe(checkpoint, job, forms.settings, picked), job.target.size_of)
        refused = {refusal.tensor: refusal for refusal in export.refusals}
        reasons |= {name: refusal.reason for name, refusal in refused.items()}
        for name, levels, own in zip(forms.names, kept, chosen, strict=True):
            if name not in refused:
                # A later form that is written in as many bytes is better. A type of GGUF is a size, so that of each of
                # ours its fullest form is left; elsewhere some kinds share a name, not their bytes.
                level = int(own[0])
                alike = job.target.size_of == "gguf" or not isinstance(picked[name], ir.CodebookSpec | ir.AffineSpec)
                levels[export.types[name] if alike else level] = level
    for name, levels in zip(forms.names, kept, strict=True):
        if not levels:
            raise InfeasibleTarget(
                f"--for {job.target.size_of}: its own types hold no form of {name} that the method {job.method} makes "
                f"({reasons[name]}). Leave out --for {job.target.size_of}, or choose another method.",
                (0.0, 0.0),
            )
    return forms.restrict([tuple(levels.values()) for levels in kept])


def _require_feasible(job: Job, settings: dict[str, Any], limit: float, feasible: tuple[float, float]) -> None:
    low, high = feasible
    if job.target.bits is not None and not low - 1e-9 <= limit <= high + 1e-9:
        raise InfeasibleTarget(
            f"--bits {limit:g} is outside the feasible interval {low:.4f} .. {high:.4f} of the method {job.method} "
            f"({', '.join(f'{k} {v}' for k, v in settings.items())}) on this model. Choose a target inside it.",
            feasible,
        )
    if job.target.size is not None and limit < low:
        raise InfeasibleTarget(
            f"--size {int(limit):,} bytes is below the feasible interval {int(low):,} .. {int(high):,} bytes of the "
            f"method {job.method} on this model. Choose a larger size, or --quantize-embeddings.",
            feasible,
        )


def _one_for_all(job: Job, forms: Forms, cost: Callable[[Assignment], float], limit: float) -> Assignment:
    """The assignment of one width, block or type to all that the target asks for.

    Raises:
        InfeasibleTarget: none is near the target, or the matrices have none in common.
    """
    alike = forms.alike()
    if not alike:
        raise InfeasibleTarget(
            f"--allocation uniform: the matrices of this model have rows of different lengths, for which the method "
            f"{job.method} has no form in common. Choose another --allocation.",
            (0.0, 0.0),
        )
    costs = [cost(chosen) for chosen in alike]
    if job.target.bits is None:
        fitting = [chosen for chosen, each in zip(alike, costs, strict=True) if each <= limit]
        if fitting:
            return fitting[-1]
        known, unit, asked = ", ".join(f"{int(each):,}" for each in costs), "bytes", f"{int(limit):,}"
    else:
        near = sorted((abs(each - limit), i) for i, each in enumerate(costs) if abs(each - limit) <= _TOLERANCE)
        if near:
            return alike[near[0][1]]
        known, unit, asked = ", ".join(f"{each:.3f}" for each in costs), "bits per weight", f"{limit:g}"
    raise InfeasibleTarget(
        f"--allocation uniform gives every row of this model one width: {known} {unit}, not {asked}. "
        "Choose one of them, or another --allocation.",
        (costs[0], costs[-1]),
    )


def _exact_width(forms: Forms, cost: Callable[[Assignment], float], limit: float) -> Assignment | None:
    """The assignment of the width that a target names by its very number, for a method that takes no text.

    Others have pairs of width and block length, or types, of which one for all loses far more than a mix of the same
    size.
    """
    if not forms.whole or forms.method.needs_statistics(forms.settings):
        return None
    exact = [chosen for chosen in forms.alike() if abs(cost(chosen) - limit) < 1e-6]
    return exact[-1] if exact else None


def predicted_loss(job: Job, forms: Forms, tables: list[np.ndarray], chosen: Assignment) -> float | None:
    """What an assignment loses by the tables of :func:`anyquant.measuring.measure`; see :class:`Plan`."""
    if not job.has_losses:
        return None
    errors = sum(
        float(np.take_along_axis(table, levels[:, None].astype(np.int64), 1).sum())
        for table, levels in zip(tables, chosen, strict=True)
    )
    return errors / 2 if job.has_gradients else errors / forms.numel


def _mix(
    job: Job, forms: Forms, tables: list[np.ndarray], cost: Callable[[Assignment], float], limit: float
) -> Assignment:
    """Spread bits by measured errors."""
    counted, stored = (
        [tuple(costs[i] for i in allowed) for costs, allowed in zip(forms.costs(count), forms.allowed, strict=True)]
        for count in (job.target.count, "all")
    )
    choices = [
        # Codes of a few weights can be as many at several widths.
        Table(costs if all(a < b for a, b in pairwise(costs)) else nbytes, errors[:, list(allowed)])
        for costs, nbytes, allowed, errors in zip(counted, stored, forms.allowed, tables, strict=True)
    ]

    def levels_of(positions: Assignment) -> Assignment:
        return [np.array(a, np.uint8)[p] for a, p in zip(forms.allowed, positions, strict=True)]

    def fits(positions: Assignment) -> bool:
        return cost(levels_of(positions)) <= limit + _ROUNDING

    if job.scope == "model":
        misses = (_MISSES if job.target.size_of == "ir" else _SLOW_MISSES) if forms.whole else 0
        return levels_of(allocate(choices, fits, misses))
    # The same bits in every matrix: the most that fit, to a few bytes.
    walks = [walk([table]) for table in choices]

    def at(bits: float) -> Assignment:
        budgets = [bits * out * columns / 8 for out, columns in forms.shapes]
        if job.target.count == "all":
            budgets = [budget - levels.overhead for budget, levels in zip(budgets, forms.levels, strict=True)]
        return [part for w, c, budget in zip(walks, counted, budgets, strict=True) for part in within(w, c, budget)]

    low, high = 0.0, 64.0
    for _ in range(24):  # to 4e-6 bits
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    return levels_of(at(low))
