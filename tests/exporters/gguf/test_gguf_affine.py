"""What the method affine makes, in stock types: which width, block and zero point takes which, and which none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize

from anyquant import ir
from anyquant.checkpoint import open_checkpoint
from anyquant.exporters.gguf import GGUFExporter, stock
from anyquant.exporters.protocol import ExportOptions
from anyquant.job import Job, Target
from anyquant.methods.affine import BLOCKS, AffineMethod
from anyquant.pipeline import run
from anyquant.planning import plan

METHOD = AffineMethod()


def _tensor(bits: int, block: int, symmetric: bool, columns: int = 320) -> ir.Tensor:
    weight = np.random.default_rng(bits + block).normal(0.2, 1, (6, columns)).astype(np.float32)
    weight[1] = 0
    weight[2] = -0.75
    weight[3] = np.abs(weight[3])  # zero point 0 where it is free: codes up to 2**bits - 1
    options = {"feedback": False, "blocks": str(block), "widths": str(bits), "symmetric": symmetric}
    return METHOD.quantize(weight, np.zeros(1, np.uint8), None, METHOD.settings(options))


@pytest.mark.parametrize("block", BLOCKS[1:])
@pytest.mark.parametrize(
    ("bits", "symmetric", "name"),
    [(2, False, "Q4_0"), (2, True, "Q4_0"), (4, False, "Q5_0"), (4, True, "Q4_0"), (8, True, "Q8_0"), (8, False, "")],
)
def test_the_stock_type_of_each_width(bits: int, block: int, symmetric: bool, name: str) -> None:
    tensor = _tensor(bits, block, symmetric)
    if not name:
        with pytest.raises(stock.NotExact, match=r"lie in .*beyond -128\.\.127"):
            stock.choose(tensor)
        return
    assert stock.choose(tensor) == name
    found = dequantize(stock.encode(tensor, name), GGMLQuantizationType[name])
    np.testing.assert_array_equal(found, ir.dequantize(tensor))


@pytest.mark.parametrize(("block", "columns", "message"), [(16, 320, "affine blocks of 16"), (32, 333, "rows of 333")])
def test_what_has_no_stock_type(block: int, columns: int, message: str) -> None:
    with pytest.raises(stock.NotExact, match=message):
        stock.choose(_tensor(4, block, True, columns))


@pytest.mark.parametrize(
    ("bits", "widths", "symmetric", "types"),
    [
        (2.75, "2", False, {"Q4_0"}),
        (4.75, "4", False, {"Q5_0"}),
        (4.75, "4", True, {"Q4_0"}),
        (8.75, "8", True, {"Q8_0"}),
    ],
)
def test_a_model_from_checkpoint_to_file(
    tiny_llama: Path, tmp_path: Path, bits: float, widths: str, symmetric: bool, types: set[str]
) -> None:
    options = {"feedback": False, "clip": False, "widths": widths, "blocks": "32", "symmetric": symmetric}
    run(plan(open_checkpoint(str(tiny_llama)), Job("affine", Target(bits=bits), options)), tmp_path / "ir")
    model = ir.open_ir(tmp_path / "ir")
    file = tmp_path / "model.gguf"
    exported = GGUFExporter().export(model, file, ExportOptions())
    quantized = {name for name, entry in model.entries.items() if entry.quantized}
    assert quantized
    assert {exported.types[name] for name in quantized} == types
    found = {name: ir.digest(values) for name, values in GGUFExporter().read(file)}
    assert {name: found[name] for name in quantized} == {name: model.entries[name].sha256 for name in quantized}
