"""One matrix from close by: its weights before and after, and what its rows lose. A few rows in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant import ir
from anyquant.checkpoint import Checkpoint
from anyquant.report.matrices import Matrix

BINS = 120
_UNIT_BINS = 48
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Losses:
    """What the rows of a matrix (of one that owns its codebooks by column: the columns) hold and lose.

    Attributes:
        power: sum of the squared weights of each, float64 [rows].
        lost: sum of the squared errors of each, float64 [rows].
    """

    power: Floats
    lost: Floats

    @property
    def share(self) -> Floats:
        """Of the matrix' squared error, float64 [rows]; zeros where nothing was lost."""
        total = float(self.lost.sum())
        return self.lost / total if total > 0 else np.zeros(len(self.lost))


@dataclass(frozen=True, eq=False)
class Unit:
    """A row (or column) in detail.

    Attributes:
        index: number of the row.
        bits: that it has.
        share: of the matrix' squared error; None without the source.
        values: what its weights became, ascending.
        counts: how many weights became each.
        edges: of the bins of ``before``, float64 [bins + 1].
        before: weights of the source in each bin; None without the source.
    """

    index: int
    bits: int
    share: float | None
    values: NDArray[np.float32]
    counts: Counts
    edges: Floats
    before: Counts | None


@dataclass(frozen=True, eq=False)
class Detail:
    """A matrix in detail.

    Attributes:
        matrix: which one.
        word: "row" or "column": what ``units`` are.
        edges: of the bins, float64 [bins + 1].
        after: quantized weights in each bin.
        before: weights of the source in each bin; None without the source.
        losses: of its rows; None without the source.
        units: a row with the most bits, and one with as many as most have.
    """

    matrix: Matrix
    word: str
    edges: Floats
    after: Counts
    before: Counts | None
    losses: Losses | None
    units: tuple[Unit, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it but the losses of single rows, of which the groups of equal width stand."""
        return {
            "name": self.matrix.name,
            "word": self.word,
            "edges": self.edges.tolist(),
            "after": self.after.tolist(),
            "before": None if self.before is None else self.before.tolist(),
            "widths": by_width(self),
            "units": [
                {
                    "index": unit.index,
                    "bits": unit.bits,
                    "share": unit.share,
                    "values": unit.values.tolist(),
                    "counts": unit.counts.tolist(),
                    "edges": unit.edges.tolist(),
                    "before": None if unit.before is None else unit.before.tolist(),
                }
                for unit in self.units
            ],
        }


def axis_of(matrix: Matrix) -> int:
    """1 where columns choose their bits, else 0."""
    return int(matrix.unit == "column")


def losses(matrix: Matrix, tensor: ir.Tensor, source: Checkpoint) -> Losses:
    """Compare a matrix with the source, row by row or column by column."""
    axis = axis_of(matrix)
    count = tensor.spec.shape[axis]
    power, lost = np.zeros(count), np.zeros(count)
    for rows in ir.row_chunks(tensor.spec.shape):
        before = source.read(matrix.name, rows).astype(np.float64)
        error = before - ir.dequantize(tensor, rows)
        where: Any = rows if axis == 0 else slice(None)
        power[where] += (before**2).sum(axis=1 - axis)
        lost[where] += (error**2).sum(axis=1 - axis)
    return Losses(power, lost)


def detail(model: ir.Model, matrix: Matrix, source: Checkpoint | None) -> Detail:
    """Look at a matrix.

    Raises:
        CorruptFileError: its arrays are damaged.
        NonFiniteError: a weight of the source is NaN or Inf.
    """
    tensor = model.tensor(matrix.name)
    shape = tensor.spec.shape
    low, high = np.inf, -np.inf
    for rows in ir.row_chunks(shape):
        for part in (ir.dequantize(tensor, rows), *([source.read(matrix.name, rows)] if source else [])):
            low, high = min(low, float(part.min())), max(high, float(part.max()))
    edges = _edges(low, high, BINS)
    after, before = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    for rows in ir.row_chunks(shape):
        after += np.histogram(ir.dequantize(tensor, rows), edges)[0]
        if source:
            before += np.histogram(source.read(matrix.name, rows), edges)[0]
    found = losses(matrix, tensor, source) if source else None
    return Detail(
        matrix,
        ("row", "column")[axis_of(matrix)],
        edges,
        after,
        before if source else None,
        found,
        tuple(_unit(matrix, tensor, source, index, found) for index in _worth_seeing(matrix, shape, found)),
    )


def by_width(found: Detail) -> list[dict[str, Any]]:
    """What rows of equal width have in common; nothing without the source or where all have one width.

    Returns:
        For each width: its bits, its rows, their shares of all rows, of the squared weights and of the squared error,
        and the 5, 25, 50, 75 and 95 % quantiles of their root mean squares.
    """
    bits, lost = found.matrix.bits, found.losses
    if lost is None or len(bits) != len(lost.power):
        return []
    columns = found.matrix.entry.spec.numel / len(bits)
    groups = []
    for width in np.unique(bits).tolist():
        chosen = bits == width
        groups.append(
            {
                "bits": width,
                "units": int(chosen.sum()),
                "share": float(chosen.mean()),
                "power": float(lost.power[chosen].sum() / max(lost.power.sum(), 1e-300)),
                "error": float(lost.share[chosen].sum()),
                "rms": np.quantile(np.sqrt(lost.power[chosen] / columns), _QUANTILES).tolist(),
            }
        )
    return groups


def _edges(low: float, high: float, bins: int) -> Floats:
    """Bins from ``low`` to ``high``, of some width even where both are the same."""
    high = max(high, low + 1e-6 * max(abs(low), abs(high)), low + 1e-30)
    edges: Floats = np.linspace(low, high, bins + 1)
    return edges


def _worth_seeing(matrix: Matrix, shape: tuple[int, ...], found: Losses | None) -> list[int]:
    """The hardest row and a common one: of those with most bits, and with the median, the one that loses most."""
    count = shape[axis_of(matrix)]
    bits = matrix.bits if len(matrix.bits) == count else np.full(count, matrix.bits[0], np.uint8)
    chosen = []
    for width in (int(bits.max()), int(np.sort(bits)[count // 2])):
        members = np.flatnonzero(bits == width)
        chosen.append(int(members[0] if found is None else members[found.lost[members].argmax()]))
    return list(dict.fromkeys(chosen))


def _unit(matrix: Matrix, tensor: ir.Tensor, source: Checkpoint | None, index: int, found: Losses | None) -> Unit:
    after, before = [], []
    for rows in ir.row_chunks(tensor.spec.shape) if axis_of(matrix) else [slice(index, index + 1)]:
        pick: Any = (slice(None), index) if axis_of(matrix) else 0
        after.append(ir.dequantize(tensor, rows)[pick])
        if source:
            before.append(source.read(matrix.name, rows)[pick])
    values, counts = np.unique(np.concatenate(after), return_counts=True)
    weights = np.concatenate(before) if before else None
    everything = values if weights is None else np.concatenate([values, weights])
    edges = _edges(float(everything.min()), float(everything.max()), _UNIT_BINS)
    return Unit(
        index,
        int(matrix.bits[index] if len(matrix.bits) > 1 else matrix.bits[0]),
        None if found is None else float(found.share[index]),
        values,
        counts.astype(np.int64),
        edges,
        None if weights is None else np.histogram(weights, edges)[0].astype(np.int64),
    )
