"""Affine: blocks along a row with a scale and a zero point each, codes chosen with error feedback.

Source: Frantar et al., "GPTQ" (arXiv 2210.17323): columns are rounded one after the other, and the later ones make up
for what the earlier ones lost (:mod:`anyquant.feedback`). A value is (q - zero) * scale with q of 2, 4 or 8 bits,
the scale in FP16 and the zero point one of the codes: what ONNX Runtime's MatMulNBits holds. Columns are stored where
they were, so no permutation is needed.

With feedback an error in column j raises the output's error by 1 / U_jj^2 and not by H_jj: that much is left of the
input's power once the columns that come later have made up for the rest. Ranges are searched, and levels compared, by
that. Measured on SmolLM2-135M (2 and 4 bits, blocks of 32 to 256), the loss with feedback is .77 to 1.08 times what
rounding so predicts. By H_jj levels of one matrix are ranked alike, but matrices are not: feedback takes a third off
one matrix and nine tenths off another.

Output error in percent of the output's power, 192 rows of matrices of SmolLM2-135M dithered over their stored grid:

                                down_proj of layer 3    q_proj of 12    up_proj of 20
    bits/block                  2/32   2/128   4/32     2/32   4/32     2/32
    rounding                    16.1   25.1    .646     13.9   1.01     20.5
    feedback, whole ranges       9.2   14.0    .359     1.76   .075     6.36
    ranges searched by H_jj      6.8    8.0    .349     1.29   .084     4.99
    ranges searched by U_jj      6.7    7.9    .348     1.22   .069     4.66
    the same, order=blocks       6.5    8.1    .338     1.17   .065     4.54

On the sentence encoder all-MiniLM-L6-v2 (blocks of 64) order=blocks loses up to 10 % more than by activation; so with
short blocks both are tried (:mod:`anyquant.methods.affine_making`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anyquant.affine_grids import (
    Kind,
    counts_side_by_side,
    full_range_errors,
    search,
    side_by_side,
)
from anyquant.ir import AffineSpec, Tensor
from anyquant.methods.affine_making import Feedback, counts_of, make
from anyquant.methods.codebooks import require_fp16
from anyquant.methods.importance import Importance, chunks
from anyquant.methods.options import Option
from anyquant.methods.protocol import Floats, JobDefaults, LevelArray, Levels, Method, Settings

if TYPE_CHECKING:
    from anyquant.calibration import MatrixStatistics

BLOCKS = (16, 32, 64, 128, 256)


class AffineMethod(Method):
    """Integers of 2, 4 or 8 bits with a scale and a zero point per block; one width and block length per matrix."""

    name = "affine"
    summary = "integers with a scale per block (GPTQ), 2, 4 or 8 bits"
    options: tuple[Option, ...] = (
        Option("feedback", True, "whether later columns make up for the errors of earlier ones"),
        Option(
            "order",
            "auto",
            "in which columns are taken: by activation, with scales of the original weights; blocks by activation, or "
            "none, with scales of the values as they are by then; auto: if blocks are short, blocks or activation, "
            "what loses less, else activation",
            choices=("auto", "activation", "blocks", "none"),
            paper="activation",
            idle_with=("feedback", False),
        ),
        Option("clip", True, "whether ranges are searched for the least error", paper=False),
        Option(
            "blocks",
            "auto",
            "weights that share a scale; auto: what each matrix is worth",
            choices=("auto", *map(str, BLOCKS)),
            paper="128",
        ),
        Option("widths", "2,4,8", "bits on offer", choices=("2,4,8", "2,4", "2,8", "4,8", "2", "4", "8")),
        Option("symmetric", False, "whether zero points are in the middle of the codes"),
        Option(
            "damping",
            0.01,
            "of the moments, relative to their mean, in error feedback",
            low=0.0,
            high=1.0,
            idle_with=("feedback", False),
        ),
    )

    def needs_statistics(self, settings: Settings) -> bool:
        """For error feedback, and to search ranges."""
        return bool(settings["feedback"] or settings["clip"])

    def wants_moments(self, settings: Settings) -> str:
        """For error feedback."""
        return "--set feedback=yes" if settings["feedback"] else ""

    def defaults(self, settings: Settings) -> JobDefaults:
        """Matrices share the budget of the model: none has parts that could share its own."""
        return JobDefaults(allocation="model")

    def levels(self, shape: tuple[int, int], settings: Settings) -> Levels:
        """Pairs of bits and block length, fewest bytes first; of those with equal bytes the shorter block."""
        specs = _specs(shape, settings)
        return Levels(
            1, tuple(spec.nbytes for spec in specs), tuple(spec.nbytes - 3 * shape[0] * spec.blocks for spec in specs)
        )

    def spec(self, shape: tuple[int, int], chosen: LevelArray, settings: Settings) -> AffineSpec:
        """The form of a matrix with this pair."""
        return _specs(shape, settings)[int(chosen[0])]

    def errors(self, weight: Floats, statistics: MatrixStatistics | None, settings: Settings) -> NDArray[np.float64]:
        """What rounding with each pair loses, float64 [1, levels], as far as feedback does not make up for it.

        With ``clip`` by a coarse search, which finds most of what there is to find.

        Raises:
            InputError: a weight lies outside FP16, or the statistics are of no inputs.
        """
        require_fp16(weight, "scales")
        importance = Importance(weight, statistics)
        feedback = Feedback.by_activation(statistics, settings)
        levels = [(spec, Kind(spec.bits, settings["symmetric"])) for spec in _specs(_shape(weight), settings)]
        totals = np.zeros(len(levels))
        for rows in chunks(weight):
            counts = counts_of(importance, feedback, rows)
            of_rows = 1.0 if importance.of_rows is None else importance.of_rows[rows].astype(np.float64)
            for level, (spec, kind) in enumerate(levels):
                values, weights = side_by_side(weight[rows], spec), counts_side_by_side(counts, spec, len(weight[rows]))
                if settings["clip"]:
                    losses = search(values, weights, kind, coarse=True)[1]
                else:
                    losses = full_range_errors(values, weights, kind)
                totals[level] += (losses.reshape(-1, spec.blocks).sum(axis=1, dtype=np.float64) * of_rows).sum()
        return totals[None] * importance.scale(weight)

    def quantize(
        self, weight: Floats, chosen: LevelArray, statistics: MatrixStatistics | None, settings: Settings
    ) -> Tensor:
        """Codes, scales and zero points of float32 [out, in] with this pair.

        Raises:
            InputError: a weight lies outside FP16, or the statistics are of no inputs.
        """
        require_fp16(weight, "scales")
        return make(weight, self.spec(_shape(weight), chosen, settings), statistics, settings)


def _shape(weight: Floats) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _specs(shape: tuple[int, int], settings: Settings) -> list[AffineSpec]:
    """What there is to choose from, fewest bytes first, each number of bytes once.

    Blocks that padding makes as dear as shorter ones of the same width are left out.
    """
    if settings["blocks"] == "auto":
        blocks = [block for block in BLOCKS if block == BLOCKS[0] or block // 2 < shape[1]]  # none that is half padding
    else:
        blocks = [int(settings["blocks"])]
    widths = [int(width) for width in settings["widths"].split(",")]
    by_size: dict[int, AffineSpec] = {}
    for width in reversed(widths):
        least: int | None = None
        for block in blocks:
            spec = AffineSpec(shape, width, block)
            if least is None or spec.nbytes < least:
                least = spec.nbytes
                by_size.setdefault(spec.nbytes, spec)
    return [by_size[size] for size in sorted(by_size)]
