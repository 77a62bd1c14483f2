"""Rounding to block formats: blocks of 16 or 32 neighbours along a row that share an exponent e.

Source: Zhang et al., "Revisiting Block-based Quantisation: What is Important for Sub-8-bit LLM Inference?" (arXiv
2310.05079), section 3 and its released code. An element has w bits, the highest one its sign; w - 1 bits are its
magnitude. With x the values of a block:

    bfp        +-k 2**(e - w + 1), k = 0 .. 2**(w - 1) - 1;  e = ceil(log2 max|x|).
    minifloat  IEEE-like, with subnormals, without infinities: E bits are the exponent field f, M = w - 1 - E the
               mantissa m. +-(1 + m / 2**M) 2**(f - (2**E - 1) + e), and for f = 0 +-(m / 2**M) 2**(1 - (2**E - 1) + e);
               e = floor(log2 max|x|), so that the largest field is that of the largest value.
    log        +-2**(u - (2**(w - 1) - 1) + e), u = 0 .. 2**(w - 1) - 1; e = ceil(log2 max|x|). There is no zero.

bfp and minifloat round to the nearest value, ties to even k (in minifloat: to an even multiple of the step within
the value's own binade); log rounds the logarithm, so 2**n ends at sqrt(2) 2**n. What lies beyond the largest value
becomes the largest. e is kept within -127..127, and is -128 in a block of bfp or minifloat whose codes are all zero.

Two slips of the released minifloat are not followed: its shared exponent has the wrong sign, which turns nearly every
weight into zero (relative error .98 at 8 bits), and a mantissa that rounds up to 2 is cut to the largest below
instead of carried.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from anyquant.errors import InputError
from anyquant.ir import ZERO_BLOCK, BlockSpec

Floats = NDArray[np.float32]

_LEAST, _MOST = -127, 127  # of shared exponents
_ROOT_HALF = np.float32(math.sqrt(0.5))  # rounded down: no FP32 number lies between it and the root


def quantize_blocks(
    weight: Floats, spec: BlockSpec, importance: Floats | None = None, *, search: bool = False
) -> tuple[NDArray[np.int8], NDArray[np.uint8], NDArray[np.float64]]:
    """Round a matrix, or some rows of it, to a block format.

    Args:
        weight: float32 [rows, in], finite.
        spec: format, widths and block length, with ``in`` columns; its number of rows does not matter.
        importance: what a squared error counts, float32, to be broadcast to [rows, in]; None for 1.
        search: of the format's own e, e - 1 and e + 1 take for each block that with the least error, the former if
            they tie.

    Returns:
        Exponents int8 [rows, blocks]; codes uint8 [rows, blocks, block], the sign in the highest of ``width`` bits,
        zero beyond the last column; squared errors float64 [rows, blocks], importance counted in.

    Raises:
        InputError: a zero in a matrix for the log format, which has none.
    """
    if spec.format == "log":
        refuse_zeros(weight)
    blocks = _blocks(weight, spec)
    magnitude = np.abs(blocks)
    counts = None if importance is None else _blocks(np.broadcast_to(importance, weight.shape), spec)
    rule = shared_exponents(magnitude.max(axis=2), spec.format)
    exponents, (codes, errors) = rule, _round(magnitude, rule, spec, counts)
    for step in (-1, 1) if search else ():
        other = np.clip(rule + np.int32(step), _LEAST, _MOST)
        other_codes, other_errors = _round(magnitude, other, spec, counts)
        better = other_errors < errors
        exponents = np.where(better, other, exponents)
        codes = np.where(better[:, :, None], other_codes, codes)
        errors = np.where(better, other_errors, errors)
    negative = blocks < 0
    if spec.format != "log":
        exponents = np.where(codes.any(axis=2), exponents, ZERO_BLOCK)
        negative &= codes > 0  # a negative zero would be a second code for one value
    codes |= negative.astype(np.uint8) << np.uint8(spec.width - 1)
    return exponents.astype(np.int8), codes, errors


def shared_exponents(largest: Floats, form: str) -> NDArray[np.int32]:
    """The exponent that a format gives blocks whose largest magnitudes are these, int32 in -127..127."""
    # frexp gives max = m 2**n with m in [.5, 1): n is the ceiling of log2 unless max is a power of two.
    mantissa, exponent = np.frexp(largest)
    exponent = exponent - 1 if form == "minifloat" else exponent - (mantissa == 0.5)
    return np.clip(exponent, _LEAST, _MOST).astype(np.int32)


def refuse_zeros(weight: Floats) -> None:
    """Check that a matrix [out, in] can be held by the log format.

    Raises:
        InputError: it has zeros; names the first and counts them.
    """
    zero = weight == 0
    count = int(np.count_nonzero(zero))
    if count:
        row, column = np.unravel_index(int(zero.argmax()), zero.shape)
        raise InputError(
            f"{count} of {weight.size} weights are zero, the first at index [{row}, {column}]: the block format log "
            "has no zero. Use the format bfp or minifloat instead."
        )


def _blocks(matrix: Floats, spec: BlockSpec) -> Floats:
    """[rows, in] to [rows, blocks, block], padded with zeros."""
    rows, columns = matrix.shape
    length = spec.blocks * spec.block
    if length != columns:
        padded = np.zeros((rows, length), np.float32)
        padded[:, :columns] = matrix
        matrix = padded
    return matrix.reshape(rows, spec.blocks, spec.block)


def _round(
    magnitude: Floats, exponents: NDArray[np.int32], spec: BlockSpec, counts: Floats | None
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Codes without sign, and squared errors of the blocks, with these shared exponents."""
    e = exponents[:, :, None]
    if spec.format == "bfp":
        codes, values = _bfp(magnitude, e, spec.width)
    elif spec.format == "minifloat":
        codes, values = _minifloat(magnitude, e, spec.exponent_width, spec.width - 1 - spec.exponent_width)
    else:
        codes, values = _log(magnitude, e, spec.width)
    difference = np.subtract(magnitude, values, out=values)
    if counts is None:
        return codes, np.einsum("rbi,rbi->rb", difference, difference, dtype=np.float64)
    return codes, np.einsum("rbi,rbi,rbi->rb", counts, difference, difference, dtype=np.float64)


def _bfp(magnitude: Floats, e: NDArray[np.int32], width: int) -> tuple[NDArray[np.uint8], Floats]:
    shift = width - 1 - e
    k = np.minimum(np.rint(np.ldexp(magnitude, shift)), np.float32((1 << (width - 1)) - 1))
    return k.astype(np.uint8), np.ldexp(k, -shift)


def _minifloat(
    magnitude: Floats, e: NDArray[np.int32], exponent_bits: int, mantissa_bits: int
) -> tuple[NDArray[np.uint8], Floats]:
    # The step is that of the value's binade; subnormals have the step of the least normal binade, which makes
    # codes consecutive: a k that rounds up into the next binade carries into the field by itself.
    least = e - ((1 << exponent_bits) - 2)
    binade = np.clip(np.frexp(magnitude)[1] - 1, least, e)
    k = np.rint(np.ldexp(magnitude, mantissa_bits - binade))
    one = 1 << mantissa_bits
    k = np.minimum(k, np.where(binade == e, np.float32(2 * one - 1), np.float32(2 * one)))
    codes = np.where(k > 0, (binade - least) * one + k.astype(np.int32), 0)  # frexp gives 0 any binade
    return codes.astype(np.uint8), np.ldexp(k, binade - mantissa_bits)


def _log(magnitude: Floats, e: NDArray[np.int32], width: int) -> tuple[NDArray[np.uint8], Floats]:
    top = (1 << (width - 1)) - 1
    mantissa, power = np.frexp(magnitude)
    power -= mantissa <= _ROOT_HALF
    codes = np.clip(power - e + top, 0, top)
    values = np.ldexp(np.float32(1), codes - top + e)
    padding = magnitude == 0
    return np.where(padding, 0, codes).astype(np.uint8), np.where(padding, np.float32(0), values)
