"""Codes, scales and zero points of an affine tensor, with error feedback and without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anyquant.affine_grids import Grid, Kind, Steps, counts_side_by_side, full_range, search, side_by_side
from anyquant.feedback import BeginGroup, activation_order, uncompensated, with_feedback
from anyquant.ir import AffineSpec, Tensor, dequantize
from anyquant.ir.packing import pack
from anyquant.methods.importance import Importance, chunks
from anyquant.methods.protocol import Floats, Settings

if TYPE_CHECKING:
    from anyquant.calibration import MatrixStatistics

_SHORT = 64  # the longest block for which order=auto tries order=blocks, too
_NONE = np.empty(0, np.int64)


def make(weight: Floats, spec: AffineSpec, statistics: MatrixStatistics | None, settings: Settings) -> Tensor:
    """Quantize a matrix.

    Args:
        weight: float32 [out, in], within FP16.
        spec: of the tensor.
        statistics: of its inputs, for error feedback and to search ranges; None does without.
        settings: of the method.

    Raises:
        InputError: the statistics are of no inputs.
    """
    importance = Importance(weight, statistics)
    if statistics is None or not settings["feedback"]:
        maker = _Maker(spec, settings, importance)
        maker.set_grids(weight, None)
        for column in range(spec.shape[1]):
            maker.round(column, weight[:, column])
        return maker.tensor()
    order = settings["order"]
    if order != "auto" or spec.block > _SHORT:
        return _compensated(weight, spec, "activation" if order == "auto" else order, statistics, settings, importance)
    made = [_compensated(weight, spec, each, statistics, settings, importance) for each in ("blocks", "activation")]
    return min(made, key=lambda tensor: _loss(weight, tensor, statistics, importance))


def _compensated(
    weight: Floats, spec: AffineSpec, ordering: str, statistics: MatrixStatistics, settings: Settings, of: Importance
) -> Tensor:
    """The tensor with error feedback, columns in this order."""
    maker = _Maker(spec, settings, of)
    if ordering == "activation":
        feedback = Feedback(statistics, activation_order(statistics.diagonal), settings)
        maker.set_grids(weight, feedback)
        begin = None
    else:
        blocks = ordering == "blocks"
        order = _by_blocks(statistics.diagonal, spec.block) if blocks else np.arange(spec.shape[1])
        feedback = Feedback(statistics, order, settings)
        begin = maker.grids_as_they_come(feedback)
    with_feedback(
        weight,
        feedback.moment,
        maker.round,
        order=feedback.order,
        factor=feedback.factor,
        group=spec.block,
        begin=begin,
    )
    return maker.tensor()


def _loss(weight: Floats, tensor: Tensor, statistics: MatrixStatistics, importance: Importance) -> float:
    """Squared error of the outputs, each row by its gradients where there are any."""
    error = dequantize(tensor) - weight
    losses, of_rows = np.einsum("ij,ij->i", error @ statistics.full(), error, dtype=np.float64), importance.by_rows()
    return float(losses.sum() if of_rows is None else losses @ of_rows)


class Feedback:
    """Of a matrix whose columns are taken in some order.

    Attributes:
        order: int64 [in].
        moment: float32 [in, in], of the inputs.
        factor: as feedback takes it.
        relief: float32 [in]; see :func:`anyquant.feedback.uncompensated`.
    """

    def __init__(self, statistics: MatrixStatistics, order: NDArray[np.int64], settings: Settings) -> None:
        """Of statistics with a second moment."""
        self.order, self.moment = order, statistics.full()
        self.factor, left = uncompensated(self.moment, order, settings["damping"])
        self.relief: Floats = left.astype(np.float32)

    @classmethod
    def by_activation(cls, statistics: MatrixStatistics | None, settings: Settings) -> Feedback | None:
        """With the columns by the power of their inputs; None where there is no feedback."""
        if statistics is None or not settings["feedback"]:
            return None
        return cls(statistics, activation_order(statistics.diagonal), settings)


class _Maker:
    """The arrays of an affine tensor in the making; those here have a column of the matrix, or a block, in a row."""

    def __init__(self, spec: AffineSpec, settings: Settings, importance: Importance) -> None:
        self._spec, self._kind = spec, Kind(spec.bits, settings["symmetric"])
        self._importance = importance if settings["clip"] else None
        rows = spec.shape[0]
        self._codes = np.zeros((spec.blocks * spec.block, rows), np.uint8)
        self._scale = np.zeros((spec.blocks, rows), np.float16)
        self._zero = np.zeros((spec.blocks, rows), np.uint8)
        self._steps: dict[int, Steps] = {}

    def set_grids(self, weight: Floats, feedback: Feedback | None) -> None:
        """All grids, from the weights as they are; searched if ranges are to be."""
        for rows in chunks(weight):
            values = side_by_side(weight[rows], self._spec)
            if self._importance is None:
                grid = full_range(values, self._kind)
            else:
                counts = counts_side_by_side(counts_of(self._importance, feedback, rows), self._spec, len(weight[rows]))
                grid, _ = search(values, counts, self._kind)
            self._scale[:, rows] = grid.scale.reshape(-1, self._spec.blocks).T
            self._zero[:, rows] = grid.zero.reshape(-1, self._spec.blocks).T

    def grids_as_they_come(self, feedback: Feedback) -> BeginGroup:
        """What sets the grid of a block from its values as they are when its first column comes.

        Args:
            feedback: in whose order whole blocks follow each other.
        """
        counts = None if self._importance is None else counts_of(self._importance, feedback, slice(None))

        def begin(place: int, values: Floats) -> None:
            columns = feedback.order[place : place + len(values)]
            if counts is None:
                grid = full_range(values, self._kind)
            else:
                grid, _ = search(values, np.ascontiguousarray(counts[:, columns].T), self._kind)
            block = int(columns[0]) // self._spec.block
            self._scale[block], self._zero[block] = grid.scale, grid.zero

        return begin

    def round(self, column: int, values: Floats) -> Floats:
        """Choose the codes of a column; returns its values, float32 [out]."""
        block = column // self._spec.block
        if block not in self._steps:
            self._steps[block] = Grid(self._scale[block], self._zero[block]).steps(self._kind)
        steps = self._steps[block]
        multiples = steps.nearest(values)
        self._codes[column] = multiples - steps.low
        multiples *= steps.scale
        return multiples

    def tensor(self) -> Tensor:
        """The tensor."""
        codes = pack(np.ascontiguousarray(self._codes.T), self._spec.bits)
        scale, zero = np.ascontiguousarray(self._scale.T), np.ascontiguousarray(self._zero.T)
        return Tensor(self._spec, {".codes": codes, ".scale": scale, ".zero": zero})


def _by_blocks(power: Floats, block: int) -> NDArray[np.int64]:
    """Whole blocks, those of the most power first, and by power within; one of fewer columns comes last."""
    starts = np.arange(0, len(power), block)
    mean = np.add.reduceat(power.astype(np.float64), starts)
    if len(power) % block:
        mean[-1] = -1.0
    parts = [
        start + activation_order(power[start : start + block]) for start in starts[np.argsort(-mean, kind="stable")]
    ]
    return np.concatenate(parts)


def counts_of(importance: Importance, feedback: Feedback | None, rows: Any) -> Floats:
    """What squared errors count, float32 [rows, in], or [1, in] where all rows share it, but for a row's own factor."""
    counts = np.atleast_2d(importance.rows(rows, _NONE))
    return counts if feedback is None else counts * feedback.relief
