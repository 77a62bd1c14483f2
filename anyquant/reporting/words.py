"""Numbers and settings as text, the same in the terminal and in HTML."""

from __future__ import annotations

import math

from anyquant.reporting.estimate import Estimate

DASH = "\u2013"


def number(value: float, digits: int = 3) -> str:
    """A number with significant digits, without needless exponents."""
    if not math.isfinite(value):
        return "not finite"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e+")
    decimals = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    return f"{value:,.{decimals}f}"


def with_error(estimate: Estimate, scale: float = 1.0) -> str:
    """value ± error, both cut at the error's second digit; the value alone where no error is known."""
    value = estimate.value * scale
    if estimate.error is None or not math.isfinite(value):
        return number(value, 4)
    error = estimate.error * scale
    if error <= 0:
        return f"{number(value, 4)} ± 0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{number(value)} ± {error:.1e}".replace("e-0", "e-").replace("e+0", "e+")
    decimals = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:,.{decimals}f} ± {error:.{decimals}f}"


def if_known(estimate: Estimate | None, scale: float = 1.0) -> str:
    """The same, or a dash."""
    return with_error(estimate, scale) if estimate else DASH


def size(nbytes: int) -> str:
    """Bytes in MB or GB (powers of ten)."""
    if nbytes >= 10**9:
        return f"{nbytes / 1e9:.2f} GB"
    if nbytes >= 10**8:
        return f"{nbytes / 1e6:.0f} MB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 10**5 else f"{nbytes / 1e3:.1f} kB"


def words(values: object, between: str = ": ") -> str:
    """A dict as one line."""
    return ", ".join(f"{k}{between}{v}" for k, v in values.items()) if isinstance(values, dict) else str(values)
