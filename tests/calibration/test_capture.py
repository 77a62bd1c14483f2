"""Products with watched weights are recognized, whatever function computes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import linear

from anyquant.calibration.capture import Capture, Reading
from anyquant.calibration.weights import Piece

Seen = list[tuple[torch.Tensor, list[Reading], torch.Tensor]]
X = torch.randn(5, 3)


def seen(parts: list[tuple[Piece, torch.Tensor]], compute: Callable[[], torch.Tensor]) -> Seen:
    found: Seen = []
    capture = Capture(lambda x, readings, output: found.append((x, readings, output)))
    capture.watch(parts)
    with capture:
        compute()
    capture.forget(parts)
    with capture:
        compute()  # nothing is seen any more
    return found


@pytest.mark.parametrize(
    "product",
    [
        lambda w: linear(X, w),
        lambda w: linear(X, weight=w),
        lambda w: linear(X[None], w, torch.ones(4)),
        lambda w: torch.nn.functional.linear(input=X, weight=w),
        lambda w: X @ w.T,
        lambda w: X.matmul(w.t()),
        lambda w: torch.mm(X, w.T),
    ],
)
def test_weights_out_in(product: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight = torch.randn(4, 3)
    [(x, readings, output)] = seen([(Piece("w", "w", 4), weight)], lambda: product(weight))
    assert x.data_ptr() == X.data_ptr()
    assert readings == [Reading("w", slice(0, 4))]
    assert output.shape[-1] == 4


@pytest.mark.parametrize(
    "product",
    [
        lambda w: torch.addmm(torch.ones(4), X, w),
        lambda w: X @ w,
        lambda w: torch.matmul(X[None], w),
        lambda w: X.mm(w),
        lambda w: linear(X, w.T),
    ],
)
def test_weights_in_out(product: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight = torch.randn(3, 4)
    [(x, readings, _)] = seen([(Piece("w", "w", 4, transposed=True), weight)], lambda: product(weight))
    assert x.data_ptr() == X.data_ptr()
    assert readings == [Reading("w", slice(0, 4))]


def test_parts_of_a_fused_weight() -> None:
    fused = torch.randn(2, 6, 3)  # two experts, each gate (2 rows) above up (4 rows)
    parts = []
    for e in range(2):
        for name, start, rows in (("gate", 0, 2), ("up", 2, 4)):
            piece = Piece(f"{name}{e}", "fused", rows, e, start)
            parts.append((piece, piece.part(fused)))
    [(_, readings, _)] = seen(parts, lambda: linear(X, fused[1]))
    assert readings == [Reading("gate1", slice(0, 2)), Reading("up1", slice(2, 6))]
    [(_, readings, _)] = seen(parts, lambda: linear(X, fused[0, 2:]))
    assert readings == [Reading("up0", slice(0, 4))]


def test_experts_in_out() -> None:
    stacked = torch.randn(2, 3, 4)
    parts = [(piece, piece.part(stacked)) for e in range(2) for piece in [Piece(f"w#{e}", "w", 4, e, None, True)]]
    [(_, readings, _)] = seen(parts, lambda: X @ stacked[1])
    assert readings == [Reading("w#1", slice(0, 4))]


def test_what_is_no_product_with_a_whole_watched_weight() -> None:
    weight, other = torch.randn(4, 3), torch.randn(4, 3)
    parts = [(Piece("w", "w", 4), weight)]
    assert not seen(parts, lambda: linear(X, other))
    assert not seen(parts, lambda: linear(X, weight.clone()))
    assert not seen(parts, lambda: linear(X, weight[:2]))  # half of it
    assert not seen(parts, lambda: weight * 2)
    assert not seen(parts, lambda: linear(weight, torch.randn(2, 3)))  # as an input
