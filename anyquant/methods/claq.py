"""CLAQ: each column owns a codebook, fitted to the column after the errors of earlier ones were made up for.

Source: Wang et al., "CLAQ: Pushing the Limits of Low-Bit Post-Training Quantization for LLMs" (arXiv 2405.17233) and
its published code: GPTQ's error feedback in the order of activations, k-means per column, bits by column ("adaptive
precision") and weights kept in full precision ("outlier reservation"), both by how many outliers a column has.

Codes are stored in the order of the matrix, reserved weights with the value that feedback gave them. The clustering is
exact (:mod:`anyquant.clustering`). What differs from the paper is an option each, and ``--profile paper`` is the paper:

- bits go to the columns that lose most, at any width. With U the factor of :mod:`anyquant.feedback`, the error of the
  output is the sum over columns of (error of the column as it then is)^2 / U_jj^2 (GPTQ, section 3); the column as it
  was stands in for the column as it will be. Measured on a layer of SmolLM2-135M, error of the output at 2.3 and 3.0
  bits, all counted: .0210 and .0091; with H_jj for 1 / U_jj^2 .0226 and .0103;
- rows count in a column's clustering by their gradients: 5 % less error as weighted by them, 3 to 4 % more as it is;
- weights are reserved only when asked for, and take no part in the clustering: at equal bits .1 % of them, chosen by
  what they cost, leave 2 to 4 % more error, .5 % by the paper's rule 7 to 11 %.

The published code takes the share of reserved weights from the wrong column beyond the first 128; this one does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anyquant.clustering import assign, kmeans
from anyquant.feedback import DAMPING, activation_order, uncompensated, with_feedback
from anyquant.ir import FP16_MAX, CodebookSpec, Tensor
from anyquant.methods.channels import (
    PALETTE_HELP,
    Bools,
    Channels,
    assemble,
    channel_levels,
    chosen_widths,
    in_order,
    resolve_palette,
    widths_of,
)
from anyquant.methods.codebooks import excess, require_fp16, share
from anyquant.methods.importance import Importance, chunks
from anyquant.methods.options import Option, complete
from anyquant.methods.protocol import Floats, JobDefaults, LevelArray, Levels, Method, Settings

if TYPE_CHECKING:
    from anyquant.calibration import MatrixStatistics

_THRESHOLD = 13.0  # an outlier is as many times as large as the mean magnitude of the matrix
_RICH = 0.1  # of the columns reserve more
_RESERVED = (0.014, 0.004)  # at each end of a rich column and of any other, for 1 % in all
_NONE = np.empty(0, np.float16)


class ClaqMethod(Method):
    """A codebook per column, with error feedback."""

    name = "claq"
    summary = "codebook per column, with error feedback"
    options: tuple[Option, ...] = (
        Option("palette", "auto", PALETTE_HELP, paper="paper"),
        Option(
            "allocation_rule",
            "gain",
            "columns get bits by what these save, or by their number of outliers",
            choices=("gain", "outlier_order"),
            paper="outlier_order",
        ),
        Option("outliers", 0.0, "percent of the weights kept in FP16", low=0.0, high=10.0, paper=1.0),
        Option(
            "outlier_rule",
            "loss",
            "which: those that stick out at most cost, or both ends of each column, more where outliers are many",
            choices=("loss", "dynamic"),
            paper="dynamic",
            idle_with=("outliers", 0.0),
        ),
        Option(
            "row_weights",
            "gradient",
            "what rows count in the clustering: their gradients where there are any, or all the same",
            choices=("gradient", "none"),
            paper="none",
        ),
        Option(
            "cluster_outliers",
            False,
            "kept weights take part in the clustering all the same",
            paper=True,
            idle_with=("outliers", 0.0),
        ),
        Option("damping", DAMPING, "of the second moment, relative to its mean diagonal", low=0.0, high=1.0),
        Option("zero_dead", False, "columns whose input was always 0 become 0", paper=True),
    )

    def settings(self, options: Settings, bits: float | None = None) -> dict[str, Any]:
        """Complete and check the options; the paper has codes of 2 and 4 bits below 3, of 3 and 4 from there on.

        Raises:
            UsageError: unknown option or value.
        """
        settings = complete(self.name, self.options, options)
        return {**settings, "palette": resolve_palette(self.name, settings, bits, ("2,4", "3,4", "2,3,4"))}

    def has_losses(self, settings: Settings, importance: str) -> bool:
        """Not where the table is an order."""
        return bool(settings["allocation_rule"] == "gain")

    def row_weights(self, weight: Floats, statistics: MatrixStatistics, settings: Settings) -> Floats | None:
        """As they count in the clustering."""
        return Importance(weight, statistics).by_rows() if settings["row_weights"] == "gradient" else None

    def defaults(self, settings: Settings) -> JobDefaults:
        """The paper knows no gradients, and no budget of the whole model, over which columns have no order."""
        importance = "activation" if settings["profile"] == "paper" else "gradient"
        return JobDefaults(importance, "matrix" if settings["allocation_rule"] == "outlier_order" else None)

    def levels(self, shape: tuple[int, int], settings: Settings) -> Levels:
        """Widths of the palette, as far as a column takes less than in FP16."""
        return channel_levels(shape, 1, widths_of(settings["palette"], shape[0]), _outlier_count(shape, settings))

    def spec(self, shape: tuple[int, int], chosen: LevelArray, settings: Settings) -> CodebookSpec:
        """The form of a matrix whose columns have these levels."""
        widths = chosen_widths(widths_of(settings["palette"], shape[0]), chosen)
        return CodebookSpec.from_bits(shape, 1, widths, outliers=_outlier_count(shape, settings))

    def errors(self, weight: Floats, statistics: MatrixStatistics | None, settings: Settings) -> NDArray[np.float64]:
        """Weighted squared errors of each column at each level, float64 [in, levels], as far as feedback leaves them.

        With ``outlier_order`` a table that makes the columns with most outliers come first, level by level.

        Raises:
            InputError: a weight lies outside FP16, or the second moment is not one of finite inputs.
        """
        require_fp16(weight)
        shape = (weight.shape[0], weight.shape[1])
        channels = _channels(weight, statistics, settings)
        moment = _moment(statistics, shape[1])
        _, left = uncompensated(moment, activation_order(np.diag(moment)), settings["damping"])
        removed, ends = _sticking_out(channels, settings, left), _ends(weight, statistics, settings)
        if ends is not None:
            removed = np.zeros(channels.values.shape, bool)
            for j, values in enumerate(channels.values):
                removed[j, _extremes(values, *ends[j])] = True
        table = channels.errors(widths_of(settings["palette"], shape[0]), removed)
        table *= left[:, None] * channels.scale
        if settings["allocation_rule"] == "gain":
            return table
        return in_order(table, self.levels(shape, settings), outlier_order(weight, statistics))

    def quantize(
        self, weight: Floats, chosen: LevelArray, statistics: MatrixStatistics | None, settings: Settings
    ) -> Tensor:
        """Codebooks and codes of float32 [out, in] with these levels.

        Raises:
            InputError: a weight lies outside FP16, or the second moment is not one of finite inputs.
        """
        require_fp16(weight)
        shape = (weight.shape[0], weight.shape[1])
        widths = chosen_widths(widths_of(settings["palette"], shape[0]), chosen)
        channels = _channels(weight, statistics, settings)
        moment = _moment(statistics, shape[1])
        order = activation_order(np.diag(moment))
        factor, left = uncompensated(moment, order, settings["damping"])
        reserved = _sticking_out(channels, settings, left)
        ends = _ends(weight, statistics, settings)
        if reserved is None and ends is not None:
            reserved = np.zeros(shape[::-1], bool)
        clustered_without = None if settings["cluster_outliers"] else reserved
        codes = np.empty(shape[::-1], np.uint8)
        codebooks = [_NONE] * shape[1]

        def column(j: int, values: Floats) -> Floats:
            values = np.clip(values, -FP16_MAX, FP16_MAX)
            if ends is not None and reserved is not None:
                reserved[j, _extremes(values, *ends[j])] = True
            counts = channels.counts(slice(j, j + 1), clustered_without)
            centroids = kmeans(values[None], counts, 1 << int(widths[j])).astype(np.float16)
            codes[j] = assign(values[None], centroids)[0]
            codebooks[j] = centroids[0]
            result: Floats = centroids[0, codes[j]].astype(np.float32)
            if reserved is not None:
                result[reserved[j]] = values[reserved[j]].astype(np.float16)  # as it is stored
            return result

        result = with_feedback(weight, moment, column, order=order, factor=factor, zero_dead=settings["zero_dead"])
        spec = self.spec(shape, chosen, settings)
        return assemble(spec, widths, codes, codebooks, result, channels.flat(reserved))


def outlier_order(weight: Floats, statistics: MatrixStatistics | None) -> NDArray[np.int64]:
    """Columns by their number of outliers, most first; equal ones by the power of what they add to the output.

    An outlier is at least 13 times as large as the mean magnitude of the matrix, as in the published code, which takes
    equal columns in no order.

    Args:
        weight: float32 [out, in], before any feedback.
        statistics: of its input.

    Returns:
        int64 [in].
    """
    magnitude = np.abs(weight)
    outliers = (magnitude >= _THRESHOLD * magnitude.mean(dtype=np.float64)).sum(axis=0)
    power = np.einsum("ij,ij->j", weight, weight, dtype=np.float64)
    if statistics is not None:
        power *= statistics.diagonal
    return np.lexsort((-power, -outliers))


def _channels(weight: Floats, statistics: MatrixStatistics | None, settings: Settings) -> Channels:
    return Channels(weight, 1, statistics, gradients=settings["row_weights"] == "gradient")


def _moment(statistics: MatrixStatistics | None, columns: int) -> Floats:
    return np.eye(columns, dtype=np.float32) if statistics is None else statistics.full()


def _ends_of_column(out: int, columns: int, settings: Settings) -> tuple[int, list[tuple[int, int]]]:
    """How many columns are rich, and how many weights a rich one and any other keep: (smallest, largest) each."""
    percent = float(settings["outliers"])
    kept = []
    for one_percent in _RESERVED:
        ratio = percent * one_percent
        smallest = out - round(out * (1 - ratio))
        kept.append((smallest, min(round(out * ratio) + 1, out - smallest)))
    return round(_RICH * columns), kept


def _outlier_count(shape: tuple[int, int], settings: Settings) -> int:
    if settings["outlier_rule"] == "loss" or not settings["outliers"]:
        return share(settings, "outliers", shape)
    rich, (more, fewer) = _ends_of_column(*shape, settings)
    return rich * sum(more) + (shape[1] - rich) * sum(fewer)


def _ends(weight: Floats, statistics: MatrixStatistics | None, settings: Settings) -> NDArray[np.int64] | None:
    """How many of its smallest and largest weights each column keeps, int64 [in, 2]; None if the rule is another."""
    if settings["outlier_rule"] != "dynamic" or not settings["outliers"]:
        return None
    rich, (more, fewer) = _ends_of_column(weight.shape[0], weight.shape[1], settings)
    ends = np.tile(np.array(fewer, np.int64), (weight.shape[1], 1))
    ends[outlier_order(weight, statistics)[:rich]] = more
    return ends


def _extremes(values: Floats, smallest: int, largest: int) -> NDArray[np.int64]:
    """Where the smallest and the largest values are; of equal ones the smallest come first."""
    order = np.argsort(values, kind="stable")
    return np.concatenate([order[:smallest], order[len(order) - largest :]])


def _sticking_out(channels: Channels, settings: Settings, left: NDArray[np.float64]) -> Bools | None:
    """The weights that the rule ``loss`` keeps, bool [in, out]; None if there are none, or the rule is another.

    Those whose excess over their column's bulk costs most, squared and weighted as errors are.
    """
    columns, out = channels.values.shape
    count = share(settings, "outliers", (out, columns))
    if settings["outlier_rule"] != "loss" or not count:
        return None
    score = np.empty(channels.values.shape, np.float32)
    for part in chunks(channels.values):
        score[part] = channels.counts(part) * excess(channels.values[part]) ** 2 * left[part, None]
    return channels.most(score, count)
