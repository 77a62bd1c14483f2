"""Errors by resampling windows: tokens of one text window depend on each other, windows hardly do.

The same resamples serve every number of a validation, so that differences between models are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from anyquant.reporting.estimate import Estimate

Floats = NDArray[np.float64]


class Bootstrap:
    """Resamples of the windows.

    Attributes:
        weights: [resamples, windows] int64, how often each window was drawn.
    """

    def __init__(self, windows: int, resamples: int = 1000, seed: int = 0) -> None:
        """Draw the resamples.

        Args:
            windows: number of windows.
            resamples: how often to draw ``windows`` of them with replacement.
            seed: of the generator.
        """
        rng = np.random.default_rng(seed)
        drawn = rng.integers(0, windows, size=(resamples, windows))
        self.windows = windows
        self.weights = np.stack([np.bincount(row, minlength=windows) for row in drawn])

    def estimate(self, value: float, n: int, samples: Floats) -> Estimate:
        """An estimate from the statistic's values over the resamples; without error where there is one window."""
        if self.windows < 2 or not np.all(np.isfinite(samples)):
            return Estimate(float(value), n)
        low, high = np.quantile(samples, [0.025, 0.975])
        return Estimate(float(value), n, float(samples.std(ddof=1)), float(low), float(high))

    def means(self, per_window: Sequence[NDArray[np.generic]]) -> Floats:
        """The mean over tokens for every resample, [resamples].

        Args:
            per_window: for every window the values of its tokens.
        """
        sums = np.array([np.asarray(v, dtype=np.float64).sum() for v in per_window])
        counts = np.array([len(v) for v in per_window], dtype=np.float64)
        result: Floats = (self.weights @ sums) / (self.weights @ counts)
        return result

    def mean(
        self, per_window: Sequence[NDArray[np.generic]], transform: Callable[[Floats], Floats] | None = None
    ) -> Estimate:
        """The mean over all tokens, or a function of it (np.exp of the mean loss is the perplexity)."""
        apply = transform or (lambda x: x)
        values = np.concatenate([np.asarray(v, dtype=np.float64) for v in per_window])
        with np.errstate(over="ignore", invalid="ignore"):
            value = float(apply(np.array([values.mean()]))[0])
            samples = apply(self.means(per_window))
        return self.estimate(value, values.size, samples)

    def difference(
        self,
        candidate: Sequence[NDArray[np.generic]],
        reference: Sequence[NDArray[np.generic]],
        transform: Callable[[Floats], Floats],
    ) -> Estimate:
        """transform(mean of the candidate) - transform(mean of the reference), paired over windows."""
        a = np.concatenate([np.asarray(v, dtype=np.float64) for v in candidate])
        b = np.concatenate([np.asarray(v, dtype=np.float64) for v in reference])
        with np.errstate(over="ignore", invalid="ignore"):
            value = float((transform(np.array([a.mean()])) - transform(np.array([b.mean()])))[0])
            samples = transform(self.means(candidate)) - transform(self.means(reference))
        return self.estimate(value, a.size, samples)

    def quantile(self, per_window: Sequence[NDArray[np.generic]], q: float) -> Estimate:
        """A quantile over all tokens: the smallest value that at least a share ``q`` does not exceed."""
        values = np.concatenate([np.asarray(v, dtype=np.float64) for v in per_window])
        window_of = np.repeat(np.arange(self.windows), [len(v) for v in per_window])
        order = np.argsort(values, kind="stable")
        values, window_of = values[order], window_of[order]

        def pick(weights: NDArray[np.int64]) -> float:
            cumulated = np.cumsum(weights)
            return float(values[min(np.searchsorted(cumulated, q * cumulated[-1]), len(values) - 1)])

        samples = np.array([pick(row[window_of]) for row in self.weights])
        return self.estimate(pick(np.ones(len(values), dtype=np.int64)), values.size, samples)
