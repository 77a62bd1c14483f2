"""What ``plan`` says before any weight is read is what lies on the disk afterwards, on the real model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from anyquant import ir
from anyquant.checkpoint import open_checkpoint
from anyquant.exporters.protocol import ExportOptions
from anyquant.exporters.registry import get_exporter
from anyquant.inspection import check_export
from anyquant.job import Job, Target
from anyquant.planning import plan

if TYPE_CHECKING:
    from tests.conftest import RealSkim


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["gguf", "onnx"])
def test_planned_bytes_are_the_written_bytes(real_gguf: Path, real_ir: Path, tmp_path: Path, exporter: str) -> None:
    planned = plan(open_checkpoint(str(real_gguf)), Job("block", Target(bits=4.25)))
    promised = check_export(planned.model, exporter)
    assert not promised["refusals"]
    output = tmp_path / "output"
    get_exporter(exporter).export(ir.open_ir(real_ir), output, ExportOptions())
    written = {name: (output / name).stat().st_size for name in promised["files"]}
    assert written == promised["files"]
    assert sum(written.values()) < real_gguf.stat().st_size


def test_planned_ir_is_the_written_ir(real_gguf: Path, real_ir: Path) -> None:
    files = plan(open_checkpoint(str(real_gguf)), Job("block", Target(bits=4.25))).files
    assert {name: (real_ir / name).stat().st_size for name in files} == files
    assert set(files) == {"anyquant.safetensors", "anyquant.json", "config.json"}


@pytest.mark.slow
def test_planned_bytes_of_codebooks(real_skim: RealSkim, tmp_path: Path) -> None:
    planned, folder = real_skim
    assert 3.24 <= planned.model.quantized_bits <= 3.25
    assert {name: (folder / name).stat().st_size for name in planned.files} == planned.files
    # No stock type holds them, but one of ours, or FP16, whatever the values are.
    for layout in ("native", "f16"):
        promised = check_export(planned.model, "gguf", layout)
        assert promised["refusals"] == promised["notes"] == []
        output = tmp_path / f"{layout}.gguf"
        get_exporter("gguf").export(ir.open_ir(folder), output, ExportOptions(layout=layout))
        assert output.stat().st_size == promised["bytes"]
