"""The search by TPE on losses whose best point is known."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from collections.abc import Callable

import pytest

from anyquant.errors import MissingDependency
from anyquant.search.tpe import SearchResult, tpe_search

if importlib.util.find_spec("optuna") is None:
    pytest.skip("optuna is not installed", allow_module_level=True)

IMPORTANCE = (9.0, 4.0, 1.0, 0.5, 0.1)  # of five matrices
LEVELS = (4, 4, 4, 3, 4)
BAD = [0, 0, 2, 2, 3]  # bits where they are least wanted


def cost(levels: list[int]) -> float:
    return float(sum(levels))


def loss(levels: list[int]) -> float:
    return sum(w * 4.0**-level for w, level in zip(IMPORTANCE, levels, strict=True))


def search(measured: Callable[[list[int]], float] = loss, **settings: object) -> SearchResult:
    return tpe_search(LEVELS, cost, 7, measured, **{"trials": 40, "seed": 0, "start": BAD} | settings)  # type: ignore[arg-type]


def test_finds_much_of_what_there_is_to_gain() -> None:
    points = itertools.product(*map(range, LEVELS))
    least = min(loss(list(point)) for point in points if cost(list(point)) <= 7)
    found = search()
    assert found.loss == loss(found.levels)
    assert found.start_loss == loss(BAD)
    assert found.loss - least < 0.1 * (found.start_loss - least)


def test_measures_only_what_keeps_the_limit_and_nothing_twice() -> None:
    seen: list[tuple[int, ...]] = []

    def measured(levels: list[int]) -> float:
        seen.append(tuple(levels))
        return loss(levels)

    found = search(measured)
    assert seen[0] == tuple(BAD)
    assert len(set(seen)) == len(seen) == found.trials == 40
    assert all(cost(list(levels)) <= 7 for levels in seen)
    assert found.refused > 0
    assert found.loss == min(loss(list(levels)) for levels in seen)
    assert found.cost == cost(found.levels) <= 7


def test_stays_at_the_best_start() -> None:
    best = [3, 2, 1, 1, 0]
    found = search(lambda levels: float(levels != best), start=best)
    assert (found.levels, found.loss) == (best, 0)
    # Nor does it leave the start for something as good.
    assert search(lambda levels: 1.0, start=best).levels == best


def test_equal_seeds_give_equal_results() -> None:
    assert search(trials=15) == search(trials=15)
    seen: dict[int, list[list[int]]] = {0: [], 1: []}
    for seed, points in seen.items():
        search(lambda levels, points=points: points.append(levels) or loss(levels), trials=10, seed=seed)  # type: ignore[misc]
    assert seen[0] != seen[1]


@pytest.mark.parametrize("reach", [0, 1])
def test_reach_keeps_near_the_start(reach: int) -> None:
    seen: list[list[int]] = []
    found = search(lambda levels: seen.append(levels) or loss(levels), reach=reach, trials=20)  # type: ignore[func-returns-value]
    assert all(abs(level - at) <= reach for levels in seen for level, at in zip(levels, BAD, strict=True))
    if reach == 0:  # one point, measured once, however often it is drawn
        assert (found.levels, found.trials) == (BAD, 1)


def test_one_matrix() -> None:
    found = tpe_search([7], lambda levels: levels[0], 4, lambda levels: -levels[0], trials=9, seed=0, start=[0])
    assert found.levels == [4]
    assert found.trials == 5  # all there is within the limit


def test_nan_is_never_the_best() -> None:
    found = search(lambda levels: loss(levels) if levels == BAD else math.nan, trials=8)
    assert found.levels == BAD
    found = search(lambda levels: math.nan if levels == BAD else loss(levels), trials=8)
    assert found.levels != BAD
    assert found.start_loss == math.inf


def test_tells_its_progress() -> None:
    told: list[tuple[str, int, int]] = []
    search(trials=5, progress=lambda *what: told.append(what))
    assert told == [("searching", done, 5) for done in range(1, 6)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trials": 0}, "trials is 0"),
        ({"reach": -1}, "reach is -1"),
        ({"start": [0] * 4}, "4 levels to start from, but 5 matrices"),
        ({"start": [0, 0, 0, 3, 0]}, "matrix 3 starts at level 3, must be in 0..2"),
        ({"start": [3, 3, 2, 0, 0]}, "the start costs 8, more than the limit 7"),
    ],
)
def test_refuses_arguments_that_contradict_each_other(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        search(**settings)


def test_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependency, match=r"anyquant\[search\]"):
        search()
