"""Metrics against formulas written the obvious way."""

from __future__ import annotations

import numpy as np
import pytest

from anyquant.validation import metrics
from anyquant.validation.metrics import compare_logits, log_normalizers, token_losses
from anyquant.validation.results import LogitIndex


def softmax(row: np.ndarray) -> np.ndarray:
    e = np.exp(row.astype(np.float64))
    return e / e.sum()


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    a = (rng.normal(size=(9, 31)) * 4).astype(np.float32)
    return a, (a + rng.normal(size=a.shape) * 0.3).astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 70, 1 << 21])
def test_kl_perplexity_and_top1_are_the_formulas(
    pair: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(metrics, "_CHUNK", chunk)
    a, b = pair
    found = compare_logits(a, b, window=5, tie_tolerance=0.5)
    for i in range(len(a)):
        p, q = softmax(a[i]), softmax(b[i])
        assert found.kl[i] == pytest.approx(float((p * (np.log(p) - np.log(q))).sum()), rel=1e-10)
        assert found.differs[i] == (p.argmax() != q.argmax())
    assert found.max_abs_logit == pytest.approx(float(np.abs(a.astype(float) - b.astype(float)).max()))
    position, token = np.unravel_index(np.abs(a.astype(float) - b.astype(float)).argmax(), a.shape)
    assert found.max_abs_at == LogitIndex(5, int(position), int(token))
    assert found.logit_scale == pytest.approx(float(np.abs(a).max()))
    ids = np.random.default_rng(1).integers(0, 31, 9)
    losses = token_losses(a, ids)
    expected = [-np.log(softmax(a[i])[ids[i + 1]]) for i in range(8)]
    np.testing.assert_allclose(losses, expected, rtol=1e-12)


def test_large_logits_do_not_overflow() -> None:
    a = np.array([[3000.0, 2999.0, -4000.0]], dtype=np.float32)
    assert log_normalizers(a)[0] == pytest.approx(3000 + np.log1p(np.exp(-1.0)))
    assert compare_logits(a, a).kl[0] == 0


def test_kl_is_not_symmetric_and_never_negative(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    there, back = compare_logits(a, b).kl, compare_logits(b, a).kl
    assert (there >= 0).all()
    assert not np.allclose(there, back)
    # A shift of all logits of a row changes no probability.
    np.testing.assert_allclose(compare_logits(a, a + np.float32(0.5)).kl, 0, atol=1e-12)


def test_near_ties_are_told_from_real_differences() -> None:
    reference = np.array([[5.0, 4.99, 0.0], [5.0, 2.0, 0.0], [5.0, 1.0, 0.0]], dtype=np.float32)
    candidate = np.array([[4.98, 5.0, 0.0], [2.0, 5.0, 0.0], [5.1, 1.0, 0.0]], dtype=np.float32)
    found = compare_logits(reference, candidate, window=7, tie_tolerance=0.05)
    assert found.differs.tolist() == [True, True, False]
    tie, real = found.differences
    assert (tie.window, tie.position, tie.reference, tie.candidate, tie.near_tie) == (7, 0, 0, 1, True)
    assert tie.gap == pytest.approx(0.01, abs=1e-6)
    assert not real.near_tie
    assert real.gap == pytest.approx(3.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 8])
def test_a_bad_logit_is_counted_and_never_looks_close(
    pair: tuple[np.ndarray, np.ndarray], bad: float, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_CHUNK", 40)  # several chunks: a later one must not hide it
    a = pair[0]
    b = a.copy()
    b[row, 2] = bad
    found = compare_logits(a, b)
    assert found.nonfinite == 1
    assert (found.max_abs_at.position, found.max_abs_at.token) == (row, 2)
    assert not found.max_abs_logit <= 1e-3


def test_shapes_must_agree(pair: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="shape"):
        compare_logits(pair[0], pair[1][:, :-1])
