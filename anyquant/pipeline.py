"""From a plan to an IR folder: quantize tensor by tensor, a few matrices in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant import ir
from anyquant.calibration import MatrixStatistics, Statistics
from anyquant.measuring import statistics_of, with_calibration
from anyquant.planning import Plan
from anyquant.unit import quantize_matrix
from anyquant.workers import in_order
from anyquant.workfolder import WorkFolder, temporary_work_folder


def run(
    planned: Plan,
    output: str | Path,
    work: WorkFolder | None = None,
    progress: ir.Progress | None = None,
    *,
    resume: bool = False,
) -> ir.Model:
    """Quantize as planned and write the IR folder.

    Args:
        planned: the plan.
        output: the folder to make.
        work: keeps every finished matrix, and the statistics.
        progress: called after each tensor.
        resume: whether to take matrices from the work folder that an interrupted run has finished, or the folder
            itself where it came to its end.

    Raises:
        NonFiniteError: a weight holds NaN or Inf.
        UsageError: the folder exists and is not empty; resuming for another target.
        MachineError: the disk is full. Nothing is left under the final name.
    """
    checkpoint, job = planned.checkpoint, planned.job
    output = Path(output)
    if not resume:
        ir.refuse_existing(output)
    names = list(planned.levels)
    with ExitStack() as stack:
        if work is None and job.sequential:  # which needs a place for what is quantized before it is written
            work = stack.enter_context(temporary_work_folder(job.identity(checkpoint)))
        if work:
            work.begin_tensors(job.recorded_target(), resume=resume)
            if resume:
                remove_leftovers(output)
        statistics = stack.enter_context(statistics_of(checkpoint, job, names, work, progress))
        model = with_calibration(planned.model, job.calibration_settings, statistics)
        done = _finished(model, output) if resume else None
        if done is not None:
            return done
        if job.sequential and work and statistics:
            _in_sequence(planned, work, statistics, progress)

        def unit(name: str) -> tuple[ir.Tensor, ir.Loss | None]:
            entry = model.entries[name]
            if not entry.quantized:
                return checkpoint.raw(name), None
            index = names.index(name)
            done = work.tensor(index, name, entry.spec) if work else None
            if done is not None:
                return done
            known = statistics.matrix(name) if statistics else None
            weight, tensor = _quantize(planned, name, known)
            loss = measure_loss(weight, tensor, known)
            if work:
                work.save_tensor(index, name, tensor, loss)
            return tensor, loss

        results = in_order(unit, [(name,) for name in model.entries], job.workers)
        return ir.write_ir(
            output, model, lambda name: next(results), write_side_files=checkpoint.write_side_files, progress=progress
        )


def _in_sequence(planned: Plan, work: WorkFolder, statistics: Statistics, progress: ir.Progress | None) -> None:
    """Quantize all matrices in the order of the model, each for what it sees by then, into the work folder."""
    from anyquant.calibration.sequential import quantize_in_sequence

    numbers = {name: index for index, name in enumerate(planned.levels)}

    def unit(name: str, known: MatrixStatistics | None) -> tuple[str, NDArray[np.float32]]:
        weight, tensor = _quantize(planned, name, known)
        work.save_tensor(numbers[name], name, tensor, measure_loss(weight, tensor, known))
        return name, ir.dequantize(tensor)

    def quantize(names: list[str], known: dict[str, MatrixStatistics | None]) -> Iterator[tuple[str, NDArray[Any]]]:
        return in_order(unit, [(name, known[name]) for name in names], planned.job.workers)

    def stored(names: list[str]) -> list[tuple[str, NDArray[np.float32]]] | None:
        found = [work.tensor(numbers[name], name, planned.model.entries[name].spec) for name in names]
        tensors = [done[0] for done in found if done is not None]
        if len(tensors) < len(names):
            return None
        return [(name, ir.dequantize(tensor)) for name, tensor in zip(names, tensors, strict=True)]

    quantize_in_sequence(planned.checkpoint, list(numbers), statistics, quantize, stored=stored, progress=progress)


def _finished(model: ir.Model, output: Path) -> ir.Model | None:
    """The folder that a killed run had made already; None where there is none.

    Raises:
        UsageError: there is something else.
    """
    if (output / ir.MANIFEST).is_file():
        found = ir.open_ir(output)
        if ir.same_plan(found, model):
            return found
    ir.refuse_existing(output)
    return None


def dequantized(planned: Plan, statistics: Statistics | None) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (name, FP32 values) of every tensor of the result, in its order; nothing is written.

    Raises:
        NonFiniteError: a weight holds NaN or Inf.
    """
    names = list(planned.model.entries)

    def unit(name: str) -> NDArray[np.float32]:
        if name not in planned.levels:
            return planned.checkpoint.read(name)
        return ir.dequantize(_quantize(planned, name, statistics.matrix(name) if statistics else None)[1])

    yield from zip(names, in_order(unit, [(name,) for name in names], planned.job.workers), strict=True)


def _quantize(planned: Plan, name: str, known: MatrixStatistics | None) -> tuple[NDArray[np.float32], ir.Tensor]:
    """Weight and tensor of a matrix."""
    weight = planned.checkpoint.read(name)
    return weight, quantize_matrix(planned.job, name, weight, planned.levels[name], known)


def remove_leftovers(output: Path) -> None:
    """Remove what a killed process left under temporary names; the lock of the work folder says that it is gone."""
    for path in output.absolute().parent.glob(f".{output.name}.partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def measure_loss(weight: NDArray[np.float32], tensor: ir.Tensor, statistics: MatrixStatistics | None) -> ir.Loss:
    """What a quantized matrix loses, in FP64, a few rows at a time.

    Returns:
        Relative squared error of the weights, sum (w - q)**2 / sum w**2; and with statistics of the outputs,
        sum E[((w - q) x)**2] / sum E[(w x)**2] over the inputs x of the calibration, if more than their norms is
        known. 0 for a matrix of zeros.
    """
    moment = statistics.full().astype(np.float64) if statistics and statistics.has_moment else None
    lost, whole = np.zeros(2), np.zeros(2)
    # A product with few rows would take most of its time to read the moment.
    for rows in ir.row_chunks(tensor.spec.shape, 1 if moment is None else len(moment) // 8):
        part = weight[rows].astype(np.float64)
        for total, values in ((whole, part), (lost, part - ir.dequantize(tensor, rows))):
            total[0] += np.einsum("ij,ij->", values, values)
            if moment is not None:
                total[1] += np.einsum("ij,ij->", values @ moment, values)
    # Rounding can leave a moment that is zero in truth a little below it.
    weights, outputs = (max(float(a), 0.0) / float(b) if b > 0 else 0.0 for a, b in zip(lost, whole, strict=True))
    return ir.Loss(weights, outputs if moment is not None else None)
