"""All matrices of the encoder as a peer quantizes them, or as ``anyquant quantize`` would if it knew such models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from accuracy.encoder import Encoder
from accuracy.interface import Contender, Floats
from anyquant.allocation import Table, allocate
from anyquant.calibration import MatrixStatistics
from anyquant.errors import InfeasibleTarget
from anyquant.ir import dequantize
from anyquant.job import Job
from anyquant.methods import LevelArray, Levels, Method, get_method
from anyquant.methods.protocol import Settings
from anyquant.refinement.calibrated import refine_for


def by_peer(encoder: Encoder, contender: Contender, statistics: Mapping[str, MatrixStatistics]) -> dict[str, Floats]:
    """All matrices as a peer quantizes them."""
    return {name: contender.quantize(name, weight, statistics[name].full()) for name, weight in encoder.weights.items()}


def by_method(
    encoder: Encoder, job: Job, statistics: Mapping[str, MatrixStatistics]
) -> tuple[dict[str, Floats], float]:
    """All matrices as ``anyquant quantize`` would quantize them, if it knew such models.

    Args:
        encoder: the model.
        job: method, settings, bits, who shares them, and whether the result is refined.
        statistics: of every matrix, as the job wants them.

    Returns:
        Name -> float32 [out, in], and the stored bits per weight, everything counted.

    Raises:
        InfeasibleTarget: fewer bits than the method can do with.
    """
    method, settings, bits = get_method(job.method), job.settings, float(job.target.bits or 0)
    known = {name: statistics[name] if job.needs_statistics else None for name in encoder.weights}
    matrices = [_Matrix.of(name, method, weight, known[name], settings) for name, weight in encoder.weights.items()]
    least, most = (_stored(matrices, [matrix.flat(at) for matrix in matrices]) for at in (0, -1))
    if bits < least:
        raise InfeasibleTarget(
            f"{method.name} needs at least {least:.3f} bits per weight for the encoder, not {bits:g}.", (least, most)
        )
    chosen: list[LevelArray] = []
    for group in [matrices] if job.scope == "model" else [[matrix] for matrix in matrices]:
        chosen += allocate([each.table for each in group], partial(_fits, bits, group))
    values = {}
    for matrix, levels in zip(matrices, chosen, strict=True):
        weight, seen = encoder.weights[matrix.name], known[matrix.name]
        tensor = method.quantize(weight, levels, seen, settings)
        if job.refine and seen is not None:
            tensor = refine_for(weight, tensor, seen, method.row_weights(weight, seen, settings))
        values[matrix.name] = dequantize(tensor)
    return values, _stored(matrices, chosen)


@dataclass(frozen=True)
class _Matrix:
    """What there is to choose from for one matrix."""

    name: str
    levels: Levels
    table: Table
    weights: int

    @classmethod
    def of(
        cls, name: str, method: Method, weight: Floats, known: MatrixStatistics | None, settings: Settings
    ) -> _Matrix:
        """With measured errors."""
        levels = method.levels((weight.shape[0], weight.shape[1]), settings)
        return cls(name, levels, Table(levels.nbytes, method.errors(weight, known, settings)), weight.size)

    def flat(self, at: int) -> LevelArray:
        """One level for all units."""
        return np.full(self.levels.units, at % self.levels.count, np.uint8)


def _fits(bits: float, matrices: Sequence[_Matrix], chosen: Sequence[LevelArray]) -> bool:
    return _stored(matrices, chosen) <= bits


def _stored(matrices: Sequence[_Matrix], chosen: Sequence[LevelArray]) -> float:
    """Bits per weight."""
    nbytes = sum(
        matrix.levels.overhead + int(np.asarray(matrix.levels.nbytes, np.int64)[levels].sum())
        for matrix, levels in zip(matrices, chosen, strict=True)
    )
    return 8 * nbytes / sum(matrix.weights for matrix in matrices)
