"""What a method is: the protocol that built-in and third-party methods share.

Methods are found through the entry-point group ``anyquant.methods``. They know matrices, not models.

A matrix consists of units that choose their number of bits alone: its rows, its columns, or the matrix as a whole. A
method says what each level costs in bytes, measures what it costs in error, and quantizes a matrix with the levels it
is given. How bits are spread over units is not the method's business: see :mod:`anyquant.allocation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from anyquant.ir import Spec, Tensor
from anyquant.methods.options import Option, complete

if TYPE_CHECKING:
    from anyquant.calibration import MatrixStatistics

Floats = NDArray[np.float32]
LevelArray = NDArray[np.uint8]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Levels:
    """What a matrix of some shape can choose from, in bytes.

    Attributes:
        units: how many things choose a level each: the rows or the columns of the matrix, or 1.
        nbytes: stored bytes of one unit at each level, ascending.
        code_bytes: those of them that are codes, which is all that ``--count index`` counts.
        overhead: stored bytes of the matrix whatever the levels.
    """

    units: int
    nbytes: tuple[int, ...]
    code_bytes: tuple[int, ...]
    overhead: int = 0

    @property
    def count(self) -> int:
        """Number of levels."""
        return len(self.nbytes)


@dataclass(frozen=True)
class JobDefaults:
    """What a job does unless it is told, with the settings that a method has.

    Attributes:
        importance: what the calibration records; see :class:`anyquant.calibration.CalibrationSettings`.
        allocation: who shares a budget; None: the model, or each matrix where errors do not compare across matrices.
    """

    importance: str = "gradient"
    allocation: str | None = None


class Method(Protocol):
    """The protocol; all functions are pure, so that units of work can run anywhere in any order.

    A class that derives from it gets what most methods have in common.

    Attributes:
        name: of the entry point.
        summary: one line for ``anyquant methods``.
        options: what there is to set.
    """

    name: str
    summary: str
    options: tuple[Option, ...]

    def settings(self, options: Settings, bits: float | None = None) -> dict[str, Any]:
        """Complete and check the options; the result is recorded in the IR as JSON.

        Args:
            options: name -> value; see :func:`anyquant.methods.options.complete`.
            bits: of codes that are asked for, where that is what the target counts: some papers choose by it.

        Raises:
            UsageError: an option that is unknown to the method or out of range.
        """
        return complete(self.name, self.options, options)

    def needs_statistics(self, settings: Settings) -> bool:
        """Whether ``errors`` and ``quantize`` want the statistics of a calibration."""
        return True

    def wants_moments(self, settings: Settings) -> str:
        """What with these settings needs E[x x^T] of the inputs and not just its diagonal, in words; "" for nothing."""
        return self.name

    def has_losses(self, settings: Settings, importance: str) -> bool:
        """Whether ``errors`` are squared errors weighted by all that ``importance`` records, and not an order.

        Half their sum over a model is an expected rise of the loss where gradients are among that.
        """
        return True

    def row_weights(self, weight: Floats, statistics: MatrixStatistics, settings: Settings) -> Floats | None:
        """What errors of each row count, float32 [out], where codebooks of columns are refined; None: all the same."""
        return None

    def defaults(self, settings: Settings) -> JobDefaults:
        """What a job does with these settings unless it is told."""
        return JobDefaults()

    def notes(self, shapes: Mapping[str, tuple[int, int]], settings: Settings) -> list[str]:
        """What a user should know of matrices, name -> [out, in], that the method cannot treat like all others."""
        return []

    def levels(self, shape: tuple[int, int], settings: Settings) -> Levels:
        """What a matrix [out, in] can choose from, fewest bytes first; from its shape alone."""

    def spec(self, shape: tuple[int, int], chosen: LevelArray, settings: Settings) -> Spec:
        """The form of a matrix whose units have these levels, uint8 [units]."""

    def errors(self, weight: Floats, statistics: MatrixStatistics | None, settings: Settings) -> NDArray[np.float64]:
        """Error of each unit at each level, float64 [units, levels], relative to the matrix.

        A squared error, weighted as the method thinks right. Without gradients, errors of different matrices do not
        compare; then it is divided by the same sum over the weights themselves, times the number of weights.
        """

    def quantize(
        self, weight: Floats, chosen: LevelArray, statistics: MatrixStatistics | None, settings: Settings
    ) -> Tensor:
        """The tensor that stands for ``weight``, float32 [out, in], with these levels."""
