"""Scales and zero points of affine blocks: what their grids are, and a search for better ones.

A block of n weights is rounded to (q - zero) * scale with q in 0..2**bits - 1, zero one of these, and scale an FP16.
Arrays hold many blocks side by side, [n, blocks]: one weight of each in a row, so that NumPy works along long rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from anyquant.ir import FP16_MAX, AffineSpec

Floats = NDArray[np.float32]

_FP16_LEAST = 2.0**-24
_WORK = 1 << 15  # numbers handled at a time: a few arrays of as many stay in the cache

# Scales tried, relative to that of the whole range. 8 bits lose nothing that a search could win back.
_FINE = {2: np.linspace(1.0, 0.4, 13), 4: np.linspace(1.05, 0.6, 10), 8: np.empty(0)}
_COARSE = {2: np.array([0.85, 0.7, 0.55]), 4: np.array([0.9, 0.8]), 8: np.empty(0)}
_MOVES = (-1, 0, 1)


@dataclass(frozen=True)
class Kind:
    """What blocks there can be.

    Attributes:
        bits: of a code: 2, 4 or 8.
        symmetric: whether zero points are 2**(bits - 1), and scales have a sign: the largest weight is code 0.
    """

    bits: int
    symmetric: bool = False

    @property
    def most(self) -> int:
        """The greatest code."""
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class Grid:
    """The grids of some blocks.

    Attributes:
        scale: float16 [blocks].
        zero: uint8 [blocks].
    """

    scale: NDArray[np.float16]
    zero: NDArray[np.uint8]

    def steps(self, kind: Kind) -> Steps:
        """What rounding works with."""
        zero = self.zero.astype(np.float32)
        return Steps(self.scale.astype(np.float32), inverse(self.scale), -zero, kind.most - zero)


@dataclass(frozen=True)
class Steps:
    """A grid in FP32.

    Attributes:
        scale: float32 [blocks].
        inverse: of the scale, 0 for 0.
        low: the least multiple of the scale, minus the zero point.
        high: the greatest.
    """

    scale: Floats
    inverse: Floats
    low: Floats
    high: Floats

    def nearest(self, values: Floats, out: Floats | None = None) -> Floats:
        """The multiples of the scale, float32 [..., blocks], that come nearest to values [..., blocks]."""
        multiples = np.multiply(values, self.inverse, out=out)
        np.rint(multiples, out=multiples)
        np.maximum(multiples, self.low, out=multiples)
        np.minimum(multiples, self.high, out=multiples)
        return multiples


def inverse(scale: NDArray[np.float16]) -> Floats:
    """1 / scale in FP32, and 0 for 0."""
    result: Floats = np.divide(1, scale, out=np.zeros(scale.shape, np.float32), where=scale != 0, dtype=np.float32)
    return result


def side_by_side(part: Floats, spec: AffineSpec) -> Floats:
    """Float32 [rows, in] as [block, rows * blocks], a row's blocks next to each other.

    A last block that is not full is filled up with its last weight, which changes no range.
    """
    return _blocks(part, spec, "edge")


def counts_side_by_side(counts: Floats, spec: AffineSpec, rows: int) -> Floats:
    """The same of what errors count, float32 [rows, in], or [1, in] for all rows; nothing beyond the last column."""
    beside = _blocks(counts, spec, "constant")
    return beside if len(counts) == rows else np.tile(beside, rows)


def _blocks(part: Floats, spec: AffineSpec, fill: Literal["edge", "constant"]) -> Floats:
    missing = spec.blocks * spec.block - spec.shape[1]
    padded = np.pad(part, ((0, 0), (0, missing)), mode=fill) if missing else part
    return np.ascontiguousarray(padded.reshape(-1, spec.block).T)


def full_range(values: Floats, kind: Kind) -> Grid:
    """The grids that reach from the least to the greatest weight of each block, and to zero.

    All weights of one value, if FP16 holds it, are that value: the scale is then its size, the code one step from zero.

    Args:
        values: float32 [n, blocks], within FP16.
        kind: of the blocks.
    """
    low, high = values.min(axis=0), values.max(axis=0)
    if kind.symmetric:
        middle = 1 << (kind.bits - 1)
        scale = _to_half(np.where(-low >= high, low, high) / np.float32(-middle))
        return Grid(scale, np.full(scale.shape, middle, np.uint8))
    constant = low == high
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    reach = high - low
    scale = _to_half(np.where(constant, reach, reach / np.float32(kind.most)))
    return Grid(scale, np.clip(np.rint(-low * inverse(scale)), 0, kind.most).astype(np.uint8))


def search(values: Floats, counts: Floats, kind: Kind, *, coarse: bool = False) -> tuple[Grid, NDArray[np.float32]]:
    """The grids with the least weighted squared error of rounding, of those tried.

    Tried are shrunk scales with zero points one code up and down, and at last the scale that is best for the codes
    found (least squares, rounded to FP16). What is returned is never worse than :func:`full_range`.

    Args:
        values: float32 [n, blocks], within FP16.
        counts: float32 [n, blocks] or [n, 1]: what the squared error of each weight counts.
        kind: of the blocks.
        coarse: whether to try few scales and no other zero points, and to fit none.

    Returns:
        The grids, and the weighted squared error of each block.
    """
    blocks = values.shape[1]
    grid = Grid(np.empty(blocks, np.float16), np.empty(blocks, np.uint8))
    errors = np.empty(blocks, np.float32)
    step = max(1, _WORK // len(values))
    for start in range(0, blocks, step):
        part = slice(start, min(start + step, blocks))
        weights = counts if counts.shape[1] == 1 else np.ascontiguousarray(counts[:, part])
        found = _Search(np.ascontiguousarray(values[:, part]), weights, kind)
        found.run(coarse)
        grid.scale[part], grid.zero[part], errors[part] = found.grid.scale, found.grid.zero, found.errors
    return grid, errors


def full_range_errors(values: Floats, counts: Floats, kind: Kind) -> NDArray[np.float32]:
    """The weighted squared error of each block with :func:`full_range`; arguments as for :func:`search`."""
    errors = np.empty(values.shape[1], np.float32)
    step = max(1, _WORK // len(values))
    for start in range(0, values.shape[1], step):
        part = slice(start, start + step)
        weights = counts if counts.shape[1] == 1 else counts[:, part]
        errors[part] = _Search(np.ascontiguousarray(values[:, part]), weights, kind).errors
    return errors


class _Search:
    """The search for the grids of some blocks; ``grid`` and ``errors`` are the best so far."""

    def __init__(self, values: Floats, counts: Floats, kind: Kind) -> None:
        self._values, self._counts, self._kind = values, counts, kind
        self._multiples, self._differences = np.empty_like(values), np.empty_like(values)
        self.grid = full_range(values, kind)
        self.errors = self._measure(self.grid)

    def run(self, coarse: bool) -> None:
        """Try what there is to try."""
        whole, kind = self.grid, self._kind
        moves = (0,) if coarse or kind.symmetric else _MOVES
        zeros = [np.clip(whole.zero.astype(np.int16) + move, 0, kind.most).astype(np.uint8) for move in moves]
        for shrunk in (_COARSE if coarse else _FINE)[kind.bits]:
            scale = _to_half(whole.scale.astype(np.float32) * np.float32(shrunk))
            for zero in zeros:
                self._try(Grid(scale, zero))
        if not coarse:
            self._fit()

    def _measure(self, grid: Grid) -> NDArray[np.float32]:
        steps, difference = grid.steps(self._kind), self._differences
        np.multiply(steps.nearest(self._values, self._multiples), steps.scale, out=difference)
        difference -= self._values
        difference *= difference
        difference *= self._counts
        errors: NDArray[np.float32] = difference.sum(axis=0)
        return errors

    def _try(self, grid: Grid) -> None:
        errors = self._measure(grid)
        better = errors < self.errors
        self.grid = Grid(np.where(better, grid.scale, self.grid.scale), np.where(better, grid.zero, self.grid.zero))
        self.errors = np.where(better, errors, self.errors)

    def _fit(self) -> None:
        """The scale that minimizes the error with the codes as they are, if with it and new codes the error is less."""
        multiples = self.grid.steps(self._kind).nearest(self._values, self._multiples)
        counted = np.multiply(multiples, self._counts, out=self._differences)
        along, power = (counted * self._values).sum(axis=0), (counted * multiples).sum(axis=0)
        scale = np.divide(along, power, out=self.grid.scale.astype(np.float32), where=power > 0)
        self._try(Grid(_to_half(scale), self.grid.zero))


def _to_half(scale: Floats) -> NDArray[np.float16]:
    """Rounded to FP16, within its range; what is not 0 does not become 0."""
    least = np.copysign(np.float32(_FP16_LEAST), scale)
    scale = np.where((np.abs(scale) < _FP16_LEAST) & (scale != 0), least, scale)
    return np.clip(scale, -FP16_MAX, FP16_MAX).astype(np.float16)
