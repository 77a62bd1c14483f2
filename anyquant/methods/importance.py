"""What a squared error of a weight counts, from the statistics of a calibration.

By ``--importance``: ``activation``, the second moment of the input, E[x_j^2] (L-diag in terms of SKIM, arXiv
2412.04180); ``fisher``, E[g_i^2 x_j^2] with g the gradient of the loss by the output (S-diag, which needs much text);
``gradient``, E[g_i^2] E[x_j^2], which takes little text and lets rows compete over the whole model.

To a row's own gradient .3 of the matrix' mean is added. Gradients tell of small errors alone: an attention head that
sees one token whatever its query has none, and is lost all the same if its rows get no bits. Measured on SmolLM2-135M,
KL to the source at 3.2 and 4.4 bits: one width for all rows .68 and .14; gradients as they are .58 and .27, most of it
from one head; with .3 of the mean .48 and .096, with all of it .48 and .100, the root of the gradient .52 and .096.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anyquant.feedback import LEAST_POWER
from anyquant.methods.protocol import Floats

if TYPE_CHECKING:
    from anyquant.calibration import MatrixStatistics

CHUNK = 1 << 18  # weights handled at a time
SHARED = 0.3  # of the mean gradient, added to each row's own


class Importance:
    """Of one matrix; 1 everywhere where there are no statistics.

    Attributes:
        of_rows: float32 [out], a factor that all of a row has in common; None for 1.
        in_nats: whether weighted errors are rises of the loss (twice them), which compare across matrices.
    """

    def __init__(
        self, weight: Floats, statistics: MatrixStatistics | None, shared: float = SHARED, *, gradients: bool = True
    ) -> None:
        """Take what is known of a matrix.

        Args:
            weight: float32 [out, in].
            statistics: of its input and its gradients.
            shared: a row's part of the mean gradient.
            gradients: whether they are looked at.
        """
        fisher = statistics.fisher() if statistics and gradients else None
        gradient = statistics.gradient() if statistics and gradients else None
        # A factor for a whole row changes nothing in how the row is clustered.
        self.of_rows = None if gradient is None else _shared(gradient, shared)
        self.in_nats = fisher is not None or gradient is not None
        if fisher is not None:
            self._values: Floats = _shared(fisher, shared)
        elif statistics is not None:
            self._values = statistics.diagonal
        else:
            self._values = np.ones(weight.shape[1], np.float32)
        mean = float(self._values.mean(dtype=np.float64))
        self._least = np.float32(LEAST_POWER * mean if mean > 0 else 1.0)
        self._numbers, self._columns = np.arange(len(weight)), weight.shape[1]

    def all(self, rows: Any) -> Floats:
        """Float32 [rows, in], without the factor of the rows."""
        part = self._values[rows] if self._values.ndim == 2 else self._values[None]
        return np.broadcast_to(np.maximum(part, self._least), (len(self._numbers[rows]), self._columns))

    def rows(self, rows: Any, outliers: NDArray[np.int64]) -> Floats:
        """The same with zeros at outliers, which take no part in clustering; [in] where all rows share it.

        Args:
            rows: a slice, or ascending numbers of rows.
            outliers: flat indices, ascending.
        """
        if self._values.ndim == 1 and not len(outliers):
            return np.maximum(self._values, self._least)
        part = self.all(rows).copy()
        chosen = self._numbers[rows]
        row, column = np.divmod(outliers, self._columns)
        place = np.searchsorted(chosen, row)
        inside = (place < len(chosen)) & (chosen[np.minimum(place, len(chosen) - 1)] == row)
        part[place[inside], column[inside]] = 0
        return part

    def whole(self, rows: Any) -> Floats:
        """Float32 [rows, in], the factor of the rows included."""
        part = self.all(rows)
        return part if self.of_rows is None else part * self.of_rows[self._numbers[rows], None]

    def by_rows(self) -> Floats | None:
        """What a row counts by its gradients, float32 [out], up to a factor; None where none is known."""
        if self._values.ndim == 1:
            return self.of_rows
        rows: Floats = self._values.mean(axis=1, dtype=np.float64).astype(np.float32)
        return rows

    def scale(self, weight: Floats) -> float:
        """What weighted errors are multiplied with, so that they compare across matrices as well as they can.

        1 for rises of the loss. Errors weighted by activations alone, or not at all, are divided by the matrix' own
        sum of importance times squared weight, so that every matrix counts by its number of weights.
        """
        if self.in_nats:
            return 1.0
        power = 0.0
        for rows in chunks(weight):
            power += float(np.einsum("ij,ij,ij->", self.all(rows), weight[rows], weight[rows], dtype=np.float64))
        return weight.size / max(power, 1e-300)


def chunks(weight: Floats, rows: NDArray[np.int64] | None = None) -> Iterator[Any]:
    """Slices of all rows, or parts of an ascending selection of rows, of some hundred thousand weights each."""
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight) if rows is None else len(rows), step):
        part = slice(start, start + step)
        yield part if rows is None else rows[part]


def _shared(gradients: Floats, share: float) -> Floats:
    """Squared gradients [out] or [out, in], each with its share of the mean over the rows."""
    shared: Floats = gradients + np.float32(share) * gradients.mean(axis=0, dtype=np.float64).astype(np.float32)
    return shared
