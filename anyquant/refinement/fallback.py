"""Rows refined without the compiled library: the steps of kernels/core/refine.cpp in NumPy, with the same bytes.

The C++ explains the method. Names and the order of operations follow it: change both together. Each step is done for
all rows at once; a row that has stopped is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyquant.ir import FP16_MAX

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Codes = NDArray[np.uint8]
Bools = NDArray[np.bool_]

RIDGE = 1e-7
MOST_RIDGE = 10.0
LEAST_GAIN = 1e-4
LEAST_STEP = 1e-12
_ELEMENTS = 1 << 22  # doubles of P^T H of the rows that go together


def refine_rows(
    moment: Floats,
    weights: Floats,
    fixed: Floats | None,
    scale: Floats | None,
    codebook: Floats,
    codes: Codes,
    alternations: int,
    cycles: int,
) -> Doubles:
    """Improve rows that own codebooks of one width; codebook and codes are overwritten.

    Args:
        moment: float32 [n, n], symmetric and positive semi-definite.
        weights: float32 [rows, n].
        fixed: float32 [rows, n], what stands for a weight whatever its code, NaN where the code counts; or None.
        scale: float32 [n], positive, what entries are multiplied by; or None.
        codebook: float32 [rows, k], FP16 numbers, each row ascending; entries without a code may end as anything.
        codes: uint8 [rows, n], below k.
        alternations: of entries and codes, at most.
        cycles: over the codes in each alternation, at most.

    Returns:
        float64 [rows, 2]: the loss (q - w)^T H (q - w) of each row before and after.
    """
    rows, n = weights.shape
    losses = np.empty((rows, 2))
    step = max(1, _ELEMENTS // (n * codebook.shape[1]))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        one = _Rows(moment, weights[part], None if fixed is None else fixed[part], scale, codebook[part], codes[part])
        losses[part] = one.refine(alternations, cycles)
    return losses


class _Rows:
    """The rows that go together, and what is known of each."""

    def __init__(
        self,
        moment: Floats,
        weights: Floats,
        fixed: Floats | None,
        scale: Floats | None,
        codebook: Floats,
        codes: Codes,
    ) -> None:
        self.H = moment.astype(np.float64)
        self.w = weights
        self.fixed = fixed
        self.coded: Bools = np.ones(weights.shape, np.bool_) if fixed is None else np.isnan(fixed)
        self.scale = np.ones(weights.shape[1], np.float32) if scale is None else scale
        self.entries, self.codes = codebook, codes
        self.q = np.empty(weights.shape, np.float32)
        self.h = np.empty(weights.shape)

    def refine(self, alternations: int, cycles: int) -> Doubles:
        """Do it; the losses [rows, 2]."""
        every = np.arange(len(self.w))
        loss = self._renew(every)
        first, going = loss.copy(), every
        for _ in range(alternations):
            before = loss[going]
            self._move_entries(going, loss)
            self._plant_entries(going)
            self._sort_entries(going)
            self._move_codes(going, cycles, loss)
            going = going[before - loss[going] > LEAST_GAIN * before]
        if alternations:
            self._move_entries(every, loss)
        self._sort_entries(every)
        return np.stack([first, loss], axis=1)

    def _loss(self, rows: NDArray[np.int64]) -> Doubles:
        terms = (self.q[rows].astype(np.float64) - self.w[rows]) * self.h[rows]
        return _sum(terms)

    def _renew(self, rows: NDArray[np.int64]) -> Doubles:
        """Set q and h of these rows from scratch; their losses."""
        q = np.take_along_axis(self.entries[rows], self.codes[rows].astype(np.int64), axis=1) * self.scale
        if self.fixed is not None:
            q = np.where(self.coded[rows], q, self.fixed[rows])
        self.q[rows] = q
        h = np.zeros(q.shape)
        error = q.astype(np.float64) - self.w[rows]
        for j in range(q.shape[1]):
            h += error[:, j, None] * self.H[j]
        self.h[rows] = h
        return self._loss(rows)

    def _move_entries(self, rows: NDArray[np.int64], loss: Doubles) -> None:
        """Move the entries to the least squares solution, in the rows where that lowers the loss."""
        k, n = self.entries.shape[1], self.w.shape[1]
        sums, normal, step = np.zeros((len(rows), k, n)), np.zeros((len(rows), k, k)), np.zeros((len(rows), k))
        at = self.scale.astype(np.float64)
        coded, codes = self.coded[rows], self.codes[rows]
        for j in range(n):
            which = np.flatnonzero(coded[:, j])
            code = codes[which, j]
            sums[which, code] += at[j] * self.H[j]
            step[which, code] -= at[j] * self.h[rows[which], j]
        for j in range(n):
            which = np.flatnonzero(coded[:, j])
            normal[which, :, codes[which, j]] += at[j] * sums[which, :, j]
        solved, step = _solve(normal, step)
        rows, step = rows[solved], step[solved]
        entries, h, q = self.entries[rows], self.h[rows], self.q[rows]
        self.entries[rows] = _to_half(self.entries[rows] + step)
        found = self._renew(rows)
        better = found < loss[rows]
        loss[rows[better]] = found[better]
        worse = rows[~better]
        self.entries[worse], self.h[worse], self.q[worse] = entries[~better], h[~better], q[~better]

    def _plant_entries(self, rows: NDArray[np.int64]) -> None:
        """Put every entry that no code names to where the weight lies that would gain most by it."""
        diagonal = np.diagonal(self.H)
        k = self.entries.shape[1]
        for row in rows:
            coded = self.coded[row]
            spare = np.flatnonzero(np.bincount(self.codes[row][coded], minlength=k) == 0)
            if not len(spare):
                continue
            alive = coded & (diagonal > 0)
            gain = np.zeros(len(coded))
            gain[alive] = self.h[row, alive] * self.h[row, alive] / diagonal[alive]
            for entry, j in zip(spare, np.argsort(-gain, kind="stable"), strict=False):
                if not gain[j] > 0:
                    break
                target = (self.q[row, j] - self.h[row, j] / diagonal[j]) / self.scale[j]
                self.entries[row, entry] = _to_half(target)

    def _sort_entries(self, rows: NDArray[np.int64]) -> None:
        """Entries in ascending order; equal ones keep theirs."""
        order = np.argsort(self.entries[rows], axis=1, kind="stable")
        rank = np.argsort(order, axis=1).astype(np.uint8)
        self.entries[rows] = np.take_along_axis(self.entries[rows], order, axis=1)
        self.codes[rows] = np.take_along_axis(rank, self.codes[rows].astype(np.int64), axis=1)

    def _move_codes(self, rows: NDArray[np.int64], cycles: int, loss: Doubles) -> None:
        """Coordinate descent: each column once in a cycle, until nothing moves."""
        edges = _Edges.of(self.entries[rows])
        here = np.arange(len(rows))  # of those that still move, their place in rows
        for _ in range(cycles):
            now = rows[here]
            least = LEAST_STEP * loss[now]
            moved = np.zeros(len(now), np.bool_)
            for j in range(self.w.shape[1]):
                moved |= self._move_column(j, now, here, edges, least)
            loss[now] = self._loss(now)
            here = here[moved]

    def _move_column(
        self, j: int, rows: NDArray[np.int64], here: NDArray[np.int64], edges: _Edges, least: Doubles
    ) -> Bools:
        """Move the codes of one column; where they did."""
        curvature, h, q = self.H[j, j], self.h[rows, j], self.q[rows, j].astype(np.float64)
        alive = curvature > 0
        x = (q - h / curvature if alive else self.w[rows, j].astype(np.float64)) / np.float64(self.scale[j])
        code = edges.nearest(here, x)
        value = self.entries[rows, code] * self.scale[j]
        d = value.astype(np.float64) - q
        change = d * (2 * h + d * curvature)
        moves = change < -least if alive else (change < -least) | ((change == 0) & (d != 0))
        moves &= self.coded[rows, j]
        which = rows[moves]
        self.h[which] += d[moves, None] * self.H[j]
        self.q[which, j] = value[moves]
        self.codes[which, j] = code[moves]
        return np.asarray(moves, np.bool_)


@dataclass(frozen=True)
class _Edges:
    """What lies between neighbours that differ, infinite behind the last [rows, k - 1], and their codes [rows, k]."""

    middles: Doubles
    code: Codes

    @classmethod
    def of(cls, entries: Floats) -> _Edges:
        """Of ascending codebooks [rows, k]."""
        rows, k = entries.shape
        middles, code = np.full((rows, k), np.inf), np.zeros((rows, k), np.uint8)
        between = (entries[:, :-1].astype(np.float64) + entries[:, 1:]) / 2
        differs = entries[:, 1:] != entries[:, :-1]
        place = np.cumsum(differs, axis=1)
        row, c = np.nonzero(differs)
        middles[row, place[row, c] - 1] = between[row, c]
        code[row, place[row, c]] = c + 1
        return cls(middles, code)

    def nearest(self, rows: NDArray[np.int64], values: Doubles) -> Codes:
        """The code of one value for each of these rows; ties and equal entries go to the lowest."""
        at = (self.middles[rows] < values[:, None]).sum(axis=1)
        return np.asarray(self.code[rows, at], np.uint8)


def _solve(normal: Doubles, right: Doubles) -> tuple[Bools, Doubles]:
    """Solve normal [rows, k, k] x = right [rows, k] with the least ridge that works; where it did, and x."""
    rows, k = right.shape
    diagonal = np.einsum("raa->ra", normal)
    counts = diagonal > 0
    x = np.where(counts, right, 0)
    factors = np.zeros(normal.shape)
    open_rows, ridge = np.arange(rows), RIDGE
    while len(open_rows) and ridge <= MOST_RIDGE:
        good, found = _factorize(normal[open_rows], diagonal[open_rows], counts[open_rows], ridge)
        factors[open_rows[good]] = found[good]
        open_rows = open_rows[~good]
        ridge *= 10
    solved = np.ones(rows, np.bool_)
    solved[open_rows] = False
    factors[open_rows] = np.eye(k)
    for p in range(k):
        x[:, p + 1 :] -= factors[:, p + 1 :, p] * x[:, p, None]
    x /= np.einsum("raa->ra", factors)
    for p in range(k - 1, 0, -1):
        x[:, :p] -= factors[:, p, :p] * x[:, p, None]
    return solved, x


def _factorize(normal: Doubles, diagonal: Doubles, counts: Bools, ridge: float) -> tuple[Bools, Doubles]:
    """L below the diagonal, D on it; entries that count for nothing are left out. False where a pivot is lost."""
    k = normal.shape[1]
    F = np.where(counts[:, :, None] & counts[:, None, :], normal, 0)
    index = np.arange(k)
    F[:, index, index] = np.where(counts, diagonal + ridge * diagonal, 1)
    least = np.where(counts, 0.5 * ridge * diagonal, 0)
    good = np.ones(len(F), np.bool_)
    for p in range(k):
        good &= F[:, p, p] > least[:, p]
        pivot = np.where(good, F[:, p, p], 1)
        column = F[:, p + 1 :, p].copy()
        factor = column / pivot[:, None]
        F[:, p + 1 :, p + 1 :] -= factor[:, :, None] * column[:, None, :]
        F[:, p + 1 :, p] = factor
    return good, F


def _to_half(values: Doubles) -> NDArray[np.float16]:
    """The nearest FP16 numbers, within their range; no negative zero."""
    return np.clip(values, -FP16_MAX, FP16_MAX).astype(np.float16) + np.float16(0)


def _sum(terms: Doubles) -> Doubles:
    """Sums of rows, from zero and from left to right."""
    return np.cumsum(terms, axis=1)[:, -1] + 0.0
