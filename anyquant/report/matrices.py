"""The quantized matrices of an IR folder, sorted by layer and kind, with the number of bits of every row.

Read are the manifest and, of codebooks, the arrays ``.bits``; codes stay on the disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant import ir
from anyquant.checkpoint.names import layer_of
from anyquant.errors import CorruptFileError
from anyquant.losses import error_of
from anyquant.reporting.estimate import Estimate

WIDTHS = range(9)
Bits = NDArray[np.uint8]
_EXPERT = re.compile(r"#\d+$|(?<=experts)\.\d+(?=\.)")
_PARTS = {
    ".codes": "codes",
    ".blocks": "blocks",
    ".codebook": "codebooks",
    ".bits": "bit map",
    ".exponents": "scales",
    ".scale": "scales",
    ".zero": "scales",
    ".input_scale": "scales",
    ".outlier_indptr": "outliers",
    ".outlier_index": "outliers",
    ".outlier_value": "outliers",
}


@dataclass(frozen=True, eq=False)
class Matrix:
    """A quantized matrix.

    Attributes:
        name: of the tensor.
        kind: what it is in its layer ("q_proj"); short, but different from all other kinds of the model.
        layer: number of the layer; None outside of them.
        entry: what the manifest says.
        unit: what chooses its number of bits: "row", "column", or the "matrix" as a whole.
        bits: uint8 [units], of each unit.
    """

    name: str
    kind: str
    layer: int | None
    entry: ir.Entry
    unit: str
    bits: Bits

    @property
    def error(self) -> float:
        """Relative squared error of the weights."""
        return error_of(self.entry, "error") or 0.0

    @property
    def output_error(self) -> float | None:
        """The same of the outputs; None where it is not known."""
        return error_of(self.entry, "output_error")

    @property
    def label(self) -> str:
        """The name in short: "layer 3 q_proj", "layer 3 experts.gate_proj#7"."""
        if self.layer is None:
            return self.name
        expert = _EXPERT.search(self.name)
        return f"layer {self.layer} {self.kind}" + (f"#{expert[0][1:]}" if expert else "")

    @cached_property
    def widths(self) -> NDArray[np.int64]:
        """Number of units with 0, 1, ... 8 bits, int64 [9]."""
        return np.bincount(self.bits, minlength=len(WIDTHS))

    def to_json(self) -> dict[str, Any]:
        """All of it but the single rows."""
        spec = self.entry.spec
        return {
            "name": self.name,
            "kind": self.kind,
            "layer": self.layer,
            "shape": list(spec.shape),
            "bytes": spec.nbytes,
            "bits": spec.bits_per_weight,
            "unit": self.unit,
            "widths": self.widths.tolist(),
            "error": self.error,
            "output_error": self.output_error,
        }


@dataclass(frozen=True, eq=False)
class Kind:
    """Matrices of one kind, or those of one kind in one layer (a matrix, or all of its experts).

    Attributes:
        name: of the kind.
        matrices: at least one.
    """

    name: str
    matrices: Sequence[Matrix]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(m.entry.spec.numel for m in self.matrices)

    @property
    def bits(self) -> float:
        """Stored bits per weight, all overhead included."""
        return 8 * sum(m.entry.spec.nbytes for m in self.matrices) / self.numel

    @property
    def widths(self) -> NDArray[np.int64]:
        """Number of units with 0, 1, ... 8 bits, int64 [9]."""
        total: NDArray[np.int64] = np.sum([m.widths for m in self.matrices], axis=0)
        return total

    @property
    def width(self) -> Estimate:
        """Mean bits of a unit, with its standard error over units."""
        return mean(WIDTHS, self.widths)

    @property
    def error(self) -> Estimate:
        """Mean relative squared error of the weights, with its standard error over matrices."""
        return mean([m.error for m in self.matrices])

    @property
    def output_error(self) -> Estimate | None:
        """The same of the outputs; None where it was not measured."""
        known = [m.output_error for m in self.matrices if m.output_error is not None]
        return mean(known) if known else None

    def to_json(self) -> dict[str, Any]:
        """The kind as JSON but for its estimates, which stay what they are."""
        return {
            "kind": self.name,
            "matrices": len(self.matrices),
            "weights": self.numel,
            "bits": self.bits,
            "widths": self.widths.tolist(),
            "mean_width": self.width,
            "error": self.error,
            "output_error": self.output_error,
        }


def mean(values: Iterable[float], counts: Iterable[float] | None = None) -> Estimate:
    """A mean with its standard error; without one where there is a single value.

    Args:
        values: numbers.
        counts: how often each occurs; once, unless given.
    """
    x = np.array(list(values), np.float64)
    n = np.ones(len(x)) if counts is None else np.array(list(counts), np.float64)
    total = n.sum()
    value = float(n @ x / total)
    if total < 2:
        return Estimate(value, int(total))
    variance = float(n @ (x - value) ** 2) / (total - 1)
    return Estimate(value, int(total), float(np.sqrt(variance / total)))


def matrices(model: ir.Model) -> list[Matrix]:
    """The quantized matrices in the model's order.

    Raises:
        CorruptFileError: a row has more than 8 bits.
    """
    places = {name: _place(name) for name, entry in model.entries.items() if entry.quantized}
    short = _short({kind for _, kind in places.values()})
    return [
        Matrix(name, short[kind], layer, model.entries[name], *_units(model, name))
        for name, (layer, kind) in places.items()
    ]


def by_kind(found: Sequence[Matrix]) -> list[Kind]:
    """One entry for each kind, in the order of the model."""
    groups: dict[str, list[Matrix]] = {}
    for matrix in found:
        groups.setdefault(matrix.kind, []).append(matrix)
    return [Kind(name, members) for name, members in groups.items()]


def by_layer(kind: Kind) -> dict[int, Kind]:
    """Number of a layer -> what it holds of a kind; matrices outside of layers are left out."""
    groups: dict[int, list[Matrix]] = {}
    for matrix in kind.matrices:
        if matrix.layer is not None:
            groups.setdefault(matrix.layer, []).append(matrix)
    return {layer: Kind(kind.name, members) for layer, members in sorted(groups.items())}


def unit_of(found: Sequence[Matrix]) -> str:
    """What the numbers of bits belong to: "rows", "columns", "matrices", or "units" where they are mixed."""
    words = {matrix.unit for matrix in found}
    return {"row": "rows", "column": "columns", "matrix": "matrices"}[words.pop()] if len(words) == 1 else "units"


def hardest(found: Sequence[Matrix], count: int) -> list[tuple[Matrix, int]]:
    """The rows (or columns) with the most bits; of equal ones those of the matrix whose outputs lose most.

    Args:
        found: matrices; those without rows of their own widths are left out.
        count: at most so many.

    Returns:
        (matrix, number of the row).
    """
    candidates = [
        (-int(matrix.bits[row]), -(matrix.output_error or 0.0), place, int(row))
        for place, matrix in enumerate(found)
        if matrix.unit != "matrix"
        for row in np.argsort(-matrix.bits.astype(np.int64), kind="stable")[:count]
    ]
    return [(found[place], row) for _, _, place, row in sorted(candidates)[:count]]


def parts(model: ir.Model) -> dict[str, int]:
    """What the bytes of the IR folder are: codes, codebooks, ... of the quantized matrices, and everything else."""
    total: dict[str, int] = {}
    for entry in model.entries.values():
        for suffix, (dtype, shape) in entry.spec.arrays().items():
            part = _PARTS.get(suffix, "other arrays") if entry.quantized else "tensors not quantized"
            total[part] = total.get(part, 0) + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    total["headers and manifest"] = sum(ir.file_sizes(model).values()) - model.nbytes
    return dict(sorted(total.items(), key=lambda part: -part[1]))


def _place(name: str) -> tuple[int | None, str]:
    """Layer and full kind of a matrix."""
    found = layer_of(_EXPERT.sub("", name))
    layer, kind = (None, _EXPERT.sub("", name)) if found is None else (found[1], found[0] + found[2])
    return layer, kind.removesuffix(".weight")


def _short(kinds: set[str]) -> dict[str, str]:
    """Of each kind its shortest end that is no other's."""
    ends: dict[str, set[str]] = {}
    for kind in kinds:
        words = kind.split(".")
        for count in range(1, len(words) + 1):
            ends.setdefault(".".join(words[-count:]), set()).add(kind)
    return {kind: min((end for end, of in ends.items() if of == {kind}), key=len, default=kind) for kind in kinds}


def _units(model: ir.Model, name: str) -> tuple[str, Bits]:
    """What chooses its bits, and how many each has."""
    spec = model.entries[name].spec
    if isinstance(spec, ir.CodebookSpec):
        bits: Bits = model.array(name, ".bits")
        if bits.max() > WIDTHS[-1]:
            raise CorruptFileError(f"{name}.bits: {bits.max()} at [{bits.argmax()}], must be 0..{WIDTHS[-1]}")
        return ("row", "column")[spec.axis], bits
    if isinstance(spec, ir.BlockSpec):
        width = spec.width
    elif isinstance(spec, ir.AffineSpec):
        width = spec.bits
    elif isinstance(spec, ir.GGMLSpec):
        width = int(re.sub(r"\D", "", spec.type)[0])  # Q4_K, IQ4_NL, MXFP4
    else:
        width = WIDTHS[-1]
    return "matrix", np.array([width], np.uint8)
