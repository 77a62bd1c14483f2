"""SKIM: each row owns a codebook, and as many bits as it is worth.

Source: Bai et al., "SKIM: Any-bit Quantization Pushing The Limits of Post-Training Quantization" (arXiv 2412.04180),
section 3: errors of every row at every width by weighted k-means, greedy widths under a budget, codebooks at the
chosen width. The clustering is exact (:mod:`anyquant.clustering`), the budget is charged with codebooks and all other
overhead (:mod:`anyquant.allocation`), and widths go down to 0 bits, a row of one value.

What a squared error counts, by ``--importance``: ``activation``, the second moment of the input, E[x_j^2] (L-diag in
the paper's terms); ``fisher``, E[g_i^2 x_j^2] with g the gradient of the loss by the output (S-diag, the paper's
choice, which needs much text); ``gradient``, the default, E[g_i^2] E[x_j^2], which takes little text and lets rows
compete over the whole model.

To a row's own gradient .3 of the matrix' mean is added. Gradients tell of small errors alone: an attention head that
sees one token whatever its query has none, and is lost all the same if its rows get no bits. Measured on SmolLM2-135M,
KL to the source at 3.2 and 4.4 bits: one width for all rows .68 and .14; gradients as they are .58 and .27, most of it
from one head; with .3 of the mean .48 and .096, with all of it .48 and .100, the root of the gradient .52 and .096.

The paper's trained scaling vector and error feedback are not there yet.

Outliers, an option that the paper does not have: the weights that stick out most keep their value in FP16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anyquant.clustering import assign, kmeans, kmeans_errors
from anyquant.errors import InputError, UsageError
from anyquant.ir import CodebookSpec, Tensor
from anyquant.ir.packing import code_offsets, pack, row_bytes
from anyquant.methods.protocol import Floats, LevelArray, Levels, Settings

if TYPE_CHECKING:
    from anyquant.calibration import MatrixStatistics

MAX_OUTLIERS = 10.0  # percent
_CHUNK = 1 << 18  # weights handled at a time
_DEAD = 1e-4  # least weight of a column, relative to the mean: no calibration text is all texts
_SHARED = 0.3  # of the mean gradient, added to each row's own
_REACH = 1.0  # of a row's bulk beyond its quartiles, in units of their distance
_FP16_MAX = 65504.0


class SkimMethod:
    """A codebook per row, 0 to 8 bits each."""

    name = "skim"
    summary = "codebook per row, any number of bits; scaling vector and refinement to come"
    needs_statistics = True

    def settings(self, options: Settings) -> dict[str, Any]:
        """Complete and check the options: outliers, percent of the weights.

        Raises:
            UsageError: unknown option or value.
        """
        settings = {"outliers": 0.0, **options}
        unknown = sorted(set(settings) - {"outliers"})
        if unknown:
            raise UsageError(f"the method skim has no option {unknown[0]!r}; it has outliers.")
        if not 0 <= settings["outliers"] <= MAX_OUTLIERS:
            raise UsageError(
                f"--outliers is {settings['outliers']} percent of the weights, must be 0..{MAX_OUTLIERS:g}."
            )
        return settings

    def levels(self, shape: tuple[int, int], settings: Settings) -> Levels:
        """Widths 0 to 8 of each row, as far as a row takes less than in FP16."""
        nbytes = tuple(_row_bytes(shape[1], width) for width in _widths(shape[1]))
        codes = tuple(row_bytes(shape[1], width) for width in _widths(shape[1]))
        flat = self.spec(shape, np.zeros(shape[0], np.uint8), settings)
        return Levels(shape[0], nbytes, codes, flat.nbytes - shape[0] * nbytes[0])

    def spec(self, shape: tuple[int, int], chosen: LevelArray, settings: Settings) -> CodebookSpec:
        """The form of a matrix whose rows have these widths."""
        return CodebookSpec.from_bits(shape, 0, chosen, outliers=_outlier_count(shape, settings))

    def errors(self, weight: Floats, statistics: MatrixStatistics | None, settings: Settings) -> NDArray[np.float64]:
        """Weighted squared errors of each row at each width, relative to the matrix, float64 [out, widths].

        With gradients they compare across matrices as they are; those of activations are divided by the matrix' own sum
        of importance times squared weight, so that every matrix counts by its number of weights.
        """
        importance = _Importance(weight, statistics)
        outliers = _outliers(weight, importance, settings)
        widths = _widths(weight.shape[1])
        errors = np.empty((len(weight), len(widths)))
        power = 0.0
        for rows in _chunks(weight):
            values, weights = weight[rows], importance.rows(rows, outliers)
            errors[rows] = kmeans_errors(values, weights, [1 << width for width in widths])
            power += float(np.einsum("ij,ij,ij->", importance.all(rows), values, values, dtype=np.float64))
        if importance.of_rows is not None:
            return errors * importance.of_rows[:, None].astype(np.float64)
        return errors if importance.comparable else errors * (weight.size / max(power, 1e-300))

    def quantize(
        self, weight: Floats, chosen: LevelArray, statistics: MatrixStatistics | None, settings: Settings
    ) -> Tensor:
        """Codebooks and codes of float32 [out, in] with these widths.

        Raises:
            InputError: a weight lies outside FP16, in which codebooks are stored.
        """
        largest = np.abs(weight).max()
        if largest > _FP16_MAX:
            row, column = np.unravel_index(np.abs(weight).argmax(), weight.shape)
            raise InputError(
                f"the weight {weight[row, column]} at [{row}, {column}] does not fit into FP16 (+-{_FP16_MAX:.0f}), in "
                "which codebooks are stored. The method block holds it."
            )
        spec = self.spec((weight.shape[0], weight.shape[1]), chosen, settings)
        importance = _Importance(weight, statistics)
        outliers = _outliers(weight, importance, settings)
        offsets = code_offsets(chosen, weight.shape[1])
        starts = np.concatenate([[0], np.cumsum(1 << chosen.astype(np.int64))])
        codes = np.zeros(spec.code_bytes, np.uint8)
        codebook = np.zeros(spec.codebook_entries, np.float16)
        for width in np.unique(chosen):
            members = np.flatnonzero(chosen == width)
            for part in _chunks(weight, members):
                values = weight[part]
                centroids = kmeans(values, importance.rows(part, outliers), 1 << int(width)).astype(np.float16)
                packed = pack(assign(values, centroids), int(width))
                codes[offsets[part][:, None] + np.arange(packed.shape[1])] = packed
                codebook[starts[part][:, None] + np.arange(centroids.shape[1])] = centroids
        arrays: dict[str, np.ndarray] = {".bits": chosen.astype(np.uint8), ".codes": codes, ".codebook": codebook}
        return Tensor(spec, arrays | _outlier_arrays(weight, outliers, spec))


class _Importance:
    """What a squared error counts, from the statistics; 1 everywhere where there are none."""

    def __init__(self, weight: Floats, statistics: MatrixStatistics | None) -> None:
        fisher = statistics.fisher() if statistics else None
        gradient = statistics.gradient() if statistics else None
        # A factor for a whole row changes nothing in how the row is clustered.
        self.of_rows = None if gradient is None else _shared(gradient)
        self.comparable = fisher is not None
        if fisher is not None:
            self._values: Floats = _shared(fisher)
        elif statistics is not None:
            self._values = statistics.diagonal
        else:
            self._values = np.ones(weight.shape[1], np.float32)
        mean = float(self._values.mean(dtype=np.float64))
        self._least = np.float32(_DEAD * mean if mean > 0 else 1.0)
        self._numbers, self._columns = np.arange(len(weight)), weight.shape[1]

    def all(self, rows: Any) -> Floats:
        """Float32 [rows, in]."""
        part = self._values[rows] if self._values.ndim == 2 else self._values[None]
        return np.broadcast_to(np.maximum(part, self._least), (len(self._numbers[rows]), self._columns))

    def rows(self, rows: Any, outliers: NDArray[np.int64]) -> Floats:
        """The same with zeros at outliers, which take no part in clustering; [in] where all rows share it."""
        if self._values.ndim == 1 and not len(outliers):
            return np.maximum(self._values, self._least)
        part = self.all(rows).copy()
        chosen = self._numbers[rows]
        row, column = np.divmod(outliers, self._columns)
        place = np.searchsorted(chosen, row)
        inside = (place < len(chosen)) & (chosen[np.minimum(place, len(chosen) - 1)] == row)
        part[place[inside], column[inside]] = 0
        return part


def _shared(gradients: Floats) -> Floats:
    """Squared gradients [out] or [out, in], each with its share of the mean over the rows."""
    shared: Floats = gradients + np.float32(_SHARED) * gradients.mean(axis=0, dtype=np.float64).astype(np.float32)
    return shared


def _row_bytes(columns: int, width: int) -> int:
    """Bytes of a row's width, codes and codebook."""
    return 1 + row_bytes(columns, width) + 2 * (1 << width)


def _widths(columns: int) -> range:
    """The widths on offer; a codebook that makes its row larger than FP16 is none of them, but for the first two."""
    return range(2 + sum(_row_bytes(columns, width) <= 2 * columns for width in range(2, 9)))


def _chunks(weight: Floats, rows: NDArray[np.int64] | None = None) -> Iterator[Any]:
    """Slices of all rows, or parts of an ascending selection of rows."""
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(weight) if rows is None else len(rows), step):
        part = slice(start, start + step)
        yield part if rows is None else rows[part]


def _outlier_count(shape: tuple[int, int], settings: Settings) -> int:
    return round(float(settings["outliers"]) / 100 * shape[0] * shape[1])


def _outliers(weight: Floats, importance: _Importance, settings: Settings) -> NDArray[np.int64]:
    """Flat indices, ascending, of the weights whose excess over their row's bulk counts most in the matrix.

    The excess is what lies outside the quartiles by more than their distance, as in SqueezeLLM (arXiv 2306.07629,
    section 4.2), but squared and weighted as errors are; so a row may have many or none.
    """
    count = _outlier_count((weight.shape[0], weight.shape[1]), settings)
    if not count:
        return np.empty(0, np.int64)
    score = np.empty(weight.shape, np.float32)
    for rows in _chunks(weight):
        low, high = np.quantile(weight[rows], (0.25, 0.75), axis=1, keepdims=True)
        reach = _REACH * (high - low)
        excess = np.maximum(np.maximum(weight[rows] - (high + reach), (low - reach) - weight[rows]), 0)
        score[rows] = importance.all(rows) * excess**2
        if importance.of_rows is not None:
            score[rows] *= importance.of_rows[rows, None]
    flat = score.ravel()
    least = np.partition(flat, flat.size - count)[flat.size - count]
    above = np.flatnonzero(flat > least)
    return np.sort(np.concatenate([above, np.flatnonzero(flat == least)[: count - len(above)]]))


def _outlier_arrays(weight: Floats, outliers: NDArray[np.int64], spec: CodebookSpec) -> dict[str, np.ndarray]:
    if not len(outliers):
        return {}
    row, column = np.divmod(outliers, weight.shape[1])
    about = spec.arrays()
    return {
        ".outlier_indptr": np.searchsorted(row, np.arange(len(weight) + 1)).astype(np.uint32),
        ".outlier_index": column.astype(about[".outlier_index"][0]),
        ".outlier_value": weight[row, column].astype(np.float16),
    }
