"""Refinement of blocks with a scale and a zero point: codes by coordinate descent, scales by least squares, in turn.

With all other columns fixed, the loss of a row as a function of q_ij is H_jj (t_ij - q_ij)^2 and a constant, where
t_ij = q_ij - h_ij / H_jj and h = (Q - W) H: so the best code is that of the value of the block's grid nearest to t_ij
(the step of Kim et al., arXiv 2505.07004, with a grid in the place of a codebook). With all codes fixed, the loss is
quadratic in the scale of each block. GPTQ meets every column once, and later columns make up for earlier ones alone;
here the earlier ones see what came after them, too. Zero points stay. What is stored is FP16, and sums are FP32: a row
that this made worse stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from anyquant.affine_grids import Grid, Kind, Steps
from anyquant.ir import FP16_MAX, AffineSpec, Tensor, dequantize
from anyquant.ir.packing import pack, unpack
from anyquant.refinement.columns import LEAST_GAIN, Group

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_ELEMENTS = 1 << 20  # weights of the rows that are refined at a time, for the memory that they take
_LEAST_POWER = 1e-12  # of a column, relative to the mean of all
_LEAF, _BLOCK = 16, 128  # columns whose h is brought up to date after each of them, and by matrix products


def refine_grids(
    weight: Floats, tensor: Tensor, spec: AffineSpec, groups: list[Group], alternations: int, cycles: int
) -> Tensor:
    """Refine an affine tensor; no row loses more than before.

    Args:
        weight: float32 [out, in].
        tensor: of the spec.
        spec: that of the tensor.
        groups: that cover all rows.
        alternations: between scales and codes, at most.
        cycles: over all codes in each of them, at most.

    Returns:
        A tensor of the same spec.
    """
    arrays = {name: array.copy() for name, array in tensor.arrays.items()}
    for part in _parts(groups, max(1, _ELEMENTS // spec.shape[1])):
        rows = _Rows(weight[part.rows], tensor, spec, part)
        rows.refine(alternations, cycles)
        better = rows.loss() < rows.before
        for name, array in rows.arrays().items():
            arrays[name][part.rows][better] = array[better]
    return Tensor(spec, arrays)


def _parts(groups: list[Group], rows: int) -> Iterator[Group]:
    """The groups, cut where they have more rows."""
    for group in groups:
        for start in range(group.rows.start, group.rows.stop, rows):
            yield Group(slice(start, min(start + rows, group.rows.stop)), group.moment)


class _Rows:
    """Some rows in the making. Arrays have a column of the matrix, or a block, in a row."""

    def __init__(self, weight: Floats, tensor: Tensor, spec: AffineSpec, group: Group) -> None:
        self._spec, self._kind, self._moment = spec, Kind(spec.bits), group.moment
        self._zero = np.ascontiguousarray(tensor.arrays[".zero"][group.rows].T)
        self._scale = np.ascontiguousarray(tensor.arrays[".scale"][group.rows].T)
        codes = unpack(tensor.arrays[".codes"][group.rows], spec.blocks * spec.block, spec.bits)
        self._weight = np.ascontiguousarray(weight.T)
        values = np.ascontiguousarray(dequantize(tensor, group.rows).T)
        self._steps = [Grid(self._scale[block], self._zero[block]).steps(self._kind) for block in range(spec.blocks)]
        zero = np.repeat(self._zero, spec.block, axis=0)[: spec.shape[1]]
        self._multiples = np.subtract(codes[:, : spec.shape[1]].T, zero, dtype=np.float32)
        self._error = values - self._weight
        self.before = self.loss()

    def loss(self) -> Doubles:
        """Of each row, float64 [rows]."""
        error = self._error.astype(np.float64)
        found: Doubles = np.einsum("ji,ji->i", self._moment.astype(np.float64) @ error, error)
        return found

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """What the tensor stores of these rows."""
        columns, padded = self._spec.shape[1], self._spec.blocks * self._spec.block
        zero = np.repeat(self._zero, self._spec.block, axis=0)[:columns]
        codes = np.zeros((self._weight.shape[1], padded), np.uint8)
        codes[:, :columns] = (self._multiples + zero).T
        return {".codes": pack(codes, self._spec.bits), ".scale": self._scale.T, ".zero": self._zero.T}

    def refine(self, alternations: int, cycles: int) -> None:
        """Improve codes and scales until nothing much is gained."""
        least = LEAST_GAIN * float(self.before.sum())
        for _ in range(alternations):
            if not self._improve_scales() + self._improve_codes(cycles, least) > least:
                break

    def _improve_codes(self, cycles: int, least: float) -> float:
        gained = 0.0
        for _ in range(cycles):
            gain = self._sweep()
            gained += gain
            if not gain > least:
                break
        return gained

    def _sweep(self) -> float:
        """Choose the code of every weight once, in the order of the columns; what all rows gained."""
        columns, moment, error, gained = self._spec.shape[1], self._moment, self._error, 0.0
        least = _LEAST_POWER * moment.diagonal().mean()
        for block in range(0, columns, _BLOCK):
            end = min(block + _BLOCK, columns)
            h = moment[block:end] @ error
            for start in range(block, end, _LEAF):
                stop = min(start + _LEAF, end)
                before = error[start:stop].copy()
                for column in range(start, stop):
                    power = moment[column, column]
                    if power > least:  # else the loss does not depend on it
                        change = self._choose(column, h[column - block], power)
                        gained -= float(change @ (2 * h[column - block] + power * change))
                        h[column + 1 - block : stop - block] += moment[column + 1 : stop, column, None] * change
                h[stop - block :] += moment[stop:end, start:stop] @ (error[start:stop] - before)
        return gained

    def _choose(self, column: int, h: Floats, power: np.float32) -> Floats:
        """Set a column to what is best with all others as they are; what that changes, float32 [rows]."""
        error, weight = self._error[column], self._weight[column]
        steps: Steps = self._steps[column // self._spec.block]
        multiples = steps.nearest(weight + (error - h / power))
        self._multiples[column] = multiples
        changed = multiples * steps.scale - weight
        change: Floats = changed - error
        error[:] = changed
        return change

    def _improve_scales(self) -> float:
        """Set every scale, block by block, to what is best with all codes as they are; what all rows gained."""
        gained = 0.0
        for block in range(self._spec.blocks):
            columns = slice(block * self._spec.block, min((block + 1) * self._spec.block, self._spec.shape[1]))
            multiples, moment = self._multiples[columns], self._moment[columns]
            along = np.einsum("ji,ji->i", multiples, moment @ self._error)
            power = np.einsum("ji,ji->i", multiples, moment[:, columns] @ multiples)
            step = np.divide(-along, power, out=np.zeros_like(along), where=power > 0)
            before = self._scale[block].astype(np.float32)
            scale = np.clip(before + step, -FP16_MAX, FP16_MAX).astype(np.float16)
            step = scale.astype(np.float32) - before
            # FP16 can be so coarse that the next scale is beyond the best one by more than the last was short of it.
            gain = -step * (2 * along + step * power)
            better = gain > 0
            gained += float(gain[better].sum())
            self._scale[block] = np.where(better, scale, self._scale[block])
            self._steps[block] = Grid(self._scale[block], self._zero[block]).steps(self._kind)
            self._error[columns] = multiples * self._steps[block].scale - self._weight[columns]
        return gained
