"""Times on a GPU: each contender a CUDA graph of calls, whose replays take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]
LEAST_CALLS = 20  # of a graph, so that what a replay costs itself does not count
WAIT_CYCLES = 400_000  # a fifth of a millisecond or so


@dataclass(frozen=True)
class Time:
    """What a call takes.

    Attributes:
        seconds: the median of all rounds.
        spread: between the quartiles, as a part of it.
    """

    seconds: float
    spread: float


class Stopwatch(Protocol):
    """Times contenders beside each other."""

    def __call__(self, contenders: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, Time | str]:
        """Name -> what one of its calls takes, or why it has no time. Its calls are made in turn."""


def on_gpu(contenders: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, Time | str]:
    """See Stopwatch: by the GPU's own events."""
    found: dict[str, Time | str] = {}
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, calls in contenders.items():
        try:
            graphs[name] = _captured(calls)
        except Exception as error:  # of a peer, whatever it is
            found[name] = f"{type(error).__name__}: {error}"
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    # While the GPU waits, the graph is queued: how long the host takes for that does not count.
    wait = torch.cuda._sleep
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for turn in range(rounds + 1):
        for name, (graph, count) in graphs.items():
            wait(WAIT_CYCLES)  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:  # the first one loads what was never used
                samples[name].append(begin.elapsed_time(end) / 1e3 / count)
    return found | {name: summary(taken) for name, taken in samples.items()}


def summary(seconds: Sequence[float]) -> Time:
    """Median and spread of some times."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Time(median, (high - low) / median)


def _captured(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    home, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(home)
    with torch.cuda.stream(stream):
        for call in [*calls, calls[0]]:  # what is compiled, tuned or allocated is so before
            call()
    home.wait_stream(stream)
    torch.cuda.synchronize()
    repeats = -(-LEAST_CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                for call in calls:
                    call()
    except Exception:
        torch.cuda.set_stream(home)  # a capture that failed leaves its own behind
        raise
    return graph, repeats * len(calls)
