"""Refinement of columns that own codebooks: block coordinate descent, a block being a column's codebook and codes.

With all other columns fixed, the loss of row i as a function of q_ij is H_jj (t_ij - q_ij)^2 and a constant, where
t_ij = q_ij - h_ij / H_jj and h = (Q - W) H. So the best column is k-means of t_j, weighted by the rows' weights, and
exact k-means (:mod:`anyquant.clustering`) finds it: codebook and codes at once, which alternating between them as LNQ
does for rows (Kim et al., arXiv 2505.07004) only approaches. What is stored is FP16: a column that rounding makes worse
stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyquant.clustering import assign, kmeans
from anyquant.ir import FP16_MAX, CodebookSpec, Tensor, dequantize
from anyquant.refinement.pieces import Places, fixed_values, put, take

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

LEAST_GAIN = 1e-4  # of the loss: a sweep that gains less is the last
_BLOCK = 128  # columns between two updates of h by matrix products


@dataclass(frozen=True)
class Group:
    """Contiguous rows with a moment matrix float32 [in, in] of their own."""

    rows: slice
    moment: Floats


def refine_columns(
    weight: Floats, tensor: Tensor, spec: CodebookSpec, groups: Sequence[Group], row_weights: Floats, sweeps: int
) -> Tensor:
    """Refine a tensor whose columns own codebooks.

    Args:
        weight: float32 [out, in].
        tensor: of the spec, axis 1.
        spec: that of the tensor.
        groups: that cover all rows.
        row_weights: float32 [out], not negative, of the rows' losses in the total.
        sweeps: over all columns, at most.

    Returns:
        A tensor of the same spec.
    """
    return _Columns(weight, tensor, spec, groups, row_weights).refine(sweeps)


class _Columns:
    """The state: what stands for each weight, and its error."""

    def __init__(
        self, weight: Floats, tensor: Tensor, spec: CodebookSpec, groups: Sequence[Group], row_weights: Floats
    ) -> None:
        self.w, self.groups, self.row_weights = weight, groups, row_weights.astype(np.float64)
        self.tensor, self.places = tensor, Places.of(tensor, spec)
        self.q = dequantize(tensor)
        self.error = self.q.astype(np.float64) - weight
        fixed = fixed_values(tensor, spec, slice(None))
        self.coded = None if fixed is None else np.isnan(fixed)
        scale = tensor.arrays[".input_scale"].astype(np.float32) if spec.input_scale else None
        self.scale = np.ones(spec.shape[1], np.float32) if scale is None else scale
        self.diagonal = np.empty(weight.shape)
        for group in groups:
            self.diagonal[group.rows] = np.diagonal(group.moment)
        self.improved: dict[int, tuple[NDArray[np.uint8], NDArray[np.float16]]] = {}

    def refine(self, sweeps: int) -> Tensor:
        """Sweep until nothing much is gained."""
        before = np.inf
        for _ in range(sweeps):
            loss, gain = self._sweep()
            if not gain > LEAST_GAIN * min(loss, before):
                break
            before = loss
        return self._tensor()

    def _tensor(self) -> Tensor:
        """What was given, with the improved columns."""
        arrays = {name: array.copy() for name, array in self.tensor.arrays.items()}
        for columns, width in self.places.parts(_BLOCK):
            codes, books = take(self.tensor, self.places, columns, width)
            for i, column in enumerate(columns.tolist()):
                if column in self.improved:
                    codes[i], books[i] = self.improved[column]
            put(arrays, self.places, columns, width, codes, books)
        return Tensor(self.tensor.spec, arrays)

    def _sweep(self) -> tuple[float, float]:
        """Improve every column once; the loss before, and what was gained."""
        loss = gain = 0.0
        for start in range(0, self.w.shape[1], _BLOCK):
            block = slice(start, min(start + _BLOCK, self.w.shape[1]))
            h = np.empty((len(self.w), block.stop - start))
            moments = [group.moment[:, block].astype(np.float64) for group in self.groups]
            for group, moment in zip(self.groups, moments, strict=True):
                h[group.rows] = self.error[group.rows] @ moment
            loss += float(self.row_weights @ np.einsum("ij,ij->i", self.error[:, block], h))
            for j in range(start, block.stop):
                change, gained = self._improve(j, h[:, j - start])
                gain += gained
                if not gained:
                    continue
                for group, moment in zip(self.groups, moments, strict=True):
                    ahead = h[group.rows, j + 1 - start :]
                    ahead += np.outer(change[group.rows], moment[j, j + 1 - start :])
        return loss, gain

    def _improve(self, j: int, h: Doubles) -> tuple[Doubles, float]:
        """Replace codebook and codes of one column, if that is better: the change of q [out], and the gain."""
        diagonal, q = self.diagonal[:, j], self.q[:, j]
        counts = self.row_weights * diagonal
        if self.coded is not None:
            counts[~self.coded[:, j]] = 0
        top = float(counts.max())
        if not top > 0:
            return np.zeros(len(q)), 0.0
        target = self.w[:, j].astype(np.float64)
        alive = diagonal > 0
        target[alive] = q[alive] - h[alive] / diagonal[alive]
        values = np.clip(target / self.scale[j], -FP16_MAX, FP16_MAX).astype(np.float32)[None]
        width = int(self.places.bits[j])
        book = kmeans(values, (counts / top).astype(np.float32)[None], 1 << width).astype(np.float16)
        codes = assign(values, book)
        found = book[0, codes[0]].astype(np.float32) * self.scale[j]
        if self.coded is not None:
            found = np.where(self.coded[:, j], found, q)
        change = found.astype(np.float64) - q
        gain = -float(self.row_weights @ (change * (2 * h + change * diagonal)))
        if not gain > 0:
            return change, 0.0
        self.q[:, j] = found
        self.error[:, j] = found.astype(np.float64) - self.w[:, j]
        self.improved[j] = codes[0], book[0]
        return change, gain
