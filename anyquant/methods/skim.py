"""SKIM: each row owns a codebook, and as many bits as it is worth.

Source: Bai et al., "SKIM: Any-bit Quantization Pushing The Limits of Post-Training Quantization" (arXiv 2412.04180),
section 3: errors of every row at every width by weighted k-means, greedy widths under a budget, codebooks at the
chosen width. The clustering is exact (:mod:`anyquant.clustering`), the budget is charged with codebooks and all other
overhead (:mod:`anyquant.allocation`), and widths go down to 0 bits, a row of one value.

What a squared error counts is said in :mod:`anyquant.methods.importance`.

The paper's factor per column (:mod:`anyquant.scaling`) is an option: on SmolLM2-135M at 3.25 bits it gains nothing,
KL .4385 in closed form against .4350 without.

Outliers, an option that the paper does not have: the weights that stick out most keep their value in FP16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anyquant.clustering import assign, kmeans
from anyquant.ir import FP16_MAX, CodebookSpec, Tensor
from anyquant.methods.codebooks import (
    CodebookBuilder,
    channel_bytes,
    clustering_errors,
    excess,
    largest,
    levels_of,
    offered_widths,
    require_fp16,
    share,
)
from anyquant.methods.importance import SHARED, Importance, chunks
from anyquant.methods.options import Option
from anyquant.methods.protocol import Floats, JobDefaults, LevelArray, Levels, Method, Settings
from anyquant.scaling import best_scale, gradient_scale

if TYPE_CHECKING:
    from anyquant.calibration import MatrixStatistics


_SENSITIVE = 0.1  # of the outliers; .05 of .5 % in SqueezeLLM


class SkimMethod(Method):
    """A codebook per row, 0 to 8 bits each."""

    name = "skim"
    summary = "codebook per row, any number of bits"
    options = (
        Option("outliers", 0.0, "percent of the weights that keep their value in FP16", low=0.0, high=10.0),
        Option(
            "outlier_rule",
            "excess",
            "which: what sticks out of its row at most cost; or the largest, and a tenth by importance (SqueezeLLM)",
            choices=("excess", "magnitude"),
            idle_with=("outliers", 0.0),
        ),
        Option(
            "shared",
            SHARED,
            "of the matrix' mean gradient, that every row's own is raised by, where gradients are recorded",
            low=0.0,
            high=100.0,
            paper=0.0,
        ),
        Option(
            "scale",
            "off",
            "a factor per column: solved for in closed form, or by gradient steps",
            choices=("off", "closed", "gradient"),
            paper="gradient",
        ),
        Option(
            "alternations",
            1,
            "of scale and codebooks; more fit the calibration text alone",
            low=1,
            high=8,
            idle_with=("scale", "off"),
        ),
        Option(
            "objective",
            "diag",
            "what bits are spread by: errors of weights, or of outputs",
            choices=("diag", "full"),
            paper="full",
        ),
    )

    def wants_moments(self, settings: Settings) -> str:
        """For L-full, and to learn a factor per column."""
        if settings["objective"] == "full":
            return "--set objective=full"
        return f"--set scale={settings['scale']}" if settings["scale"] != "off" else ""

    def has_losses(self, settings: Settings, importance: str) -> bool:
        """L-full takes gradients of rows, but none of single weights."""
        return bool(settings["objective"] == "diag" or importance != "fisher")

    def defaults(self, settings: Settings) -> JobDefaults:
        """The paper weights by S-diag, and spreads bits within each matrix."""
        return JobDefaults("fisher", "matrix") if settings["profile"] == "paper" else JobDefaults()

    def levels(self, shape: tuple[int, int], settings: Settings) -> Levels:
        """Widths 0 to 8 of each row, as far as a row takes less than in FP16."""
        widths = offered_widths(shape[1])
        flat = self.spec(shape, np.zeros(shape[0], np.uint8), settings)
        return levels_of(shape, 0, widths, flat.nbytes - shape[0] * channel_bytes(shape[1], 0))

    def spec(self, shape: tuple[int, int], chosen: LevelArray, settings: Settings) -> CodebookSpec:
        """The form of a matrix whose rows have these widths."""
        scaled = settings["scale"] != "off"
        return CodebookSpec.from_bits(shape, 0, chosen, input_scale=scaled, outliers=share(settings, "outliers", shape))

    def errors(self, weight: Floats, statistics: MatrixStatistics | None, settings: Settings) -> NDArray[np.float64]:
        """Errors of each row at each width, float64 [out, widths]: weighted squares, or of the outputs (L-full).

        Raises:
            InputError: a weight lies outside FP16, in which codebooks are stored.
        """
        require_fp16(weight)
        importance = Importance(weight, statistics, settings["shared"])
        outliers = _outliers(weight, importance, settings)
        widths = offered_widths(weight.shape[1])
        errors = np.empty((len(weight), len(widths)))
        moment = statistics.full() if statistics and settings["objective"] == "full" else None
        for rows in chunks(weight):
            weights = importance.rows(rows, outliers)
            if moment is None:
                errors[rows] = clustering_errors(weight[rows], weights, widths)
                continue
            for level, width in enumerate(widths):
                lost = (weight[rows] - _nearest(weight[rows], weights, width)) * (weights > 0)
                errors[rows, level] = np.maximum(np.einsum("ij,ij->i", lost @ moment, lost, dtype=np.float64), 0)
        if importance.of_rows is not None:
            errors *= importance.of_rows[:, None].astype(np.float64)
        return errors * importance.scale(weight)

    def quantize(
        self, weight: Floats, chosen: LevelArray, statistics: MatrixStatistics | None, settings: Settings
    ) -> Tensor:
        """Codebooks and codes of float32 [out, in] with these widths.

        Raises:
            InputError: a weight lies outside FP16, in which codebooks are stored.
        """
        require_fp16(weight)
        importance = Importance(weight, statistics, settings["shared"])
        outliers = _outliers(weight, importance, settings)
        spec = self.spec((weight.shape[0], weight.shape[1]), chosen, settings)
        scale = np.ones(weight.shape[1], np.float32)
        if spec.input_scale and statistics:
            moment = statistics.full()
            for _ in range(settings["alternations"]):
                scale = _rescaled(weight, chosen, importance, outliers, scale, moment, settings["scale"])
        builder = CodebookBuilder(spec, chosen)
        for part, codes, centroids in _clustered(weight, chosen, importance, outliers, scale):
            builder.put(part, codes, centroids)
        return builder.tensor(weight, outliers, scale if spec.input_scale else None)


def _clustered(
    weight: Floats, chosen: LevelArray, importance: Importance, outliers: NDArray[np.int64], scale: Floats
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.float16]]]:
    """Yield (rows, codes, centroids) under a scale a: sum s (w - a c)^2 is sum s a^2 (w / a - c)^2."""
    for width in np.unique(chosen):
        for part in chunks(weight, np.flatnonzero(chosen == width)):
            values = np.clip(weight[part] / scale, -FP16_MAX, FP16_MAX)
            centroids = kmeans(values, importance.rows(part, outliers) * scale**2, 1 << int(width)).astype(np.float16)
            yield part, assign(values, centroids), centroids


def _rescaled(
    weight: Floats,
    chosen: LevelArray,
    importance: Importance,
    outliers: NDArray[np.int64],
    scale: Floats,
    moment: Floats,
    how: str,
) -> Floats:
    """The best scale for the codes and centroids that there are under another one."""
    values = np.empty_like(weight)
    for part, codes, centroids in _clustered(weight, chosen, importance, outliers, scale):
        values[part] = np.take_along_axis(centroids.astype(np.float32), codes.astype(np.int64), axis=1)
    kept = weight.copy()
    kept.ravel()[outliers] = values.ravel()[outliers] = 0
    find = best_scale if how == "closed" else gradient_scale
    return find(kept, values, moment, scale, importance.of_rows)


def _nearest(values: Floats, weights: Floats, width: int) -> Floats:
    """The values float32 [rows, in] after k-means with so many bits."""
    centroids = kmeans(values, weights, 1 << width).astype(np.float16)
    found: Floats = np.take_along_axis(centroids.astype(np.float32), assign(values, centroids).astype(np.int64), axis=1)
    return found


def _outliers(weight: Floats, importance: Importance, settings: Settings) -> NDArray[np.int64]:
    """Flat indices, ascending, of the weights that keep their value.

    ``excess``: those whose excess over their row's bulk, squared and weighted as errors are, counts most in the matrix,
    so that a row may have many or none. ``magnitude``: as in SqueezeLLM (arXiv 2306.07629, section 4.2), whose
    threshold is symmetric: nine tenths are the largest, one tenth those whose errors count most.
    """
    count = share(settings, "outliers", (weight.shape[0], weight.shape[1]))
    if not count:
        return np.empty(0, np.int64)
    score = np.empty(weight.shape, np.float32)
    by_excess = settings["outlier_rule"] == "excess"
    for rows in chunks(weight):
        score[rows] = importance.whole(rows) * (excess(weight[rows]) ** 2 if by_excess else 1)
    if by_excess:
        return largest(score, count)
    sensitive = largest(score, round(_SENSITIVE * count))
    magnitude = np.abs(weight)
    magnitude.ravel()[sensitive] = np.inf
    return largest(magnitude, count)
