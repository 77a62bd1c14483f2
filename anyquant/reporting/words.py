"""Numbers and settings as text, the same in the terminal and in HTML."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

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
    """A dict as one line; what is in a dict inside stands under both names: "target bits: 3.25"."""
    if isinstance(values, Mapping):
        return ", ".join(f"{name}{between}{text}" for name, text in _flat(values)) or "none"
    if isinstance(values, list | tuple):
        return " ".join(f"({words(item)})" if isinstance(item, Mapping) else words(item) for item in values) or "none"
    if values is None or isinstance(values, bool):
        return {None: "none", True: "yes", False: "no"}[values]
    return str(values)


def _flat(values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(names on the way, text) of everything in nested dicts."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from ((f"{name} {inner}", text) for inner, text in _flat(value))
        else:
            yield name, words(value)
