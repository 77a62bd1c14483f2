"""What a quantization will make of a checkpoint: every form and every byte, before it is done.

Planning reads headers alone, except where a fractional target has to be met by mixing forms: which matrix gets
which form is then decided by measured errors, for which every matrix is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from anyquant import __version__, ir
from anyquant.allocation import Choice, allocate
from anyquant.checkpoint import Checkpoint
from anyquant.errors import InfeasibleTarget, InputError, UsageError
from anyquant.methods import Method, get_method
from anyquant.workers import in_order

if TYPE_CHECKING:
    from anyquant.exporters.protocol import ExportPlan

# Measured on SmolLM2: interpreter and libraries; what a worker's arithmetic takes beside its matrix, being done a few
# million weights at a time; and transformers with torch, which make the tokenizer files of a GGUF source.
_BASE_MEMORY, _WORKER_MEMORY, _TOKENIZER_MEMORY = 220 << 20, 60 << 20, 80 << 20


@dataclass(frozen=True)
class Target:
    """How large the result is to be: bits per weight of the quantized matrices, or bytes of a file.

    Attributes:
        bits: counted bits per weight, over the quantized matrices; exclusive with ``size``.
        size: most bytes of the written model, side files such as the tokenizer not counted.
        size_of: what ``size`` is the size of: "ir", or the name of an exporter.
        count: "all" stored bytes, or "index": codes alone, as the papers count.
    """

    bits: float | None = None
    size: int | None = None
    size_of: str = "ir"
    count: str = "all"

    def __post_init__(self) -> None:
        """Check that exactly one of bits and size is given.

        Raises:
            UsageError: both, none, or a value that is no size.
        """
        if (self.bits is None) == (self.size is None):
            raise UsageError("give exactly one of --bits and --size.")
        if self.bits is not None and not 0 < self.bits < 64:
            raise UsageError(f"--bits is {self.bits}, must be a positive number of bits per weight.")
        if self.bits is not None and self.size_of != "ir":
            raise UsageError(f"--for {self.size_of} says what --size is the size of; it has no meaning with --bits.")
        if self.size is not None and self.count != "all":
            raise UsageError(f"--count {self.count} says what --bits counts; it has no meaning with --size.")


@dataclass(frozen=True)
class Job:
    """What is to be done to a checkpoint."""

    method: str
    target: Target
    options: dict[str, Any] = field(default_factory=dict)
    quantize_embeddings: bool = False
    workers: int = 1


@dataclass(frozen=True)
class Plan:
    """A job worked out: every form decided, every byte known.

    Attributes:
        model: the description of the result, without values.
        checkpoint: the source.
        job: what was asked for.
        feasible: fewest and most of what the target counts (bits or bytes).
        measured: whether errors were measured to mix forms.
        peak_memory: bytes of memory that quantizing needs, estimated from shapes.
    """

    model: ir.Model
    checkpoint: Checkpoint
    job: Job
    feasible: tuple[float, float]
    measured: bool
    peak_memory: int

    @property
    def files(self) -> dict[str, int]:
        """Exact bytes of each file of the IR folder that anyquant makes; side files are copied beside them."""
        return ir.file_sizes(self.model)


def chosen_matrices(checkpoint: Checkpoint, quantize_embeddings: bool) -> list[str]:
    """Names of the tensors that a method is applied to, in the checkpoint's order.

    Raises:
        InputError: there is none.
    """
    wanted = {*checkpoint.matrices(), *(checkpoint.embeddings() if quantize_embeddings else ())}
    names = [name for name in checkpoint.tensors if name in wanted]
    if not names:
        raise InputError(
            f"{checkpoint.name} holds no matrices to quantize among its {len(checkpoint.tensors)} tensors."
        )
    return names


def _describe(checkpoint: Checkpoint, job: Job, settings: dict[str, Any], forms: dict[str, ir.Spec]) -> ir.Model:
    entries = {}
    for name in checkpoint.tensors:
        spec = forms.get(name) or checkpoint.spec(name)
        entries[name] = ir.Entry(spec, quantized=name in forms, source_transposed=name in checkpoint.transposed)
    recorded = {**settings, "target": {k: v for k, v in vars(job.target).items() if v is not None}}
    source = {"kind": checkpoint.kind, "name": checkpoint.name, "fingerprint": checkpoint.fingerprint()}
    return ir.Model(
        path=None,
        config=checkpoint.config,
        method=job.method,
        settings=recorded,
        source=source,
        entries=entries,
        aliases=dict(checkpoint.aliases),
        files=checkpoint.side_files(),
        anyquant_version=__version__,
    )


def _counted_bytes(spec: ir.Spec, count: str) -> int:
    if count == "all":
        return spec.nbytes
    dtype, shape = spec.arrays()[".codes"]
    return int(dtype.itemsize * np.prod(shape, dtype=np.int64))


@dataclass(frozen=True)
class _Forms:
    """The matrices of a job and the forms that each can take; from headers alone."""

    method: Method
    settings: dict[str, Any]
    names: list[str]
    choices: list[Sequence[ir.Spec]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, job: Job) -> _Forms:
        method = get_method(job.method)
        settings = method.settings(job.options)
        names = chosen_matrices(checkpoint, job.quantize_embeddings)
        shapes = [checkpoint.tensors[name].shape for name in names]
        return cls(method, settings, names, [method.choices((shape[0], shape[1]), settings) for shape in shapes])

    def uniform(self) -> list[list[int]]:
        """The assignments that give every matrix the same level, fewest bytes first."""
        levels = range(max(map(len, self.choices)))
        return [[min(level, len(c) - 1) for c in self.choices] for level in levels]

    def pick(self, chosen: Sequence[int]) -> dict[str, ir.Spec]:
        return {name: c[i] for name, c, i in zip(self.names, self.choices, chosen, strict=True)}

    def bits(self, chosen: Sequence[int], count: str) -> float:
        specs = self.pick(chosen).values()
        return 8 * sum(_counted_bytes(s, count) for s in specs) / sum(s.numel for s in specs)


def feasible_bits(checkpoint: Checkpoint, job: Job) -> tuple[float, float]:
    """Fewest and most counted bits per weight that a job's method offers, whatever the job's target.

    Raises:
        UsageError: a bad option.
        InputError: nothing to quantize.
    """
    forms = _Forms.of(checkpoint, job)
    uniform = forms.uniform()
    return forms.bits(uniform[0], job.target.count), forms.bits(uniform[-1], job.target.count)


def plan(checkpoint: Checkpoint, job: Job, progress: ir.Progress | None = None) -> Plan:
    """Work out a job.

    Args:
        checkpoint: the source.
        job: what is to be done.
        progress: called with (name, done, all) while errors are measured, if they have to be.

    Raises:
        InfeasibleTarget: the target lies outside the feasible interval; raised before any weight is read.
        UsageError: a bad option.
        InputError: nothing to quantize.
    """
    forms = _Forms.of(checkpoint, job)
    if job.target.size_of != "ir":
        forms = _exportable(checkpoint, job, forms)
    limit, cost = _budget(checkpoint, job, forms)
    uniform = forms.uniform()
    costs = [cost(chosen) for chosen in uniform]
    feasible = (costs[0], costs[-1])
    _require_feasible(job, forms.settings, limit, feasible)
    exact = [chosen for chosen, value in zip(uniform, costs, strict=True) if abs(value - limit) < 1e-6]
    if limit >= costs[-1]:
        exact = [uniform[-1]]
    chosen = exact[-1] if exact else _mix(checkpoint, job, forms, cost, limit, progress)
    model = _describe(checkpoint, job, forms.settings, forms.pick(chosen))
    largest = max(4 * c[0].numel for c in forms.choices)
    peak = _BASE_MEMORY + job.workers * (3 * largest + _WORKER_MEMORY)
    peak += max(entry.spec.nbytes for entry in model.entries.values())
    peak += _TOKENIZER_MEMORY if checkpoint.kind == "gguf" else 0
    return Plan(model, checkpoint, job, feasible, not exact, peak)


def _budget(checkpoint: Checkpoint, job: Job, forms: _Forms) -> tuple[float, Callable[[Sequence[int]], float]]:
    """The limit, and the function of an assignment that has to stay within it."""
    target = job.target
    if target.bits is not None:
        return target.bits, lambda chosen: forms.bits(chosen, target.count)
    assert target.size is not None

    def model_of(chosen: Sequence[int]) -> ir.Model:
        return _describe(checkpoint, job, forms.settings, forms.pick(chosen))

    if target.size_of == "ir":
        return target.size, lambda chosen: sum(ir.file_sizes(model_of(chosen)).values())
    return target.size, lambda chosen: export_plan(model_of(chosen), target.size_of).bytes


def export_plan(model: ir.Model, exporter: str) -> ExportPlan:
    """What an exporter would write with its default options.

    Raises:
        AnyquantError: there is no such exporter, or it cannot tell; see the exporter.
    """
    from anyquant.exporters.protocol import ExportOptions
    from anyquant.exporters.registry import get_exporter

    return get_exporter(exporter).check(model, ExportOptions())


def _exportable(checkpoint: Checkpoint, job: Job, forms: _Forms) -> _Forms:
    """Leave the forms that the target's exporter takes, and of those that it writes alike just the best.

    Raises:
        InfeasibleTarget: it takes no form of a matrix.
    """
    kept: list[dict[str, ir.Spec]] = [{} for _ in forms.names]
    reasons: dict[str, str] = {}
    for chosen in forms.uniform():
        picked = forms.pick(chosen)
        export = export_plan(_describe(checkpoint, job, forms.settings, picked), job.target.size_of)
        refused = {refusal.tensor: refusal for refusal in export.refusals}
        reasons |= {name: f"{refusal.reason}; {refusal.remedy}" for name, refusal in refused.items()}
        for name, choices in zip(forms.names, kept, strict=True):
            if name not in refused:
                choices[export.types[name]] = picked[name]  # a later one is written in as many bytes, and is better
    for name, choices in zip(forms.names, kept, strict=True):
        if not choices:
            raise InfeasibleTarget(f"{job.target.size_of} takes no form of {name}: {reasons[name]}", (0.0, 0.0))
    return replace(forms, choices=[list(choices.values()) for choices in kept])


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


def _mix(
    checkpoint: Checkpoint,
    job: Job,
    forms: _Forms,
    cost: Callable[[Sequence[int]], float],
    limit: float,
    progress: ir.Progress | None,
) -> list[int]:
    """Choose a form per matrix by measured relative error."""

    def measure(name: str, choices: Sequence[ir.Spec]) -> list[float]:
        weight = checkpoint.read(name)
        # Relative, times the number of weights: layers differ in scale, and what follows normalizes it away.
        scale = weight.size / max(float(np.einsum("ij,ij->", weight, weight, dtype=np.float64)), 1e-300)
        return [error * scale for error in forms.method.errors(weight, choices, forms.settings)]

    table = []
    arguments = list(zip(forms.names, forms.choices, strict=True))
    for done, errors in enumerate(in_order(measure, arguments, job.workers)):
        name, choices = arguments[done]
        table.append([Choice(spec.nbytes, error) for spec, error in zip(choices, errors, strict=True)])
        if progress:
            progress(name, done + 1, len(arguments))
    return allocate(table, lambda chosen: cost(chosen) <= limit + 1e-9, fill=job.target.size_of == "ir")
