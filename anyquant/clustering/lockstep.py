"""Entries of many rows for one lambda each, all rows a step at a time: kernels/core/kmeans_lambda.h in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GROUP = 8
HALF_GROUP = 4

Floats = NDArray[np.float64]
Starts = NDArray[np.int64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Request:
    """All entries of a row for one lambda, from all starts or from those between two lines of starts [u + 1]."""

    lam: float
    low: Starts | None
    high: Starts | None


@dataclass(frozen=True)
class Sums:
    """Prefix sums of many rows, each in a line of n + 1, and where their pieces begin and end."""

    u: Ints
    W: Floats
    S: Floats
    Q: Floats
    g: Floats
    begins: NDArray[np.bool_]
    stop: Ints
    """The end of the piece that an entry lies in or begins."""

    @classmethod
    def empty(cls, rows: int, n: int) -> Sums:
        """Sums to be filled row by row."""
        shape = (rows, n + 1)
        W, S, Q, g = np.zeros((4, *shape))
        return cls(np.zeros(rows, np.int64), W, S, Q, g, np.zeros(shape, np.bool_), np.zeros(shape, np.int64))

    def set_pieces(self, row: int, cuts: Sequence[int]) -> None:
        """Set where a row's pieces begin; the last cut is the number of its values."""
        self.u[row] = cuts[-1]
        self.begins[row] = False
        self.begins[row, cuts[:-1]] = True
        self.stop[row, : cuts[-1]] = np.repeat(cuts[1:], np.diff(cuts))


def answer(sums: Sums, asked: Mapping[int, Request]) -> dict[int, tuple[Starts, float]]:
    """The starts [u + 1] of each request's row, and g of its last entry."""
    found: dict[int, tuple[Starts, float]] = {}
    for narrow in (False, True):
        rows = np.array([row for row, request in asked.items() if (request.low is not None) == narrow], np.int64)
        if not rows.size:
            continue
        task = _Task(sums, rows, np.array([asked[row].lam for row in rows.tolist()]))
        if narrow:
            low, high = np.zeros_like(task.starts), np.zeros_like(task.starts)
            for at, row in enumerate(rows.tolist()):
                request = asked[row]
                if request.low is not None and request.high is not None:
                    low[at, : request.low.size], high[at, : request.high.size] = request.low, request.high
            task.by_brackets(low, high)
        else:
            task.by_blocks()
        for at, row in enumerate(rows.tolist()):
            u = int(sums.u[row])
            found[row] = task.starts[at, : u + 1].copy(), float(sums.g[row, u])
    return found


class _Task:
    """Rows with a lambda each. All indices into ``rows`` are called at, all into a line j or i."""

    def __init__(self, sums: Sums, rows: Ints, lam: Floats) -> None:
        self.sums, self.rows, self.lam = sums, rows, lam
        self.starts: Starts = np.zeros((rows.size, sums.W.shape[1]), np.int64)
        sums.g[rows, 0] = 0

    def best_start(self, at: Ints, j: Ints, low: Ints, high: Ints) -> None:
        """Set g and start of the entries j, started anywhere in low..high; the lowest of the best."""
        counts = high - low + 1
        first = np.cumsum(counts) - counts
        line = self.rows[at] * self.sums.W.shape[1]  # where the row begins in the sums read as one line
        i = np.arange(int(counts.sum())) + np.repeat(line + low - first, counts)
        W, S, g = self.sums.W.reshape(-1), self.sums.S.reshape(-1), self.sums.g.reshape(-1)
        ds = np.repeat(S[line + j], counts) - S[i]
        dw = np.repeat(W[line + j], counts) - W[i]
        found = g[i] + ds * ds / dw
        best = np.maximum.reduceat(found, first)
        hits = np.flatnonzero(found == np.repeat(best, counts))
        g[line + j] = best - self.lam[at]
        self.starts[at, j] = i[hits[np.searchsorted(hits, first)]] - line

    def error(self, at: Ints, j: Ints) -> Floats:
        """What the entries leave, lambdas included."""
        row = self.rows[at]
        return self.sums.Q[row, j] - self.sums.g[row, j]

    def by_blocks(self) -> None:
        """All entries, block by block."""
        a = np.zeros(self.rows.size, np.int64)
        block = np.full(self.rows.size, HALF_GROUP)
        while (at := np.flatnonzero(a < self.sums.u[self.rows])).size:
            here, stop = a[at], self.sums.stop[self.rows[at], a[at]]
            low = np.where(self.sums.begins[self.rows[at], here], here, self.starts[at, here])
            reached = self.error(at, here)
            small = block[at] <= GROUP
            for chosen, step in ((small, self._short_block), (~small, self._long_block)):
                if chosen.any():
                    c = at[chosen]
                    a[c], block[c] = step(c, here[chosen], block[c], stop[chosen], low[chosen], reached[chosen])

    def _short_block(self, at: Ints, a: Ints, block: Ints, stop: Ints, low: Ints, reached: Floats) -> tuple[Ints, Ints]:
        """Entries after a, as many as are sure; return the new a and block."""
        entries = np.minimum(block, stop - a)
        wide = np.arange(1, GROUP + 1) <= entries[:, None]
        which, offset = np.nonzero(wide)
        j = a[which] + 1 + offset
        self.best_start(at[which], j, low[which], a[which])
        within = np.zeros(wide.shape, np.bool_)
        within[which, offset] = self.error(at[which], j) <= (reached + self.lam[at])[which]
        within[:, 0] = True
        sure = np.cumprod(within, axis=1).sum(axis=1)
        a = a + sure
        grow = (sure == GROUP) & (2 * (self.error(at, a) - reached) < self.lam[at])
        return a, np.where(grow, GROUP * 3 // 2, np.where(sure >= HALF_GROUP, GROUP, HALF_GROUP))

    def _long_block(self, at: Ints, a: Ints, block: Ints, stop: Ints, low: Ints, reached: Floats) -> tuple[Ints, Ints]:
        """A whole block if it is sure, else a smaller one next time; return the new a and block."""
        end = np.minimum(a + block, stop)
        self.best_start(at, end, low, a)
        left = self.error(at, end)
        sure = left <= reached + self.lam[at]
        if sure.any():
            self._inner(at[sure], a[sure], end[sure], low[sure])
        grow = 2 * (left - reached) < self.lam[at]
        after = np.where(sure, np.where(grow, block * 3 // 2, block), (end - a) * 5 // 8)
        return np.where(sure, end, a), after

    def _inner(self, at: Ints, a: Ints, end: Ints, low: Ints) -> None:
        """The entries between a and end, whose starts are known."""
        inner, high = end - a - 1, self.starts[at, end]
        stride = GROUP
        while 2 * stride <= inner.max():
            stride *= 2
        while stride >= GROUP:
            which, t = _spread(np.maximum(inner + stride, 0) // (2 * stride))
            if which.size:
                t = stride - 1 + 2 * stride * t
                line, j = at[which], a[which] + 1 + t
                left = np.where(t < stride, low[which], self.starts[line, j - stride])
                inside = t + stride < inner[which]
                right = np.where(inside, self.starts[line, np.where(inside, j + stride, j)], high[which])
                self.best_start(line, j, left, right)
            stride //= 2
        which, t = _spread(inner)
        if not which.size:
            return
        line, base = at[which], t - t % GROUP
        j = a[which] + 1 + base
        left = np.where(base > 0, self.starts[line, j - 1], low[which])
        inside = base + GROUP <= inner[which]
        right = np.where(inside, self.starts[line, np.where(inside, j + GROUP - 1, j)], high[which])
        self.best_start(line, a[which] + 1 + t, left, right)

    def by_brackets(self, low: Starts, high: Starts) -> None:
        """All entries, with starts between those of a larger lambda (low) and of a smaller one (high)."""
        u = self.sums.u[self.rows]
        j = np.ones(self.rows.size, np.int64)
        while (at := np.flatnonzero(j <= u)).size:
            here = j[at]
            last = here + HALF_GROUP - 1
            known = np.where(last <= u[at], high[at, np.minimum(last, u[at])], here)
            together = known < here
            which, offset = _spread(np.where(together, HALF_GROUP, 1))
            lows = low[at, here]
            highs = np.maximum(lows, np.where(together, known, high[at, here]))
            self.best_start(at[which], here[which] + offset, lows[which], highs[which])
            j[at] = here + np.where(together, HALF_GROUP, 1)


def _spread(counts: Ints) -> tuple[Ints, Ints]:
    """For each of counts[w] things of w: w, and 0, 1, 2, ... among them."""
    which = np.repeat(np.arange(counts.size), counts)
    return which, np.arange(which.size) - (np.cumsum(counts) - counts)[which]
