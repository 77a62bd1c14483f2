"""Models on a GPU, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import anyquant
from anyquant.cli import cli
from anyquant.errors import MachineError, UsageError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tiny_ir: Path, tmp_path: Path) -> None:
    for dequantize in (False, True):
        with pytest.raises(MachineError, match="GPU"):
            anyquant.load(tiny_ir, device="cuda", dequantize=dequantize)
    with pytest.raises(UsageError, match="'cpu' or 'cuda'"):
        anyquant.load(tiny_ir, device="tpu")
    text = tmp_path / "text.txt"
    text.write_text("The sea is salty. " * 50)
    for device, code in [("cuda", 6), ("cuda:0", 6), ("tpu", 2), ("cuda:x", 2)]:
        done = CliRunner().invoke(cli, ["validate", str(tiny_ir), "--text", str(text), "--device", device])
        assert (done.exit_code == code) or getattr(done.exception, "exit_code", None) == code, (device, done.output)
