"""Dequantization of stock ggml blocks in NumPy, bit for bit as ggml computes it.

Source: the block structures of ggml (ggml-common.h) and their reference dequantization: FP32, products
in the order written there. Input: uint8 [n, bytes per block]; output: float32 [n, block length].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from anyquant.ir import ggml_grids
from anyquant.ir.spec import GGML_TYPES

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

HALF_OFFSETS: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "IQ1_S": (0,),
    "IQ1_M": (),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
}
"""Where the FP16 scales and minima of a block begin: all that can make its values non-finite (see finite_blocks)."""

_MXFP4_MOST = 252  # greatest exponent byte at which all values fit into FP32: 12 * 2**124
_MXFP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _half(b: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(b[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(qs: Bytes) -> Bytes:
    """Low nibbles are the first half of a block, high nibbles the second."""
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def _fifth_bits(b: Bytes, at: int) -> Bytes:
    return np.unpackbits(b[:, at : at + 4], axis=1, bitorder="little")


def _q4_0(b: Bytes) -> Floats:
    return _half(b, 0) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: Bytes) -> Floats:
    return _half(b, 0) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b, 2)


def _q5_0(b: Bytes) -> Floats:
    q = _nibbles(b[:, 6:]) | (_fifth_bits(b, 2) << 4)
    return _half(b, 0) * (q.astype(np.float32) - 16)


def _q5_1(b: Bytes) -> Floats:
    q = _nibbles(b[:, 8:]) | (_fifth_bits(b, 4) << 4)
    return _half(b, 0) * q.astype(np.float32) + _half(b, 2)


def _q8_0(b: Bytes) -> Floats:
    return _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def _iq4_nl(b: Bytes) -> Floats:
    return _half(b, 0) * _IQ4_NL[_nibbles(b[:, 2:])]


def _mxfp4(b: Bytes) -> Floats:
    # The values are twice those of E2M1, so the scale is 2**(e - 128); ldexp rounds no power of two down to 2**-128.
    scale = np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128)
    values: Floats = scale * _MXFP4[_nibbles(b[:, 1:])]
    return values


def _two_bits(qs: Bytes) -> Bytes:
    """64 bytes hold 256 two-bit fields: 2 runs of 32 bytes, 4 fields each, field by field."""
    runs = qs.reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    fields: Bytes = ((runs >> shifts) & 3).astype(np.uint8)
    return fields.reshape(-1, 256)


def _per_group(scale: Floats, group: int) -> Floats:
    return np.repeat(scale, group, axis=1)


def _q2_k(b: Bytes) -> Floats:
    scales = b[:, :16]
    d, dmin = _half(b, 80), _half(b, 82)
    low = d * (scales & 15).astype(np.float32)
    high = dmin * (scales >> 4).astype(np.float32)
    return _per_group(low, 16) * _two_bits(b[:, 16:80]).astype(np.float32) - _per_group(high, 16)


def _q3_k(b: Bytes) -> Floats:
    packed = b[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scale = (low | (high << 4)).astype(np.int8) - 32
    # The mask's bit i of byte j belongs to element 32 i + j; a clear bit subtracts 4.
    mask = np.unpackbits(b[:, :32, None], axis=2, bitorder="little").transpose(0, 2, 1).reshape(-1, 256)
    q = _two_bits(b[:, 32:96]).astype(np.int8) - ((1 - mask.astype(np.int8)) << 2)
    return _per_group(_half(b, 108) * scale.astype(np.float32), 16) * q.astype(np.float32)


def _scale_and_min(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Eight 6-bit scales and eight 6-bit minima in 12 bytes."""
    d, m, md = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate([d & 63, (md & 15) | ((d >> 2) & 48)], axis=1)
    minimum = np.concatenate([m & 63, (md >> 4) | ((m >> 2) & 48)], axis=1)
    return scale, minimum


def _k_nibbles(qs: Bytes) -> Bytes:
    """128 bytes hold 256 nibbles: 4 runs of 32 bytes, low nibbles then high ones."""
    runs = qs.reshape(-1, 4, 32)
    return np.stack([runs & 15, runs >> 4], axis=2).reshape(-1, 256)


def _k_affine(b: Bytes, q: Bytes) -> Floats:
    scale, minimum = _scale_and_min(b[:, 4:16])
    d = _half(b, 0) * scale.astype(np.float32)
    m = _half(b, 2) * minimum.astype(np.float32)
    return _per_group(d, 32) * q.astype(np.float32) - _per_group(m, 32)


def _q4_k(b: Bytes) -> Floats:
    return _k_affine(b, _k_nibbles(b[:, 16:]))


def _q5_k(b: Bytes) -> Floats:
    # Bit i of byte j of the mask is the fifth bit of element 32 i + j.
    mask = np.unpackbits(b[:, 16:48, None], axis=2, bitorder="little").transpose(0, 2, 1).reshape(-1, 256)
    q: Bytes = (_k_nibbles(b[:, 48:]) | (mask << 4)).astype(np.uint8)
    return _k_affine(b, q)


def _q6_k(b: Bytes) -> Floats:
    runs = b[:, :128].reshape(-1, 2, 2, 32)
    low = np.stack([runs & 15, runs >> 4], axis=2).reshape(-1, 256)
    q = (low | (_two_bits(b[:, 128:192]) << 4)).astype(np.int8) - 32
    scale = b[:, 192:208].view(np.int8).astype(np.float32)
    values: Floats = _per_group(_half(b, 208) * scale, 16) * q.astype(np.float32)
    return values


def _iq4_xs(b: Bytes) -> Floats:
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> (2 * np.arange(8, dtype=np.uint16))
    scale = (low | ((high & 3) << 4)).astype(np.int8) - 32
    runs = b[:, 8:].reshape(-1, 8, 16)
    codes = np.concatenate([runs & 15, runs >> 4], axis=2).reshape(-1, 256)
    values: Floats = _per_group(_half(b, 0) * scale.astype(np.float32), 32) * _IQ4_NL[codes]
    return values


def _ternary(trits: Bytes) -> Floats:
    return trits.astype(np.float32) - 1


def _tq1_0(b: Bytes) -> Floats:
    # A byte is a fraction in units of 1/256; its ternary digits come out one by one as the whole part of 3 times it.
    parts = []
    for start, stop, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        powers = 3 ** np.arange(digits, dtype=np.uint8)[:, None]
        rest = b[:, None, start:stop] * powers.astype(np.uint8)  # modulo 256: digits already read fall off
        parts.append(((rest.astype(np.uint16) * 3) >> 8).astype(np.uint8).reshape(len(b), -1))
    values: Floats = _half(b, 52) * _ternary(np.concatenate(parts, axis=1))
    return values


def _tq2_0(b: Bytes) -> Floats:
    return _half(b, 64) * _ternary(_two_bits(b[:, :64]))


_DEQUANTIZE: dict[str, Callable[[Bytes], Floats]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    **ggml_grids.DEQUANTIZE,
}


def finite_blocks(blocks: Bytes, type_name: str) -> NDArray[np.bool_]:
    """Whether all values that the scales of a block allow are finite in FP32: bool [n], of uint8 [n, bytes per block].

    Integers times finite FP16 stay far below FP32's maximum, so the halves decide; an exponent of MXFP4 alone can be
    too large.
    """
    finite = np.ones(len(blocks), bool)
    for at in HALF_OFFSETS[type_name]:
        finite &= np.isfinite(np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0])
    if type_name == "MXFP4":
        finite &= blocks[:, 0] <= _MXFP4_MOST
    elif type_name == "IQ1_M":
        finite &= np.isfinite(ggml_grids.spread_half(blocks)[:, 0])
    return finite


def dequantize_blocks(blocks: Bytes, type_name: str) -> Floats:
    """Dequantize rows of whole blocks, uint8 [rows, row bytes], to float32 [rows, columns].

    Non-finite scales give non-finite values silently; checking them is the caller's part.
    """
    length, size = GGML_TYPES[type_name]
    rows = blocks.shape[0]
    flat = np.ascontiguousarray(blocks).reshape(-1, size)
    with np.errstate(invalid="ignore", over="ignore"):
        values = _DEQUANTIZE[type_name](flat)
    return values.reshape(rows, blocks.shape[1] // size * length)
