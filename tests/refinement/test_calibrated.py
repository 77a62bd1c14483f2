"""How far refinement trusts a moment."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from anyquant.calibration import MatrixStatistics
from anyquant.ir import Tensor
from anyquant.refinement.calibrated import held_back, refine_for, shrinkage


def test_few_tokens_are_trusted_less() -> None:
    shares = [shrinkage(inputs, tokens) for inputs, tokens in ((576, 1 << 20), (576, 32768), (1536, 32768), (1536, 0))]
    assert shares == sorted(shares)
    assert shares[0] < 0.01
    assert shares[-1] == 0.3
    assert shrinkage(2 * 576, 2 * 32768) == shrinkage(576, 32768)


def test_the_diagonal_stays() -> None:
    moment = np.arange(18, dtype=np.float32).reshape(2, 3, 3)
    found = held_back(moment, 0.25)
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_array_equal(found[:, ~off], moment[:, ~off])
    np.testing.assert_allclose(found[:, off], 0.75 * moment[:, off])
    np.testing.assert_array_equal(moment, np.arange(18).reshape(2, 3, 3))


def test_with_tokens_refinement_comes_nearer_to_the_moment_that_it_sees(
    moment_of: Callable[..., np.ndarray], weight_of: Callable[..., np.ndarray], loss_of: Callable[..., np.ndarray],
    tensor_of: Callable[..., Tensor],
) -> None:  # fmt: skip
    weight, moment = weight_of("normal", (30, 60)), moment_of("correlated", 60)
    tensor = tensor_of(weight, np.full(30, 2, np.uint8), 0)
    lost = [
        loss_of(weight, refine_for(weight, tensor, MatrixStatistics.of(moment, tokens=tokens)), moment).sum()
        for tokens in (100, 1 << 20)
    ]
    assert lost[1] < 0.97 * lost[0]
    assert lost[0] < loss_of(weight, tensor, moment).sum()
