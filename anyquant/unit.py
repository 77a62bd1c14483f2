"""The unit of work: one matrix, quantized as a job wants it, by a pure function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anyquant import ir
from anyquant.job import Job
from anyquant.measuring import naming
from anyquant.methods import get_method
from anyquant.refinement.calibrated import refine_for

if TYPE_CHECKING:
    from anyquant.calibration import MatrixStatistics


def quantize_matrix(
    job: Job, name: str, weight: NDArray[np.float32], chosen: NDArray[np.uint8], known: MatrixStatistics | None
) -> ir.Tensor:
    """What stands for a matrix, refined if the job says so.

    Args:
        job: gives method and settings.
        name: of the matrix, for messages.
        weight: float32 [out, in].
        chosen: levels of its units, uint8.
        known: what the calibration saw of it, if anything.

    Raises:
        AnyquantError: the method cannot take the weights or the statistics; names the matrix.
    """
    with naming(name):
        method, settings = get_method(job.method), job.settings
        tensor = method.quantize(weight, chosen, known, settings)
        if job.refine and known is not None:
            tensor = refine_for(weight, tensor, known, method.row_weights(weight, known, settings))
    return tensor
