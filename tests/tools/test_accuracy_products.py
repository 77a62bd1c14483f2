"""Products by oneDNN are those of PyTorch, but for the last digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (1, 37, 5), (7, 576, 33), (512, 64, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_pytorch(
    accuracy: Callable[[str], Any], rows: int, inputs: int, outputs: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(rows * inputs)
    model = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias), torch.nn.Linear(outputs, inputs, bias)).double()
    given = torch.randn(2, rows, inputs, generator=generator)
    seen: list[tuple[int, ...]] = []
    model[0].register_forward_hook(lambda layer, arguments, result: seen.append(tuple(result.shape)))
    with torch.inference_mode():
        exact = model(given.double())
        accuracy("products").by_onednn(model.float())
        found = model(given)
    assert "forward" in vars(model[0]) or not torch.backends.mkldnn.is_available()
    assert seen == [(2, rows, outputs)] * 2  # hooks still see what goes through
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_what_is_not_a_plain_linear_layer_stays(accuracy: Callable[[str], Any]) -> None:
    class Doubling(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(inputs)

    model = Doubling(3, 2)
    given = torch.ones(1, 3)
    before = model(given)
    accuracy("products").by_onednn(model)
    assert torch.equal(model(given), before)
