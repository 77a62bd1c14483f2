"""Bit budgets: which unit gets how many bytes.

A matrix has units (rows, or the matrix as a whole) that each choose one of a few levels; a level costs the same bytes
in every unit of a matrix, and leaves another error in each. Only levels on the lower convex hull of (bytes, error) are
ever worth taking; walking all hulls in order of error saved per byte is the greedy solution of the knapsack, optimal
at every budget that it meets exactly (Lagrangian argument; cf. SKIM, arXiv 2412.04180, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LevelArray = NDArray[np.uint8]
Assignment = list[LevelArray]
"""Of each matrix the level of every unit, uint8 [units]."""


@dataclass(frozen=True, eq=False)
class Table:
    """What one matrix can choose from.

    Attributes:
        nbytes: bytes of one unit at each level, strictly ascending.
        errors: float64 [units, levels].
    """

    nbytes: tuple[int, ...]
    errors: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Check shapes and order.

        Raises:
            ValueError: bytes that do not ascend, errors of another shape, negative or not finite.
        """
        if any(b <= a for a, b in zip(self.nbytes, self.nbytes[1:], strict=False)):
            raise ValueError(f"bytes of the levels must ascend: {self.nbytes}")
        if self.errors.ndim != 2 or self.errors.shape[1] != len(self.nbytes):
            raise ValueError(f"errors {list(self.errors.shape)} do not fit {len(self.nbytes)} levels")
        if not (np.isfinite(self.errors).all() and (self.errors >= 0).all()):
            raise ValueError("errors must be finite and not negative")


@dataclass(frozen=True, eq=False)
class Walk:
    """All upgrades of some matrices, most error saved per byte first.

    Attributes:
        units: number of units of each matrix.
        unit: of each upgrade the unit, counted through all matrices, int64 [upgrades].
        previous: the level that it comes from, uint8 [upgrades].
        level: the level that it goes to, uint8 [upgrades].
    """

    units: tuple[int, ...]
    unit: NDArray[np.int64]
    previous: LevelArray
    level: LevelArray

    def after(self, count: int) -> Assignment:
        """The levels after the first ``count`` upgrades; everything starts at level 0."""
        levels = np.zeros(sum(self.units), np.uint8)
        np.maximum.at(levels, self.unit[:count], self.level[:count])
        return self.split(levels)

    def split(self, levels: LevelArray) -> Assignment:
        """Levels of all units as one array per matrix."""
        return np.split(levels, np.cumsum(self.units)[:-1])


def hull_steps(table: Table) -> tuple[NDArray[np.int64], LevelArray, LevelArray, NDArray[np.float64]]:
    """The steps along each unit's lower convex hull, from level 0 on.

    Returns:
        unit, level left, level gone to and error saved per byte of every step; the steps of a unit are in order.
    """
    nbytes = np.array(table.nbytes, np.float64)
    everyone = np.arange(len(table.errors))
    current = np.zeros(len(table.errors), np.int64)
    units, previous, levels, gains = [everyone[:0]], [current[:0]], [current[:0]], [np.empty(0)]
    while len(everyone):
        errors = table.errors[everyone]
        ahead = np.arange(len(nbytes)) > current[:, None]
        saved = np.take_along_axis(errors, current[:, None], 1) - errors
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.where(ahead & (saved > 0), saved / (nbytes - nbytes[current][:, None]), 0.0)
        # Of levels on one line the last: the way there is one step.
        best = gain.shape[1] - 1 - np.argmax(gain[:, ::-1], axis=1)
        gained = np.take_along_axis(gain, best[:, None], 1)[:, 0]
        going = gained > 0
        previous.append(current[going])
        everyone, current = everyone[going], best[going]
        units.append(everyone)
        levels.append(current)
        gains.append(gained[going])
    unit, left, gone = (np.concatenate(parts) for parts in (units, previous, levels))
    order = np.argsort(unit, kind="stable")
    return unit[order], left[order].astype(np.uint8), gone[order].astype(np.uint8), np.concatenate(gains)[order]


def walk(tables: Sequence[Table]) -> Walk:
    """The upgrades of all matrices together; ties go to the unit that comes first."""
    units = tuple(len(table.errors) for table in tables)
    starts = np.cumsum([0, *units[:-1]])
    parts = [hull_steps(table) for table in tables]
    unit = np.concatenate([part[0] + start for part, start in zip(parts, starts, strict=True)])
    previous, level, gain = (np.concatenate([part[i] for part in parts]) for i in (1, 2, 3))
    order = np.argsort(-gain, kind="stable")
    return Walk(units, unit[order], previous[order], level[order])


def allocate(tables: Sequence[Table], fits: Callable[[Assignment], bool], misses: int = 4096) -> Assignment:
    """One budget for all matrices: as far along the walk as ``fits`` allows.

    Args:
        tables: what each matrix can choose from.
        fits: whether an assignment meets the budget; must hold for level 0 everywhere, and never begin to hold again
            after an upgrade has broken it.
        misses: how many later, smaller upgrades may be tried in vain, at a call of ``fits`` each, to spend what is
            left.

    Returns:
        The longest prefix of the upgrades that fits, found by bisection, and then every later upgrade that still
        fits, in order, until ``misses`` units could take no more.
    """
    steps = walk(tables)
    low = _bisect(len(steps.unit), lambda count: fits(steps.after(count)))
    levels = np.concatenate(steps.after(low))
    blocked: set[int] = set()
    for unit, level in zip(steps.unit[low:].tolist(), steps.level[low:].tolist(), strict=True):
        if len(blocked) >= min(len(levels), misses):
            break
        if unit in blocked:
            continue
        before, levels[unit] = levels[unit], level
        if not fits(steps.split(levels)):
            levels[unit] = before
            blocked.add(unit)
    return steps.split(levels)


def within(steps: Walk, cost: Sequence[int], budget: float) -> Assignment:
    """As far along a walk as a budget reaches.

    Args:
        steps: the walk.
        cost: what a unit of each level counts against the budget.
        budget: the most that the units may cost together.
    """
    counted = np.array(cost, np.int64)
    spent = sum(steps.units) * counted[0] + np.cumsum(counted[steps.level] - counted[steps.previous])
    return steps.after(int(np.searchsorted(spent, budget, side="right")))


def _bisect(most: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to ``most`` that fits; 0 does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
