"""From a plan to an IR folder: quantize tensor by tensor, a few matrices in memory at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anyquant import ir
from anyquant.methods import get_method
from anyquant.planning import Plan
from anyquant.workers import in_order


def run(planned: Plan, output: str | Path, progress: ir.Progress | None = None) -> ir.Model:
    """Quantize as planned and write the IR folder.

    Raises:
        NonFiniteError: a weight holds NaN or Inf.
        UsageError: the folder exists and is not empty.
        MachineError: the disk is full. Nothing is left under the final name.
    """
    checkpoint, model = planned.checkpoint, planned.model
    ir.refuse_existing(Path(output))
    method = get_method(planned.job.method)
    settings = method.settings(planned.job.options)

    def unit(name: str) -> tuple[ir.Tensor, float | None]:
        entry = model.entries[name]
        if not entry.quantized:
            return checkpoint.raw(name), None
        weight = checkpoint.read(name)
        tensor = method.quantize(weight, entry.spec, settings)
        return tensor, relative_error(weight, tensor)

    results = in_order(unit, [(name,) for name in model.entries], planned.job.workers)
    return ir.write_ir(
        output, model, lambda name: next(results), write_side_files=checkpoint.write_side_files, progress=progress
    )


def relative_error(weight: np.ndarray, tensor: ir.Tensor) -> float:
    """Sum (w - q)**2 / sum w**2 in FP64, a few rows at a time; 0 for a matrix of zeros."""
    lost = whole = 0.0
    for rows in ir.row_chunks(tensor.spec.shape):
        part = weight[rows]
        difference = part - ir.dequantize(tensor, rows)
        lost += float(np.einsum("ij,ij->", difference, difference, dtype=np.float64))
        whole += float(np.einsum("ij,ij->", part, part, dtype=np.float64))
    return lost / whole if whole else 0.0
