"""Models on a GPU, where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import anyquant
from anyquant.errors import MachineError, UsageError

if TYPE_CHECKING:
    from tests.conftest import Result


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tiny_ir: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    for dequantize in (False, True):
        with pytest.raises(MachineError, match="GPU"):
            anyquant.load(tiny_ir, device="cuda", dequantize=dequantize)
    with pytest.raises(UsageError, match="'cpu' or 'cuda'"):
        anyquant.load(tiny_ir, device="tpu")
    text = tmp_path / "text.txt"
    text.write_text("The sea is salty. " * 50)
    for device, code, words in [("cuda", 6, "GPU"), ("cuda:0", 6, "GPU"), ("tpu", 2, "tpu"), ("cuda:x", 2, "cuda:1")]:
        result = invoke("validate", tiny_ir, "--text", text, "--device", device)
        assert (result.code, result.out) == (code, "")
        assert words in result.err
