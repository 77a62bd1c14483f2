"""Block formats: 16 or 32 neighbours along a row share an exponent (block floating point, BFP).

Source: Zhang et al., "Revisiting Block-based Quantisation: What is Important for Sub-8-bit LLM
Inference?" (arXiv 2310.05079), section 3. Data-free: neither text nor gradients are needed. With w bits,
one of them the sign, a block with exponent e holds +-k * 2**(e - w + 1), k = 0 .. 2**(w-1) - 1.

e = ceil(log2 max |x|), as in the paper. Choosing e - 1 or e + 1 where that leaves the smaller squared error was
measured on SmolLM2-135M and is no clear gain: KL to the source 4 % lower with blocks of 32, 8 % higher with 16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anyquant.errors import UsageError
from anyquant.ir import ZERO_BLOCK, BlockSpec, Tensor
from anyquant.ir.packing import pack
from anyquant.methods.protocol import Floats, LevelArray, Levels, Settings

if TYPE_CHECKING:
    from anyquant.calibration import MatrixStatistics

WIDTHS = range(2, 9)
_CHUNK = 1 << 20  # weights handled at a time


class BlockMethod:
    """BFP with one element width per matrix."""

    name = "block"
    summary = "block floating point, 2 to 8 bits, data-free"
    needs_statistics = False

    def settings(self, options: Settings) -> dict[str, Any]:
        """Complete and check the options: block, 16 or 32.

        Raises:
            UsageError: unknown option or value.
        """
        settings = {"format": "bfp", "block": 32, **options}
        unknown = sorted(set(settings) - {"format", "block"})
        if unknown:
            raise UsageError(f"the method block has no option {unknown[0]!r}; it has block.")
        if settings["format"] != "bfp":
            raise UsageError(f"the method block offers the format 'bfp', not {settings['format']!r}.")
        if settings["block"] not in (16, 32):
            raise UsageError(f"--block is {settings['block']!r}, must be 16 or 32.")
        return settings

    def levels(self, shape: tuple[int, int], settings: Settings) -> Levels:
        """Widths 2 to 8 of the matrix as a whole."""
        specs = [BlockSpec(shape, "bfp", width, settings["block"]) for width in WIDTHS]
        exponents = shape[0] * specs[0].blocks
        return Levels(1, tuple(s.nbytes for s in specs), tuple(s.nbytes - exponents for s in specs))

    def spec(self, shape: tuple[int, int], chosen: LevelArray, settings: Settings) -> BlockSpec:
        """The form of a matrix of this width."""
        return BlockSpec(shape, "bfp", WIDTHS[int(chosen[0])], settings["block"])

    def errors(self, weight: Floats, statistics: MatrixStatistics | None, settings: Settings) -> NDArray[np.float64]:
        """Relative squared error of each width times the number of weights, float64 [1, 7]."""
        totals = []
        for level in range(len(WIDTHS)):
            spec = self.spec((weight.shape[0], weight.shape[1]), np.array([level], np.uint8), settings)
            parts = _chunks(weight, spec)
            totals.append(sum(float(_quantize_blocks(part, spec)[2].sum()) for part in parts))
        power = max(float(np.einsum("ij,ij->", weight, weight, dtype=np.float64)), 1e-300)
        return np.array([totals]) * (weight.size / power)

    def quantize(
        self, weight: Floats, chosen: LevelArray, statistics: MatrixStatistics | None, settings: Settings
    ) -> Tensor:
        """BFP codes and exponents of float32 [out, in]."""
        spec = self.spec((weight.shape[0], weight.shape[1]), chosen, settings)
        exponents, codes = [], []
        for part in _chunks(weight, spec):
            exponent, code, _ = _quantize_blocks(part, spec)
            exponents.append(exponent)
            codes.append(pack(code.reshape(len(part), -1), spec.width))
        return Tensor(spec, {".codes": np.concatenate(codes), ".exponents": np.concatenate(exponents)})


def _chunks(weight: Floats, spec: BlockSpec) -> list[Floats]:
    step = max(1, _CHUNK // weight.shape[1])
    return [weight[start : start + step] for start in range(0, len(weight), step)]


def _quantize_blocks(
    weight: Floats, spec: BlockSpec
) -> tuple[NDArray[np.int8], NDArray[np.uint8], NDArray[np.float64]]:
    """Exponents int8 [rows, blocks], codes uint8 [rows, blocks, block], squared errors float64 [rows, blocks]."""
    rows, columns = weight.shape
    padded = np.zeros((rows, spec.blocks * spec.block), np.float32)
    padded[:, :columns] = weight
    blocks = padded.reshape(rows, spec.blocks, spec.block)
    magnitude = np.abs(blocks)

    # frexp gives max = m * 2**e with m in [.5, 1): e is the ceiling of log2 unless max is a power of two.
    mantissa, exponent = np.frexp(magnitude.max(axis=2))
    exponent = np.clip(exponent - (mantissa == 0.5), -127, 127)
    shift = (spec.width - 1 - exponent)[:, :, None]
    # Ties to even, clipped at the largest code.
    k = np.minimum(np.rint(np.ldexp(magnitude, shift)), np.float32((1 << (spec.width - 1)) - 1))
    difference = magnitude - np.ldexp(k, -shift)
    error = np.einsum("rbi,rbi->rb", difference, difference, dtype=np.float64)

    exponent = np.where(k.any(axis=2), exponent, ZERO_BLOCK)
    sign = (blocks < 0) & (k > 0)  # a negative zero would be a second code for one value
    codes = k.astype(np.uint8) | (sign.astype(np.uint8) << np.uint8(spec.width - 1))
    return exponent.astype(np.int8), codes, error
