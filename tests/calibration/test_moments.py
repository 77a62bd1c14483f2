"""Sums of x x^T against NumPy in FP64, on shapes that are no multiple of anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from anyquant.calibration.capture import Reading
from anyquant.calibration.moments import MomentSums
from anyquant.calibration.store import Moment
from anyquant.errors import AnyquantError


def feed(sums: MomentSums, x: torch.Tensor, *names: str) -> None:
    sums.product(x, [Reading(name, slice(None)) for name in names], x)


def square(moment: Moment) -> np.ndarray:
    n = len(moment.diagonal)
    full = np.zeros((n, n))
    full[np.triu_indices(n)] = moment.triangle
    return full + np.triu(full, 1).T


def check(moment: Moment, names: Sequence[str], inputs: Sequence[torch.Tensor]) -> None:
    x = torch.cat([each.flatten(0, -2) for each in inputs]).double().numpy()
    expected = x.T @ x / len(x)
    scale = np.abs(expected).max()
    assert moment.names == tuple(names)
    assert moment.tokens == len(x)
    assert moment.diagonal.dtype == moment.triangle.dtype == np.float32
    np.testing.assert_allclose(square(moment), expected, rtol=0, atol=2e-6 * scale)
    np.testing.assert_allclose(moment.diagonal, np.diag(expected), rtol=3e-7)
    np.testing.assert_array_equal(np.diag(square(moment)), moment.diagonal)


@pytest.mark.parametrize("columns", [1, 7, 255, 256, 257, 600])
@pytest.mark.parametrize("tokens", [1, 33])
def test_one_input(columns: int, tokens: int) -> None:
    parts = [torch.randn(2, tokens, columns) * torch.logspace(-3, 2, columns) for _ in range(3)]
    sums = MomentSums({"a"})
    for part in parts:
        feed(sums, part, "a")
        sums.flush()
    [moment] = sums.result()
    check(moment, ["a"], parts)


def test_readers_of_one_tensor_share() -> None:
    x, y = torch.randn(3, 5, 4), torch.randn(15, 4)
    sums = MomentSums({"q", "k", "v", "o"})
    feed(sums, x, "q")
    feed(sums, y, "o")
    feed(sums, x, "k")
    feed(sums, x.reshape(15, 4), "v", "not wanted")
    feed(sums, x, "not wanted")
    sums.flush()
    first, second = sums.result()
    check(first, ["q", "k", "v"], [x])
    check(second, ["o"], [y])


def test_equal_values_elsewhere_are_not_shared() -> None:
    x = torch.randn(6, 4)
    sums = MomentSums({"a", "b", "c"})
    feed(sums, x, "a")
    feed(sums, x.clone(), "b")
    feed(sums, x[:, :3], "c")
    sums.flush()
    assert [moment.names for moment in sums.result()] == [("a",), ("b",), ("c",)]


def test_readers_that_share_only_sometimes() -> None:
    x, y, z = torch.randn(5, 4), torch.randn(3, 4), torch.randn(2, 4)
    sums = MomentSums({"a", "b", "c"})
    feed(sums, x, "a", "b", "c")
    sums.flush()
    feed(sums, y, "a")
    feed(sums, z, "b", "c")
    sums.flush()
    first, second = sums.result()
    check(first, ["a"], [x, y])
    check(second, ["b", "c"], [x, z])


def test_no_tokens_no_moment() -> None:
    sums = MomentSums({"a"})
    feed(sums, torch.empty(0, 4), "a")
    sums.flush()
    assert sums.result() == []


def test_a_reused_address_is_another_input() -> None:
    memory = torch.randn(6, 4)
    before = memory.clone()
    sums = MomentSums({"a", "b"})
    feed(sums, memory, "a")
    sums.flush()
    memory.mul_(2)
    feed(sums, memory, "b")
    sums.flush()
    first, second = sums.result()
    check(first, ["a"], [before])
    check(second, ["b"], [memory])


def test_an_overwritten_input_is_noticed() -> None:
    x = torch.randn(6, 4)
    sums = MomentSums({"a"})
    feed(sums, x, "a")
    x.add_(1)
    with pytest.raises(AnyquantError, match="a: the model's code overwrote"):
        sums.flush()


def test_an_embedding_counts_every_column_alike() -> None:
    moment = MomentSums(set()).one_hot("embedding", 12, 5)
    assert (moment.names, moment.tokens) == (("embedding",), 12)
    np.testing.assert_array_equal(square(moment), np.eye(5))
    np.testing.assert_array_equal(moment.diagonal, np.ones(5))
