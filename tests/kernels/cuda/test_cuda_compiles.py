"""NVRTC compiles every kernel for the architectures that we name, with no GPU, toolkit or header at hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anyquant.runtime.cuda import compiler

KERNELS = Path(__file__).parents[3] / "kernels" / "cuda"
WIDTHS = [1 << 4, 0b11111, 0b111111111]
MACROS = [
    ("reference.cu", {}),
    ("ggml.cu", {}),
    ("finish.cu", {}),
    *(("expand.cu", {"AQ_AXIS": axis, "AQ_WIDTHS": widths}) for axis in (0, 1) for widths in WIDTHS),
    *(
        ("gemv.cu", {"AQ_AXIS": axis, "AQ_BATCH": batch, "AQ_WIDTHS": widths})
        for axis in (0, 1)
        for batch, widths in [(1, WIDTHS[0]), (2, WIDTHS[1]), (4, WIDTHS[1]), (8, WIDTHS[0]), (1, WIDTHS[2])]
    ),
    *(
        ("gemm.cu", {"AQ_AXIS": axis, "AQ_BATCH": batch, "AQ_WIDTHS": widths})
        for axis in (0, 1)
        for batch, widths in [(8, WIDTHS[2]), (16, WIDTHS[1]), (32, WIDTHS[0])]
    ),
]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("source", "macros"), MACROS, ids=lambda value: str(value).replace("AQ_", ""))
def test_compiles(
    source: str, macros: dict[str, int], architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.core", reason="the extra anyquant[cuda] is not installed")
    monkeypatch.setenv("ANYQUANT_CACHE", str(tmp_path))
    cubin = compiler.compiled(source, macros, architecture)
    assert cubin.startswith(b"\x7fELF")
    axis = macros.get("AQ_AXIS")
    other = {0: "_columns", 1: "_rows", None: "?"}[axis]
    names = re.findall(r"^(?:AQ_KERNEL\([^\n]*\) ?\n?)(\w+)\(", (KERNELS / source).read_text(), re.MULTILINE)
    assert names
    for name in names:
        if not name.endswith(other):
            assert name.encode() + b"\0" in cubin, name


def test_all_sources_are_compiled() -> None:
    assert {name for name, _ in MACROS} == {path.name for path in KERNELS.glob("*.cu")}
