"""Block formats: 16 or 32 neighbours along a row share an exponent, one element width per matrix.

Source: Zhang et al., "Revisiting Block-based Quantisation: What is Important for Sub-8-bit LLM Inference?"
(arXiv 2310.05079), section 3: block floating point (bfp), block minifloat and block logarithm (log). How each rounds
is in :mod:`anyquant.block_formats`. Data-free unless the widths are to be chosen by gradients.

Measured on matrices of four layers of SmolLM2-135M, noise added that is uniform over the steps of its Q4_1 grid: root
of the relative squared error with blocks of 32, minifloat with E exponent bits.

    bits             3      4      5      6      7      8
    bfp              .273   .137   .069   .034   .017   .0086
    minifloat, E 2   .250   .119   .058   .029   .014   .0072
    minifloat, E 3          .235   .111   .054   .027   .013
    log              .276   .204   .204   .204   .204   .204

So 2 exponent bits are the default at every width from 4 on; at 3 bits, where they leave no mantissa bit, 1 is (the
same as bfp): 2 are better in blocks of 32 and worse in blocks of 16 (.258 to .241).

``shared_exponent=search`` leaves less squared error everywhere, but no better model for sure: with bfp of 4 bits the
KL to the source went from .90 to .78 with blocks of 32, and from .58 to .65 with blocks of 16 (on fewer windows, on
which minifloat of 4 bits with blocks of 32 went from .60 to .56).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anyquant.block_formats import quantize_blocks, refuse_zeros
from anyquant.errors import UsageError
from anyquant.ir import BlockSpec, Tensor
from anyquant.ir.packing import pack
from anyquant.methods.importance import Importance, chunks
from anyquant.methods.options import Option, complete
from anyquant.methods.protocol import Floats, JobDefaults, LevelArray, Levels, Method, Settings

if TYPE_CHECKING:
    from anyquant.calibration import MatrixStatistics

WIDTHS = range(2, 9)
_BEST_EXPONENT_WIDTH = 2


class BlockMethod(Method):
    """A block format with one element width per matrix."""

    name = "block"
    summary = "BFP, minifloat or logarithm, 2 to 8 bits, data-free"
    options: tuple[Option, ...] = (
        Option("format", "bfp", "what an element is", choices=("bfp", "minifloat", "log")),
        Option("block", 32, "weights that share an exponent", choices=(16, 32), paper=16),
        Option(
            "exponent_width",
            0,
            "exponent bits of a minifloat, as far as a mantissa bit is left; 0: 2 bits",
            low=0,
            high=6,
            paper=4,
        ),
        Option(
            "shared_exponent",
            "largest",
            "set by the block's largest weight, or the one of three with the least error",
            choices=("largest", "search"),
        ),
        Option(
            "sensitivity",
            "relative",
            "what errors count in choosing widths: relative to the matrix, or by gradients",
            choices=("relative", "gradient"),
        ),
    )

    def settings(self, options: Settings, bits: float | None = None) -> dict[str, Any]:
        """Complete and check the options.

        Raises:
            UsageError: unknown option or value, or an exponent width for a format that has none.
        """
        settings = complete(self.name, self.options, options)
        if settings["format"] == "minifloat":
            return settings
        if options.get("exponent_width"):
            raise UsageError(
                f"the option exponent_width is {options['exponent_width']}, but elements of the format "
                f"{settings['format']} have no exponent of their own: leave it out, or set format=minifloat."
            )
        return {**settings, "exponent_width": 0}

    def needs_statistics(self, settings: Settings) -> bool:
        """With ``sensitivity=gradient`` only."""
        return bool(settings["sensitivity"] == "gradient")

    def wants_moments(self, settings: Settings) -> str:
        """Nothing does."""
        return ""

    def defaults(self, settings: Settings) -> JobDefaults:
        """Matrices share the budget of the model: none has parts that could share its own."""
        return JobDefaults(allocation="model")

    def levels(self, shape: tuple[int, int], settings: Settings) -> Levels:
        """Widths 2 to 8 of the matrix as a whole."""
        specs = [_spec(shape, width, settings) for width in WIDTHS]
        exponents = shape[0] * specs[0].blocks
        return Levels(1, tuple(s.nbytes for s in specs), tuple(s.nbytes - exponents for s in specs))

    def spec(self, shape: tuple[int, int], chosen: LevelArray, settings: Settings) -> BlockSpec:
        """The form of a matrix of this width."""
        return _spec(shape, WIDTHS[int(chosen[0])], settings)

    def errors(self, weight: Floats, statistics: MatrixStatistics | None, settings: Settings) -> NDArray[np.float64]:
        """Squared error of each width, float64 [1, 7].

        With ``sensitivity=relative``, or without statistics, relative to the squares of the weights, times their
        number; else weighted and scaled as :class:`anyquant.methods.importance.Importance` says.

        Raises:
            InputError: a zero in a matrix for the format log, which has none.
        """
        if settings["format"] == "log":
            refuse_zeros(weight)
        importance = _importance(weight, statistics, settings)
        specs = [_spec((weight.shape[0], weight.shape[1]), width, settings) for width in WIDTHS]
        search = settings["shared_exponent"] == "search"
        totals = np.zeros(len(specs))
        for rows in chunks(weight):
            counts = importance.whole(rows) if importance else None
            for level, spec in enumerate(specs):
                totals[level] += quantize_blocks(weight[rows], spec, counts, search=search)[2].sum()
        return totals[None] * (importance or Importance(weight, None)).scale(weight)

    def quantize(
        self, weight: Floats, chosen: LevelArray, statistics: MatrixStatistics | None, settings: Settings
    ) -> Tensor:
        """Codes and exponents of float32 [out, in].

        Raises:
            InputError: a zero in a matrix for the format log, which has none.
        """
        if settings["format"] == "log":
            refuse_zeros(weight)
        spec = self.spec((weight.shape[0], weight.shape[1]), chosen, settings)
        search = settings["shared_exponent"] == "search"
        importance = _importance(weight, statistics, settings) if search else None  # rounding itself needs none
        exponents, codes = [], []
        for rows in chunks(weight):
            counts = importance.whole(rows) if importance else None
            exponent, code, _ = quantize_blocks(weight[rows], spec, counts, search=search)
            exponents.append(exponent)
            codes.append(pack(code.reshape(len(code), -1), spec.width))
        return Tensor(spec, {".codes": np.concatenate(codes), ".exponents": np.concatenate(exponents)})


def _spec(shape: tuple[int, int], width: int, settings: Settings) -> BlockSpec:
    exponent_width = 0
    if settings["format"] == "minifloat":
        exponent_width = min(settings["exponent_width"] or _BEST_EXPONENT_WIDTH, max(1, width - 2))
    return BlockSpec(shape, settings["format"], width, settings["block"], exponent_width)


def _importance(weight: Floats, statistics: MatrixStatistics | None, settings: Settings) -> Importance | None:
    if statistics is None or settings["sensitivity"] == "relative":
        return None
    return Importance(weight, statistics)
