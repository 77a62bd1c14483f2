"""What quantized matrices lost as one number: the errors that the manifest holds, averaged over matrices."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from anyquant import ir
from anyquant.reporting.estimate import Estimate


def error_of(entry: ir.Entry, key: str) -> float | None:
    """A relative squared error of a quantized matrix; None where it is not known.

    Args:
        entry: of the matrix.
        key: "error", of the weights, or "output_error".
    """
    return entry.error or 0.0 if key == "error" else entry.output_error


def mean_error(entries: Iterable[ir.Entry], key: str) -> Estimate | None:
    """Mean over the matrices whose error is known, each counted by its number of weights; None where there are none.

    Args:
        entries: of quantized matrices.
        key: see :func:`error_of`.

    Returns:
        With its standard error over matrices, where there are several.
    """
    errors = [(error_of(entry, key), entry.spec.numel) for entry in entries]
    known = [(error, numel) for error, numel in errors if error is not None]
    if not known:
        return None
    values, weights = (np.array(part, np.float64) for part in zip(*known, strict=True))
    share = weights / weights.sum()
    value, n = float(share @ values), len(values)
    if n < 2:
        return Estimate(value, n)
    return Estimate(value, n, float(np.sqrt(share**2 @ (values - value) ** 2 * n / (n - 1))))
