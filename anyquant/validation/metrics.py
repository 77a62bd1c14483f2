"""Comparing two sets of logits, window by window: sums in float64, rows in chunks, on all cores.

All logarithms are natural: losses and divergences are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from anyquant.validation.results import LogitIndex, TopDifference
from anyquant.workers import default_threads, in_order

Floats = NDArray[np.float64]
_CHUNK = 1 << 16
"""Logits held in float64 at a time by each thread: 512 KiB."""

T = TypeVar("T")


def _over_rows(function: Callable[[slice], T], logits: NDArray[np.float32]) -> list[T]:
    """The function's results for each chunk of rows, in order."""
    rows = max(1, _CHUNK // max(1, logits.shape[1]))
    chunks = [(slice(start, start + rows),) for start in range(0, logits.shape[0], rows)]
    return list(in_order(function, chunks, default_threads()))


def log_normalizers(logits: NDArray[np.float32]) -> Floats:
    """log(sum(exp(logits))) of every row.

    Args:
        logits: [n, vocabulary] float32.

    Returns:
        [n] float64; NaN for a row that holds NaN or +Inf.
    """
    result = np.empty(logits.shape[0])

    def of(rows: slice) -> None:
        values = logits[rows].astype(np.float64)
        top = values.max(axis=1)
        with np.errstate(invalid="ignore"):
            result[rows] = top + np.log(np.exp(values - top[:, None]).sum(axis=1))

    _over_rows(of, logits)
    return result


def token_losses(logits: NDArray[np.float32], ids: NDArray[np.int64], normalizers: Floats | None = None) -> Floats:
    """Negative log-probability of each token given those before it.

    Args:
        logits: [n, vocabulary] float32.
        ids: [n]; the first is only context.
        normalizers: of :func:`log_normalizers`, if at hand.

    Returns:
        [n - 1] float64, nats. Perplexity is exp of their mean.
    """
    if normalizers is None:
        normalizers = log_normalizers(logits)
    rows = np.arange(len(ids) - 1)
    return normalizers[:-1] - logits[rows, ids[1:]].astype(np.float64)


@dataclass(frozen=True)
class WindowComparison:
    """Two sets of logits of one window.

    Attributes:
        kl: [n] float64, KL(reference || candidate) per token; NaN where the candidate is not finite.
        differs: [n] bool, the first choices differ.
        differences: those positions.
        max_abs_logit: largest |difference|; NaN if any is.
        max_abs_at: where that is.
        logit_scale: largest |logit| of the reference.
        nonfinite: candidate logits that are NaN or Inf.
    """

    kl: Floats
    differs: NDArray[np.bool_]
    differences: tuple[TopDifference, ...]
    max_abs_logit: float
    max_abs_at: LogitIndex
    logit_scale: float
    nonfinite: int


def compare_logits(
    reference: NDArray[np.float32],
    candidate: NDArray[np.float32],
    *,
    window: int = 0,
    tie_tolerance: float = 0.0,
    reference_normalizers: Floats | None = None,
    candidate_normalizers: Floats | None = None,
) -> WindowComparison:
    """Compare logits of the same tokens.

    Args:
        reference: [n, vocabulary] float32.
        candidate: the same shape.
        window: number of the window, for where differences are.
        tie_tolerance: first choices that differ are a near tie where the reference's gap between them is below.
        reference_normalizers: of :func:`log_normalizers`, if at hand.
        candidate_normalizers: likewise.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"logits of shape {reference.shape} cannot be compared with {candidate.shape}")
    lse_p = log_normalizers(reference) if reference_normalizers is None else reference_normalizers
    lse_q = log_normalizers(candidate) if candidate_normalizers is None else candidate_normalizers
    kl = np.empty(reference.shape[0])

    def of(rows: slice) -> tuple[float, int, float, int]:
        with np.errstate(invalid="ignore", over="ignore"):
            p, q = reference[rows].astype(np.float64), candidate[rows].astype(np.float64)
            apart = np.abs(p - q).ravel()
            worst = int(apart.argmax())  # a NaN, if there is one, which must never look like a small difference
            at = rows.start * reference.shape[1] + worst
            found = float(apart[worst]), at, float(np.abs(p).max()), int(np.count_nonzero(~np.isfinite(q)))
            p -= lse_p[rows, None]
            q -= lse_q[rows, None]
            # float64 rounding can leave -1e-16 where the two are equal.
            kl[rows] = np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0)
        return found

    largest, at, scale, bad = (np.array(part) for part in zip(*_over_rows(of, reference), strict=True))
    worst = int(largest.argmax())
    top_p, top_q = reference.argmax(axis=1), candidate.argmax(axis=1)
    differs = top_p != top_q
    differences = []
    for position in np.flatnonzero(differs):
        a, b = int(top_p[position]), int(top_q[position])
        gap = float(reference[position, a]) - float(reference[position, b])
        differences.append(TopDifference(window, int(position), a, b, gap, gap < tie_tolerance))
    return WindowComparison(
        kl,
        differs,
        tuple(differences),
        float(largest[worst]),
        LogitIndex(window, *divmod(int(at[worst]), reference.shape[1])),
        float(scale.max()),
        int(bad.sum()),
    )
