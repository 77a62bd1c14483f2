"""Bit budgets: which tensor gets how many bytes.

Each tensor has choices with bytes and errors. Only choices on the lower convex hull of (bytes, error)
are ever worth taking; walking all hulls in order of error saved per byte is the greedy solution of the
knapsack, optimal at every budget that it meets exactly (Lagrangian argument; cf. SKIM, arXiv 2412.04180, section 3).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One form of a tensor: its bytes and the error that it leaves."""

    nbytes: int
    error: float


@dataclass(frozen=True)
class Upgrade:
    """One step of the walk: ``tensor`` goes to its choice number ``choice``."""

    tensor: int
    choice: int


def convex_hull(choices: Sequence[Choice]) -> list[int]:
    """Indices of the lower convex hull of (bytes, error), from the fewest bytes on; errors strictly fall."""
    order = sorted(range(len(choices)), key=lambda i: (choices[i].nbytes, choices[i].error, i))
    hull: list[int] = []
    for i in order:
        if hull and choices[i].error >= choices[hull[-1]].error:
            continue
        while len(hull) > 1 and _gain(choices, hull[-2], hull[-1]) <= _gain(choices, hull[-2], i):
            hull.pop()
        hull.append(i)
    return hull


def _gain(choices: Sequence[Choice], a: int, b: int) -> float:
    """Error saved per byte on the way from choice a to choice b."""
    nbytes = choices[b].nbytes - choices[a].nbytes
    return (choices[a].error - choices[b].error) / nbytes if nbytes else float("inf")


def upgrades(tensors: Sequence[Sequence[Choice]]) -> tuple[list[int], list[Upgrade]]:
    """The cheapest choice of every tensor, and all upgrades from there, most error saved per byte first.

    Ties go to the tensor that comes first, so the result depends on nothing but the numbers.
    """
    hulls = [convex_hull(choices) for choices in tensors]
    heap: list[tuple[float, int, int]] = []

    def push(tensor: int, step: int) -> None:
        hull = hulls[tensor]
        if step < len(hull):
            heapq.heappush(heap, (-_gain(tensors[tensor], hull[step - 1], hull[step]), tensor, step))

    for tensor in range(len(tensors)):
        push(tensor, 1)
    steps = []
    while heap:
        _, tensor, step = heapq.heappop(heap)
        steps.append(Upgrade(tensor, hulls[tensor][step]))
        push(tensor, step + 1)
    return [hull[0] for hull in hulls], steps


def allocate(tensors: Sequence[Sequence[Choice]], fits: Callable[[list[int]], bool], *, fill: bool = True) -> list[int]:
    """The choice of each tensor, as far along the upgrades as ``fits`` allows.

    Args:
        tensors: the choices of each tensor.
        fits: whether an assignment (choice per tensor) meets the budget; must hold for the cheapest
            assignment, and never begin to hold again after an upgrade has broken it.
        fill: whether to spend what is left on later, smaller upgrades; costs a call of ``fits`` for each tensor.

    Returns:
        Choice index per tensor: the longest prefix of the upgrades that fits, found by bisection; with
        ``fill`` also every later upgrade that still fits, in order.
    """
    cheapest, steps = upgrades(tensors)

    def after(count: int) -> list[int]:
        chosen = list(cheapest)
        for step in steps[:count]:
            chosen[step.tensor] = step.choice
        return chosen

    low, high = 0, len(steps)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(after(middle)):
            low = middle
        else:
            high = middle - 1
    chosen, blocked = after(low), set()
    for step in steps[low:] if fill else ():
        if step.tensor in blocked:
            continue
        trial = list(chosen)
        trial[step.tensor] = step.choice
        if fits(trial):
            chosen = trial
        else:
            blocked.add(step.tensor)
    return chosen
