"""Errors by resampling windows."""

from __future__ import annotations

import numpy as np
import pytest

from anyquant.validation.bootstrap import Bootstrap


def windows(count: int, seed: int = 0, spread: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(2 + rng.normal() * spread, 0.1, size=50) for _ in range(count)]


def test_error_of_the_mean_is_that_between_windows() -> None:
    data = windows(40)
    found = Bootstrap(40, 4000, seed=1).mean(data)
    means = np.array([w.mean() for w in data])
    assert found.value == pytest.approx(means.mean())
    assert found.n == 2000
    assert found.error == pytest.approx(means.std(ddof=1) / np.sqrt(40), rel=0.08)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(4 * found.error, rel=0.1)
    # Were tokens independent, it would be seven times smaller: that error would be wrong.
    naive = np.concatenate(data).std() / np.sqrt(2000)
    assert found.error > 4 * naive


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        data = [np.array([value]) for value in rng.normal(3.0, 1.0, size=30)]
        found = Bootstrap(30, 400, seed=trial).mean(data)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 3.0 <= found.high
    assert 0.87 <= hits / 200 <= 0.99


def test_differences_are_paired() -> None:
    data = windows(20)
    shifted = [w + 0.01 for w in data]
    boot = Bootstrap(20, 500)
    difference = boot.difference(shifted, data, lambda x: x)
    assert difference.value == pytest.approx(0.01)
    assert difference.error == pytest.approx(0, abs=1e-9)  # unpaired it would be that of the windows
    assert boot.mean(data).error > 0.1  # type: ignore[operator]
    perplexity = boot.difference(shifted, data, np.exp)
    expected = np.exp(np.concatenate(shifted).mean()) - np.exp(np.concatenate(data).mean())
    assert perplexity.value == pytest.approx(expected)


def test_windows_of_unequal_length_weigh_by_their_tokens() -> None:
    data = [np.full(10, 1.0), np.full(30, 2.0)]
    assert Bootstrap(2, 10).mean(data).value == pytest.approx(1.75)


def test_quantiles_match_sorting() -> None:
    data = windows(12)
    found = Bootstrap(12, 200).quantile(data, 0.5)
    flat = np.sort(np.concatenate(data))
    assert found.value == flat[int(np.ceil(0.5 * flat.size)) - 1]
    assert found.error is not None
    assert found.error > 0
    top = Bootstrap(12, 50).quantile(data, 0.99)
    assert top.value == flat[int(np.ceil(0.99 * flat.size)) - 1]


def test_a_resampled_quantile_is_that_of_the_drawn_windows() -> None:
    data = windows(4)
    boot = Bootstrap(4, 30, seed=2)
    median = boot.quantile(data, 0.5)
    drawn = [np.sort(np.concatenate([data[i] for i in range(4) for _ in range(row[i])])) for row in boot.weights]
    expected = np.array([d[99] for d in drawn])
    assert median.error == pytest.approx(expected.std(ddof=1))


def test_same_seed_same_errors_and_one_window_none() -> None:
    data = windows(6)
    assert Bootstrap(6, 100, seed=3).mean(data) == Bootstrap(6, 100, seed=3).mean(data)
    assert Bootstrap(6, 100, seed=3).mean(data) != Bootstrap(6, 100, seed=4).mean(data)
    alone = Bootstrap(1, 100).mean(data[:1])
    assert (alone.error, alone.low, alone.high) == (None, None, None)


def test_nan_gives_no_error_and_raises_nothing() -> None:
    data = windows(3)
    data[1][4] = np.nan
    found = Bootstrap(3, 20).mean(data)
    assert np.isnan(found.value)
    assert found.error is None
