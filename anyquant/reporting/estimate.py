"""A measured number."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A number with what is known of its precision.

    Attributes:
        value: the number.
        n: what it is taken over: so many tokens, or matrices.
        error: standard error; None where it cannot be had (one window, or a maximum).
        low: lower end of the 95 % interval.
        high: upper end.
    """

    value: float
    n: int
    error: float | None = None
    low: float | None = None
    high: float | None = None
