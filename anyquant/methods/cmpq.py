"""CMPQ: each column owns a codebook; columns with strong inputs get more bits, two kinds of outliers stay in FP16.

Source: Chen et al., "Channel-Wise Mixed-Precision Quantization for Large Language Models" (arXiv 2410.13056): bits by
the activation norm of channels, k-means per channel, outliers by activation and by what the quantization did to them.
There is no published code. That a channel is an input, a column, is inferred: the norm is that of an input, and all
weights of a column meet the same input, so that clustering needs no weights and nothing but E[x_j^2] has to be known.
It is an option; the norm of a row is that of its output with inputs taken as uncorrelated, and its clustering weights
inputs by their power. Measured on SmolLM2-135M, error of the output at equal bits, all counted, columns and rows:

    matrix               2.5 bits      3.3 bits      4.3 bits
    gate [1536, 576]    .040  .049    .015  .017    .0042 .0054
    down [576, 1536]    .060  .072    .024  .025    .0076 .0066
    query [576, 576]    .019  .018    .007  .007    .0024 .0020
    key [192, 576]      .021  .018    .009  .006    .0034 .0018

Columns are the default: three quarters of the weights are in matrices of the first two kinds. Rows suit matrices with
few of them, where the codebook of a column is dear. Bits by what they save, at any width, leave a quarter less error
than bits by norm. Outliers of either rule cost more than they save at equal bits; by code bits alone they look free.

No gradients are needed. Where a calibration recorded some they only scale errors, so that these compare across
matrices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anyquant.clustering import assign, kmeans
from anyquant.errors import UsageError
from anyquant.ir import CodebookSpec, Tensor
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
from anyquant.methods.codebooks import require_fp16, share
from anyquant.methods.importance import chunks
from anyquant.methods.options import Option, complete
from anyquant.methods.protocol import Floats, JobDefaults, LevelArray, Levels, Method, Settings

if TYPE_CHECKING:
    from anyquant.calibration import MatrixStatistics

_NONE = np.empty(0, np.float16)
_AXES = {"row": 0, "column": 1}


class CmpqMethod(Method):
    """A codebook per column or row, bits by activation, outliers by two rules."""

    name = "cmpq"
    summary = "codebook per column, bits by activation norms"
    options: tuple[Option, ...] = (
        Option("axis", "column", "which channels own codebooks", choices=("column", "row")),
        Option("palette", "auto", PALETTE_HELP, paper="paper"),
        Option(
            "allocation_rule",
            "gain",
            "channels get bits by what these save, or by their activation norm",
            choices=("gain", "norm"),
            paper="norm",
        ),
        Option(
            "exchange",
            0.0,
            "with norm: percent of the channels that have the next width before as many have the one between",
            low=0.0,
            high=50.0,
            idle_with=("allocation_rule", "gain"),
        ),
        Option(
            "outliers_activation",
            0.0,
            "percent of the weights kept in FP16: the largest, times the input's norm",
            low=0.0,
            high=10.0,
            paper=0.25,
        ),
        Option(
            "outliers_error",
            0.0,
            "percent of the weights kept in FP16: those that the clustering served worst",
            low=0.0,
            high=10.0,
            paper=0.25,
        ),
    )

    def settings(self, options: Settings, bits: float | None = None) -> dict[str, Any]:
        """Complete and check the options; the paper has codes of 2 and 3 bits below 3, of 3 and 4 from there on.

        Raises:
            UsageError: unknown option or value, or an exchange that has no width between two others.
        """
        settings = complete(self.name, self.options, options)
        exact = "2,3,4" if settings["exchange"] and bits == 3 else "3,4"
        palette = resolve_palette(self.name, settings, bits, ("2,3", exact, "2,3,4"))
        if settings["exchange"] and palette != "auto" and palette.count(",") < 2:
            raise UsageError(
                f"the option exchange of the method {self.name} is {settings['exchange']:g}, but the palette {palette} "
                "has no width between two others: leave it out, or set a palette of three widths such as 2,3,4."
            )
        return {**settings, "palette": palette}

    def wants_moments(self, settings: Settings) -> str:
        """Nothing does."""
        return ""

    def has_losses(self, settings: Settings, importance: str) -> bool:
        """Not where the table is an order."""
        return bool(settings["allocation_rule"] == "gain")

    def defaults(self, settings: Settings) -> JobDefaults:
        """Norms of activations alone, by which matrices do not compare."""
        return JobDefaults("norms", "matrix")

    def levels(self, shape: tuple[int, int], settings: Settings) -> Levels:
        """Widths of the palette, as far as a channel takes less than in FP16."""
        axis = _AXES[settings["axis"]]
        return channel_levels(shape, axis, _widths(shape, settings), sum(_outlier_counts(shape, settings)))

    def spec(self, shape: tuple[int, int], chosen: LevelArray, settings: Settings) -> CodebookSpec:
        """The form of a matrix whose channels have these levels."""
        widths = chosen_widths(_widths(shape, settings), chosen)
        outliers = sum(_outlier_counts(shape, settings))
        return CodebookSpec.from_bits(shape, _AXES[settings["axis"]], widths, outliers=outliers)

    def errors(self, weight: Floats, statistics: MatrixStatistics | None, settings: Settings) -> NDArray[np.float64]:
        """Weighted squared errors of each channel at each level, float64 [channels, levels].

        Without what ``outliers_error`` saves, which depends on all channels' levels. With ``norm`` a table that makes
        the channels with the greatest norm come first.

        Raises:
            InputError: a weight lies outside FP16, in which codebooks are stored.
        """
        require_fp16(weight)
        shape = (weight.shape[0], weight.shape[1])
        channels = _channels(weight, statistics, settings)
        table = channels.errors(_widths(shape, settings), _by_activation(channels, shape, settings)) * channels.scale
        if settings["allocation_rule"] == "gain":
            return table
        # The power of a row is what it adds to the output; that of a column is its input's, whatever its weights.
        power = np.empty(len(channels.values))
        for part in chunks(channels.values):
            counts = channels.counts(part).astype(np.float64)
            power[part] = (
                counts[:, 0] if channels.axis else np.einsum("ij,ij,ij->i", counts, *[channels.values[part]] * 2)
            )
        order = np.argsort(-power, kind="stable")
        return in_order(table, self.levels(shape, settings), order, _stages(table.shape, settings))

    def quantize(
        self, weight: Floats, chosen: LevelArray, statistics: MatrixStatistics | None, settings: Settings
    ) -> Tensor:
        """Codebooks and codes of float32 [out, in] with these levels.

        Raises:
            InputError: a weight lies outside FP16, in which codebooks are stored.
        """
        require_fp16(weight)
        shape = (weight.shape[0], weight.shape[1])
        widths = chosen_widths(_widths(shape, settings), chosen)
        channels = _channels(weight, statistics, settings)
        removed = _by_activation(channels, shape, settings)
        codes = np.empty(channels.values.shape, np.uint8)
        codebooks = [_NONE] * len(widths)
        score = np.empty(channels.values.shape, np.float32)

        def cluster(members: NDArray[np.int64]) -> None:
            for width in np.unique(widths[members]):
                for part in chunks(channels.values, members[widths[members] == width]):
                    values, counts = channels.values[part], channels.counts(part, removed)
                    centroids = kmeans(values, counts, 1 << int(width)).astype(np.float16)
                    codes[part] = assign(values, centroids)
                    for channel, entries in zip(part.tolist(), centroids, strict=True):
                        codebooks[channel] = entries
                    served = np.take_along_axis(centroids.astype(np.float32), codes[part].astype(np.int64), axis=1)
                    score[part] = counts * (values - served) ** 2

        cluster(np.arange(len(widths)))
        count = _outlier_counts(shape, settings)[1]
        if count:
            worst = channels.most(score, count, removed)
            removed = worst if removed is None else removed | worst
            cluster(np.flatnonzero(worst.any(axis=1)))  # what is left of them can be served better
        return assemble(self.spec(shape, chosen, settings), widths, codes, codebooks, weight, channels.flat(removed))


def _channels(weight: Floats, statistics: MatrixStatistics | None, settings: Settings) -> Channels:
    return Channels(weight, _AXES[settings["axis"]], statistics, gradients=False)


def _widths(shape: tuple[int, int], settings: Settings) -> tuple[int, ...]:
    return widths_of(settings["palette"], shape[1 - _AXES[settings["axis"]]])


def _outlier_counts(shape: tuple[int, int], settings: Settings) -> tuple[int, int]:
    """By activation and by error."""
    return share(settings, "outliers_activation", shape), share(settings, "outliers_error", shape)


def _by_activation(channels: Channels, shape: tuple[int, int], settings: Settings) -> Bools | None:
    """The weights that are largest times the norm of their input, bool [channels, length]; None for none."""
    count = _outlier_counts(shape, settings)[0]
    if not count:
        return None
    score = np.empty(channels.values.shape, np.float32)
    for part in chunks(channels.values):
        score[part] = channels.counts(part) * channels.values[part] ** 2  # in the order of the roots
    return channels.most(score, count)


def _stages(shape: tuple[int, ...], settings: Settings) -> list[tuple[int, slice]] | None:
    """None for level by level; where channels are exchanged the first of them go on before the last ones start."""
    units, count = shape
    few = min(round(float(settings["exchange"]) / 100 * units), units // 2)
    if not few or count < 2:
        return None
    first, between, last = slice(0, few), slice(few, units - few), slice(units - few, units)
    stages = [(1, slice(0, units - few))]
    for level in range(2, count):
        stages += [(level, first), (level - 1, last), (level, between)]
    return [*stages, (count - 1, last)]
