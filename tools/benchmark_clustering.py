"""Time our exact k-means beside flash1dkmeans (a heuristic) and scikit-learn, on normally distributed rows.

python tools/benchmark_clustering.py [--rows 4096] [--columns 4096] [-k 8] [--threads 1] [--repeats 5]

Every contender gets the same rows and as many threads, each thread one row after another; repeats are interleaved and
the median counts. scikit-learn is timed on a sample of the rows and scaled.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant import clustering
from anyquant.runtime import native

Rows = NDArray[np.float32]
Run = Callable[[Rows, Rows | None], NDArray[np.float64]]
"""Rows and weights to centroids [rows, k]."""

WIDTHS = [1, 2, 4, 8, 16, 32, 64, 128, 256]


class Missing(Exception):
    """A peer that is not installed."""


def peer(module: str, package: str) -> Any:
    """The module of a peer, or how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(
            f"{package} is not installed: pip install 'anyquant[benchmark]' or pip install {package}"
        ) from error


def ours(k: int) -> Run:
    """Our exact clustering, a chunk of rows at a time."""
    return lambda rows, weights: clustering.kmeans(rows, weights, k)


def flash(k: int) -> Run:
    """flash1dkmeans, row by row, with the random state that makes it repeatable."""
    kmeans_1d = peer("flash1dkmeans", "flash1dkmeans").kmeans_1d

    def run(rows: Rows, weights: Rows | None) -> NDArray[np.float64]:
        return np.array([kmeans_1d(row, k, sample_weights=weights, random_state=0)[0] for row in rows], np.float64)

    return run


def scikit(k: int, n_init: Any) -> Run:
    """scikit-learn's KMeans, row by row, without threads of its own."""
    model = peer("sklearn.cluster", "scikit-learn").KMeans
    limits = peer("threadpoolctl", "threadpoolctl").threadpool_limits

    def run(rows: Rows, weights: Rows | None) -> NDArray[np.float64]:
        with limits(1):
            fits = [model(k, n_init=n_init, random_state=0).fit(row[:, None], sample_weight=weights) for row in rows]
        return np.array([fit.cluster_centers_[:, 0] for fit in fits], np.float64)

    return run


def seconds(run: Run, rows: Rows, weights: Rows | None, pool: ThreadPoolExecutor, threads: int) -> float:
    """Seconds for all rows, spread over the threads."""
    chunks = np.array_split(rows, threads * 4)
    start = time.perf_counter()
    for _ in pool.map(lambda chunk: run(chunk, weights), [chunk for chunk in chunks if len(chunk)]):
        pass
    return time.perf_counter() - start


def left(rows: Rows, weights: Rows | None, centroids: NDArray[np.float64]) -> float:
    """The mean over the rows of error / least error."""
    k = centroids.shape[1]
    least = clustering.kmeans_errors(rows, weights, [k])[:, 0]
    ratios = []
    for row, entries, best in zip(rows.astype(np.float64), np.sort(centroids, axis=1), least, strict=True):
        nearest = row - entries[np.searchsorted((entries[1:] + entries[:-1]) / 2, row)]
        ratios.append(float((nearest**2 * (1 if weights is None else weights)).sum() / best))
    return statistics.fmean(ratios)


def compare(rows: Rows, weights: Rows | None, arguments: argparse.Namespace) -> None:
    """Print the table of one kind of weights."""
    k, sample = arguments.k, rows[: arguments.sample]
    contenders: dict[str, tuple[Run, Rows]] = {"anyquant (exact)": (ours(k), rows)}
    makers: list[tuple[str, Callable[[], Run], Rows]] = [
        ("flash1dkmeans (heuristic)", lambda: flash(k), rows),
        ("scikit-learn, n_init auto", lambda: scikit(k, "auto"), sample),
        ("scikit-learn, n_init 10", lambda: scikit(k, 10), sample),
    ]
    for name, make, some in makers:
        try:
            contenders[name] = make(), some
        except Missing as missing:
            print(f"{name}: {missing}")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with ThreadPoolExecutor(arguments.threads) as pool:
        for run, _ in contenders.values():
            run(rows[:2], weights)  # compiles and loads what is not yet
        for _ in range(arguments.repeats):
            for name, (run, some) in contenders.items():
                times[name].append(seconds(run, some, weights, pool, arguments.threads) * len(rows) / len(some))
    base = statistics.median(times["anyquant (exact)"])
    print(f"{'':28}{'s':>9}{'ms/row':>9}{'times ours':>12}{'error/least':>13}")
    for name, (run, some) in contenders.items():
        median, few = statistics.median(times[name]), rows[: min(len(rows), 8)]
        note = "" if len(some) == len(rows) else f"   from {len(some)} rows, scaled"
        print(
            f"{name:28}{median:9.2f}{median / len(rows) * 1e3:9.3f}{median / base:12.2f}"
            f"{left(few, weights, run(few, weights)):13.6f}{note}"
        )


def all_widths(threads: int, repeats: int) -> None:
    """Print what the errors for every width of 0 to 8 bits cost at once, as the skim method needs them."""
    rng = np.random.default_rng(1)
    print(f"\nerrors of all of k = {WIDTHS}, weighted, {threads} thread{'s' if threads > 1 else ''}")
    for columns in (576, 1536, 4096):
        rows = rng.standard_normal((2_000_000 // columns // 4, columns), dtype=np.float32)
        weights = rng.lognormal(0, 1.5, columns).astype(np.float32)
        with ThreadPoolExecutor(threads) as pool:
            times = [
                seconds(lambda part, w: clustering.kmeans_errors(part, w, WIDTHS), rows, weights, pool, threads)
                for _ in range(repeats)
            ]
        print(f"rows of {columns:5}: {statistics.median(times) / len(rows) * 1e3:8.3f} ms/row")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("-k", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sample", type=int, default=16, help="rows for scikit-learn")
    arguments = parser.parse_args()
    if not native.available():
        print(f"NumPy does our work, many times slower: {native.why_not()}")
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((arguments.rows, arguments.columns), dtype=np.float32)
    weights = rng.lognormal(0, 1, arguments.columns).astype(np.float32)
    for name, chosen in (("unweighted", None), ("weighted", weights)):
        print(
            f"\n{arguments.rows} rows of {arguments.columns}, k = {arguments.k}, {name}, {arguments.threads} "
            f"thread{'s' if arguments.threads > 1 else ''}, median of {arguments.repeats} interleaved repeats"
        )
        compare(rows, chosen, arguments)
    all_widths(arguments.threads, arguments.repeats)


if __name__ == "__main__":
    main()
