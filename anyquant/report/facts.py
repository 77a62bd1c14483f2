"""All that the report of a quantization tells, before it is told."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anyquant import __version__, ir
from anyquant.checkpoint import Checkpoint
from anyquant.errors import InputError, UsageError
from anyquant.losses import mean_error
from anyquant.report.detail import Detail, Losses, detail, losses
from anyquant.report.matrices import Kind, Matrix, by_kind, hardest, matrices, parts
from anyquant.reporting.as_json import plain
from anyquant.reporting.environment import versions
from anyquant.reporting.estimate import Estimate
from anyquant.reporting.notes import another_source
from anyquant.sweep.results import Sweep

SCHEMA = "anyquant.report/1"
HARDEST = 20


@dataclass(frozen=True)
class HardRow:
    """A row (or column) with many bits.

    Attributes:
        matrix: name.
        index: number of the row.
        bits: that it has.
        size: root mean square of its weights over that of the matrix; None without the source.
        share: of the matrix' squared error; None without the source.
    """

    matrix: str
    index: int
    bits: int
    size: float | None = None
    share: float | None = None


@dataclass(frozen=True, eq=False)
class Facts:
    """A quantization in numbers.

    Attributes:
        model: the IR.
        name: of its folder.
        matrices: quantized.
        hardest: rows with the most bits.
        detail: one matrix from close by.
        source_bytes: of the source's tensors; None without the source.
        sweep: of the same model, if there is one.
        notes: what a reader should know.
    """

    model: ir.Model
    name: str
    matrices: Sequence[Matrix]
    hardest: Sequence[HardRow]
    detail: Detail
    source_bytes: int | None
    sweep: Sweep | None
    notes: tuple[str, ...]

    @property
    def kinds(self) -> list[Kind]:
        """The matrices by kind."""
        return by_kind(self.matrices)

    @property
    def nbytes(self) -> int:
        """Of the IR folder, side files not counted."""
        return sum(ir.file_sizes(self.model).values())

    @property
    def error(self) -> Estimate | None:
        """Relative squared error of the weights; see :func:`anyquant.losses.mean_error`."""
        return mean_error([matrix.entry for matrix in self.matrices], "error")

    @property
    def output_error(self) -> Estimate | None:
        """The same of the outputs."""
        return mean_error([matrix.entry for matrix in self.matrices], "output_error")

    @property
    def weights(self) -> str:
        """SHA-256 (hex) over the names and digests of all tensors: equal where two folders hold the same values."""
        lines = "".join(f"{name} {entry.sha256}\n" for name, entry in sorted(self.model.entries.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def environment(self) -> dict[str, Any]:
        """What the report was made with."""
        return versions()

    def to_json(self) -> dict[str, Any]:
        """The report as one JSON object."""
        model = self.model
        body: dict[str, Any] = plain(
            {
                "schema": SCHEMA,
                "anyquant": __version__,
                "model": {
                    "name": self.name,
                    "architecture": model.config.get("model_type"),
                    "method": model.method,
                    "settings": model.settings,
                    "source": model.source,
                    "calibration": model.calibration,
                    "anyquant": model.anyquant_version,
                    "weights": self.weights,
                },
                "bits": {"counted": model.quantized_bits, "model": model.bits_per_weight},
                "bytes": {
                    "total": self.nbytes,
                    "source": self.source_bytes,
                    "files": ir.file_sizes(model),
                    "parts": parts(model),
                },
                "error": self.error,
                "output_error": self.output_error,
                "kinds": [kind.to_json() for kind in self.kinds],
                "matrices": [matrix.to_json() for matrix in self.matrices],
                "hardest_rows": list(self.hardest),
                "matrix": self.detail.to_json(),
                "sweep": self.sweep.to_json() if self.sweep else None,
                "notes": self.notes,
                "environment": self.environment,
            }
        )
        return body


def collect(
    model: ir.Model,
    source: Checkpoint | None = None,
    chosen: str | None = None,
    sweep: Sweep | None = None,
    progress: ir.Progress | None = None,
) -> Facts:
    """Look at an IR folder.

    Args:
        model: the folder, opened.
        source: what it was made of; without it nothing is said of single rows' errors.
        chosen: the matrix to show in detail; the one whose outputs lose most, unless given.
        sweep: what other sizes of the same model cost.
        progress: called after each matrix that is read.

    Raises:
        UsageError: there is no such matrix.
        InputError: nothing in the folder is quantized, or the source is another model.
        CorruptFileError: an array is damaged.
    """
    found = matrices(model)
    name = model.path.resolve().name if model.path else ""
    if not found:
        raise InputError(f"{name} holds no quantized matrix.")
    matrix = _chosen(found, chosen)
    notes = [*_notes(model, source, sweep)]
    rows = hardest(found, HARDEST)
    lost: dict[str, Losses] = {}
    if source:
        wanted = list(dict.fromkeys(m.name for m, _ in rows))
        by_name = {m.name: m for m in found}
        for done, each in enumerate(wanted):
            lost[each] = losses(by_name[each], model.tensor(each), source)
            if progress:
                progress(each, done + 1, len(wanted) + 1)
    facts = Facts(
        model=model,
        name=name,
        matrices=found,
        hardest=[_hard_row(m, row, lost.get(m.name)) for m, row in rows],
        detail=detail(model, matrix, source),
        source_bytes=sum(info.nbytes for info in source.tensors.values()) if source else None,
        sweep=sweep,
        notes=tuple(notes),
    )
    if progress:
        progress(matrix.name, 1, 1)
    return facts


def _chosen(found: list[Matrix], name: str | None) -> Matrix:
    if name is None:
        return max(found, key=lambda m: (m.output_error or 0.0, m.error))
    for matrix in found:
        if matrix.name == name:
            return matrix
    close = [matrix.name for matrix in found if name in matrix.name] or [matrix.name for matrix in found]
    raise UsageError(f"there is no quantized matrix {name!r:.200}; there are {', '.join(close[:3])}, ...")


def _hard_row(matrix: Matrix, row: int, lost: Losses | None) -> HardRow:
    if lost is None:
        return HardRow(matrix.name, row, int(matrix.bits[row]))
    mean = max(float(lost.power.mean()), 1e-300)
    return HardRow(
        matrix.name, row, int(matrix.bits[row]), float(lost.power[row] / mean) ** 0.5, float(lost.share[row])
    )


def _notes(model: ir.Model, source: Checkpoint | None, sweep: Sweep | None) -> list[str]:
    """What a reader should know.

    Raises:
        InputError: the source is another model.
    """
    notes = []
    recorded = model.source.get("fingerprint")
    if source is None:
        notes.append("No --source was given: nothing is said of the weights before, nor of the errors of single rows.")
    else:
        for name, entry in model.entries.items():
            info = source.tensors.get(name)
            if info is None or info.shape != entry.spec.shape:
                raise InputError(
                    f"the source {source.name} has {'no' if info is None else f'a {list(info.shape)}'} {name}; the "
                    f"model holds a {list(entry.spec.shape)}. It was made of {model.source.get('name', 'another')}."
                )
        notes += another_source(model, source)
    if model.calibration is None:
        notes.append("There was no calibration: only the errors of the weights are known, not those of the outputs.")
    if sweep and recorded and sweep.model["fingerprint"] != recorded:
        notes.append(f"The sweep is of another source, {sweep.model['name']}: fingerprints differ.")
    return notes
