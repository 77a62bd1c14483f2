"""Threads: how many, and units of work on them, their results in order and few at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def default_threads() -> int:
    """Threads where none are asked for: OMP_NUM_THREADS, or the cores this process may use."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return int(limit) if limit.isdigit() and int(limit) else len(os.sched_getaffinity(0))


def default_workers() -> int:
    """Units of work at a time where no number is asked for; each is a matrix in memory."""
    return min(8, len(os.sched_getaffinity(0)))


def in_order(function: Callable[..., T], arguments: Sequence[tuple[Any, ...]], workers: int) -> Iterator[T]:
    """Results of the calls in order, computed lazily on ``workers`` threads (NumPy lets go of the interpreter)."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for each in arguments:
                # Every result that waits is a matrix in memory: none is begun before there is room for it.
                if len(waiting) == workers:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(function, *each))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
