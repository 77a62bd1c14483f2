"""Models on a GPU, where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import anyquant
from anyquant.errors import MachineError, UsageError
from anyquant.runtime import load
from anyquant.validation import ValidationSettings, format_table, validate

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


def test_the_row_of_a_gpu(tiny_ir: Path, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch on the CPU in the place of the kernels: what is measured and gated beside the others."""
    asked: list[str] = []

    def load_here(path: Path, *, device: str, **others: bool) -> object:
        asked.append(device)
        return load(path, **{**others, "dequantize": True})

    monkeypatch.setattr("anyquant.runtime.cuda.launcher.require_gpu", lambda device: "sm_90")
    monkeypatch.setattr("anyquant.runtime.load", load_here)
    text = tmp_path / "text.txt"
    text.write_text("The sea is salty, and nobody knows why. " * 60)
    settings = ValidationSettings(
        model=tiny_ir, text=text, gguf=tiny_gguf, device="cuda:0", isolate=False, window=32, windows=2, generate=2,
        report=tmp_path / "report",
    )  # fmt: skip
    report = validate(settings)
    assert asked == ["cpu", "cuda:0"]
    assert [row.name for row in report.rows] == ["IR", "CUDA", "GGUF"]
    pairs = {(each.reference, each.candidate): each for each in report.comparisons}
    assert set(pairs) == {("IR", "CUDA"), ("IR", "GGUF"), ("CUDA", "GGUF")}
    assert pairs["IR", "CUDA"].max_abs_logit == 0
    gates = [gate.name for gate in report.gates if gate.subject == "CUDA"]
    assert gates == ["max |d logit| to PyTorch", "KL to PyTorch"]
    assert "CUDA" in format_table(report, color=False)
    assert "CUDA" in (tmp_path / "report" / "report.html").read_text()
