"""k-means without the compiled library: the steps of kernels/core/kmeans.cpp, in NumPy, with the same bytes.

Names and order of operations follow the C++, where the method is explained: change both together. A row searches by
itself, as a generator; what it asks for, its entries for one lambda, is done for many rows at once
(:mod:`anyquant.clustering.lockstep`).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyquant.clustering.lockstep import Request, Starts, Sums, answer

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Search = Generator[Request, tuple[Starts, float], None]

BRACKET = 8
COARSE = 2.0**-22
COARSE_MASS = 2.0**-26
PATIENCE = 3
FLOOR = 2.0**-50
MOST_PIECES = 256
ELEMENTS = 1 << 19
"""Elements of the rows that go together."""


def kmeans_errors(
    values: NDArray[np.float32], weights: NDArray[np.float32] | None, ks: NDArray[np.int32]
) -> NDArray[np.float64]:
    """:func:`anyquant.clustering.kmeans_errors` for arguments that it has checked."""
    errors = np.zeros((values.shape[0], ks.size))
    _run(values, weights, ks.tolist(), errors, None)
    return errors


def kmeans(values: NDArray[np.float32], weights: NDArray[np.float32] | None, k: int) -> NDArray[np.float64]:
    """:func:`anyquant.clustering.kmeans` for arguments that it has checked."""
    centroids = np.zeros((values.shape[0], k))
    _run(values, weights, [k], None, centroids)
    return centroids


def assign(values: NDArray[np.float32], codebook: NDArray[np.float32]) -> NDArray[np.uint8]:
    """:func:`anyquant.clustering.assign` for arguments that it has checked."""
    codes = np.empty(values.shape, np.uint8)
    for row, entries in enumerate(codebook.astype(np.float64)):
        distinct, code = np.unique(entries, return_index=True)
        middles = (distinct[:-1] + distinct[1:]) / 2
        codes[row] = code[np.searchsorted(middles, values[row].astype(np.float64), side="left")]
    return codes


def _run(
    values: NDArray[np.float32],
    weights: NDArray[np.float32] | None,
    ks: list[int],
    errors: Floats | None,
    centroids: Floats | None,
) -> None:
    """Fill errors [rows, ks], or centroids [rows, k]."""
    rows, n = values.shape
    step = max(1, ELEMENTS // n)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        sums = Sums.empty(stop - start, n)
        searches = [
            _cluster(
                _Row(sums, i, values[row], weights[row] if weights is not None and weights.ndim == 2 else weights),
                ks,
                None if errors is None else errors[row],
                None if centroids is None else centroids[row],
            )
            for i, row in enumerate(range(start, stop))
        ]
        asked = {i: request for i, search in enumerate(searches) if (request := next(search, None))}
        while asked:
            for i, found in answer(sums, asked).items():
                try:
                    asked[i] = searches[i].send(found)
                except StopIteration:
                    del asked[i]


class _Row:
    """Distinct values of a row, their weights, and its line of the prefix sums."""

    def __init__(
        self, sums: Sums, index: int, values: NDArray[np.float32], weights: NDArray[np.float32] | None
    ) -> None:
        n = values.size
        heaviest = 0.0 if weights is None else float(weights.max())
        if weights is None or heaviest == 0:
            heaviest, weights = 1.0, np.ones(n, np.float32)
        kept = weights > 0
        x, w = values[kept] + np.float32(0), weights[kept]  # -0 becomes 0
        order = np.argsort(x, kind="stable")
        x, w = x[order], w[order]
        first = np.concatenate([[True], x[1:] != x[:-1]])
        self.v: Floats = x[first].astype(np.float64)
        self.w: Floats = np.bincount(np.cumsum(first) - 1, w.astype(np.float64)).astype(np.float64)
        self.u = self.v.size
        self.floor = heaviest * n * FLOOR
        self.sums, self.index = sums, index
        self.cuts = [0, self.u]
        self.sum_up()

    def sum_up(self) -> None:
        """W, S and Q, for the cuts as they are."""
        weight = np.where(self.w > self.floor, self.w, self.floor)
        y = np.empty(self.u)
        for start, end in zip(self.cuts[:-1], self.cuts[1:], strict=True):
            shifted = self.v[start:end] - self.v[start]
            part = np.cumsum(weight[start:end])[-1]
            moment = np.cumsum(weight[start:end] * shifted)[-1]
            y[start:end] = self.v[start:end] - (self.v[start] + moment / part)
        wy = weight * y
        for line, summands in ((self.sums.W, weight), (self.sums.S, wy), (self.sums.Q, wy * y)):
            line[self.index, 0] = 0
            line[self.index, 1 : self.u + 1] = np.cumsum(summands)
        self.sums.set_pieces(self.index, self.cuts)
        mass = float(self.sums.W[self.index, self.u])
        self.coarse = max(mass * float((y * y).max()) * COARSE_MASS, self.total() * COARSE)

    def total(self) -> float:
        return float(self.sums.Q[self.index, self.u])

    def measure(self, bounds: Ints, centroids: Floats | None) -> float:
        """The error of the clusters, from the values themselves, and their centroids."""
        cluster = np.repeat(np.arange(bounds.size - 1), np.diff(bounds))
        first, last = self.v[bounds[:-1]], self.v[bounds[1:] - 1]
        mass = np.bincount(cluster, self.w)
        moment = np.bincount(cluster, self.w * (self.v - first[cluster]))
        means = first + moment / mass
        means = np.where(means < last, means, last)
        d = self.v - means[cluster]
        if centroids is not None:
            centroids[:] = means
        return float(np.cumsum(np.bincount(cluster, self.w * d * d))[-1])

    def cut(self, error: float) -> bool:
        """Cut where no clustering of at most this error joins two values; whether there are new cuts."""
        before = len(self.cuts)
        d = np.diff(self.v)
        alone = d * d * (self.w[:-1] * self.w[1:] / (self.w[:-1] + self.w[1:]))
        inner = np.flatnonzero(alone > error * (1 + 2.0**-20))[: MOST_PIECES - 1] + 1
        self.cuts = [0, *inner.tolist(), self.u]
        if len(self.cuts) == before:
            return False
        self.sum_up()
        return True


@dataclass
class _Found:
    """What a lambda led to: as many clusters, their gain, and the starts; or an end that needs no search."""

    lam: float
    count: int
    gain: float
    starts: Starts
    sought: bool

    def path(self) -> Ints:
        """The starts of the clusters, and u."""
        path = np.zeros(self.count + 1, np.int64)
        j = self.starts.size - 1
        for c in range(self.count, -1, -1):
            path[c] = j
            j = self.starts[j]
        return path


def _every_value_alone(row: _Row) -> _Found:
    return _Found(0.0, row.u, row.total(), np.maximum(np.arange(row.u + 1) - 1, 0), False)


def _every_piece_whole(row: _Row) -> _Found:
    starts = np.concatenate([[0], np.repeat(row.cuts[:-1], np.diff(row.cuts))])
    S, W = row.sums.S[row.index], row.sums.W[row.index]
    gain = 0.0
    for start, end in zip(row.cuts[:-1], row.cuts[1:], strict=True):
        ds = float(S[end] - S[start])
        gain += ds * ds / float(W[end] - W[start])
    return _Found(float("inf"), len(row.cuts) - 1, gain, starts, False)


def _guess(row: _Row, below: _Found, above: _Found, k: int, misses: int, chord: bool) -> tuple[float, int, bool]:
    """A lambda that might lead to k clusters, the misses so far, and whether it is the slope of the chord."""
    few, many, want, u = float(below.count), float(above.count), float(k), float(row.u)
    total, slope = row.total(), (above.gain - below.gain) / (many - few)
    if below.sought and above.sought:
        lam = slope * (2 * few * few * many * many) / ((few + many) * want * want * want)
        chord = chord or above.count - below.count == 2
    elif below.sought:
        left, ratio, beyond = (u - want) / (u - few), few / want, few / (want + ((1 << misses) - 1))
        if want >= 1.25 * few:
            lam = 2 * (total - below.gain) * (ratio * ratio * left) / want
        else:
            lam = below.lam * (beyond * beyond * beyond * beyond * left)
    elif above.sought:
        ratio = many / want
        lam = above.lam * (ratio * ratio * ratio)
    else:
        lam = 5 * total * (u - want) / (u * want * want * (want + 2))
    if not below.sought or not above.sought:
        chord = chord or misses == PATIENCE
        misses = min(misses + 1, PATIENCE)
    chord = chord or not above.lam < lam < below.lam
    return (slope if chord else lam), misses, chord


def _cross(below: _Found, above: _Found, k: int) -> Ints:
    """A path of k clusters from a best one of fewer and a best one of more."""
    few, many = below.path(), above.path()
    ahead = k - below.count
    t = 0
    while many[t + ahead + 1] > few[t + 1]:
        t += 1
    return np.concatenate([many[: t + ahead + 1], few[t + 1 :]])


def _search(row: _Row, k: int, ends: list[_Found]) -> Generator[Request, tuple[Starts, float], Ints]:
    """Find the best k < u clusters, narrowing down the two ends; return their bounds."""
    chord, misses = False, 0
    while ends[0].count != k and ends[1].count != k:
        below, above = ends
        lam, misses, chord = _guess(row, below, above, k, misses, chord)
        if not above.lam < lam < below.lam:
            return _cross(below, above, k)
        narrow = row.u * (above.count - below.count) <= BRACKET * below.count * above.count
        starts, g = yield Request(lam, below.starts if narrow else None, above.starts if narrow else None)
        count, j = 0, row.u
        while j:
            j = int(starts[j])
            count += 1
        missed = count <= below.count or count >= above.count
        if missed and chord:
            return _cross(below, above, k)
        chord = missed and below.sought and above.sought
        if below.count <= count <= above.count:
            ends[0 if count <= k else 1] = _Found(lam, count, g + lam * count, starts, True)
    return ends[0 if ends[0].count == k else 1].path()


def _cluster(row: _Row, ks: list[int], errors: Floats | None, centroids: Floats | None) -> Search:
    """Everything for one row: the errors for all ks, or the centroids for one."""
    ends = [_every_piece_whole(row), _every_value_alone(row)]
    bound = float("inf")
    for q, k in enumerate(ks):
        if k >= row.u:
            if centroids is not None:
                centroids[:] = row.v[np.minimum(np.arange(k), row.u - 1)]
            continue
        if ends[1].count < k:
            ends = [ends[1], _every_value_alone(row)]
        error = row.measure((yield from _search(row, k, ends)), centroids)
        bound = min(bound, error)
        while error < row.coarse and row.cut(bound):
            ends = [_every_piece_whole(row), _every_value_alone(row)]
            error = row.measure((yield from _search(row, k, ends)), centroids)
            bound = min(bound, error)
        if errors is not None:
            errors[q] = error
