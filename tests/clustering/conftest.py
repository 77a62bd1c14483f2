"""Rows and weights to cluster, from easy to hostile, and both ways to run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from anyquant.runtime import native

KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy tails": lambda rng, n: rng.standard_t(2, n),
    "equally spaced": lambda rng, n: np.arange(n) - n // 3,
    "integers": lambda rng, n: rng.integers(-20, 20, n),
    "blocks of sixteen levels": lambda rng, n: (
        (rng.integers(0, 16, n) - 8) * np.repeat(rng.choice([0.01, 0.013, 0.02], -(-n // 32)), 32)[:n]
    ),
    "one value": lambda rng, n: np.full(n, 0.3),
    "far from zero": lambda rng, n: 1000 + 0.001 * rng.standard_normal(n),
    "tiny": lambda rng, n: 1e-40 * rng.standard_normal(n),
    "large": lambda rng, n: 1e37 * rng.standard_normal(n),
    "many scales": lambda rng, n: np.exp(4 * rng.standard_normal(n)) * rng.choice([-1, 1], n),
    "two far groups": lambda rng, n: rng.choice([-1e3, 1e3], n) + 0.001 * rng.standard_normal(n),
    "one far outlier": lambda rng, n: np.where(np.arange(n) == n // 2, 1e8, rng.standard_normal(n)),
    "signed zeros": lambda rng, n: rng.choice([-0.0, 0.0, 1.0], n),
}
WEIGHTS: dict[str, Callable[[np.random.Generator, int], np.ndarray | None]] = {
    "none": lambda rng, n: None,
    "mild": lambda rng, n: rng.uniform(0.5, 2, n),
    "1e-6 to 1e6": lambda rng, n: 10 ** rng.uniform(-6, 6, n),
    "some zero": lambda rng, n: rng.choice([0, 1, 2], n),
    "all zero": lambda rng, n: np.zeros(n),
    "extreme": lambda rng, n: rng.choice([1e-45, 1e-30, 1, 1e38], n),
}


def example(kind: str, weighting: str, rows: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(seed)
    with np.errstate(under="ignore"):
        values = np.stack([KINDS[kind](rng, n) for _ in range(rows)]).astype(np.float32)
        weights = WEIGHTS[weighting](rng, n)
        return values, None if weights is None else weights.astype(np.float32)


Example = Callable[[str, str, int, int, int], tuple[np.ndarray, np.ndarray | None]]


@pytest.fixture(name="example", scope="session")
def example_fixture() -> Example:
    """Rows and weights by names: example(kind, weighting, rows, n, seed)."""
    return example


@pytest.fixture(scope="session")
def kinds() -> list[str]:
    return list(KINDS)


@pytest.fixture(scope="session")
def weightings() -> list[str]:
    return list(WEIGHTS)


NEEDS_LIBRARY = pytest.mark.skipif(not native.available(), reason=f"no compiled library: {native.why_not()}")


@pytest.fixture(params=[pytest.param("compiled", marks=NEEDS_LIBRARY), "numpy"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the compiled library and without."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "available", lambda: False)
    return str(request.param)
