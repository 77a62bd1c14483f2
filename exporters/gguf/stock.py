"""The exact mapping of block and affine tensors to stock ggml types.

A BFP block is k * 2**s with integer k and s = e - width + 1. A stock block is q * d with d in FP16 (Q4_0,
Q5_0, Q8_0), or q * scale * d with an int8 scale per 16 weights (Q6_K). The mapping is exact whenever d can
be a power of two that FP16 holds (2**-24 .. 2**15) and q stays within the type's range; where the natural d
cannot, zero bits at the low end of the codes move into the exponent. Nothing is ever rounded here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from anyquant import ir
from anyquant.ir.packing import unpack

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]

# type -> (least q, greatest q) of the types whose blocks are one FP16 scale and 32 integers
RANGES: dict[str, tuple[int, int]] = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
_LEAST, _GREATEST = -24, 15  # powers of two that FP16 holds, subnormals included
_FREE = 1 << 20  # the exponent of a block of zeros, which fits anywhere
_SUPER, _SUB = 256, 16  # weights in a Q6_K super-block and in one of its sub-blocks
_TOO_FAR = 9  # a shift that overflows every range, so larger ones need not be told apart
_TRAILING = np.array([0, *(((n & -n).bit_length() - 1) for n in range(1, 256))], np.int32)


class NotExact(Exception):
    """A tensor has no exact image in the stock types asked for; the message says why."""


def expected_type(spec: ir.BlockSpec | ir.AffineSpec, *, symmetric: bool = False) -> str:
    """Name the stock type that a tensor of this spec normally takes, judged without its values.

    Of affine tensors it is the largest that they can take, unless ``symmetric`` says that all zero points are in the
    middle of the codes, for which the smallest suffices.

    Raises:
        NotExact: no stock type can hold it; the message says why.
    """
    types = candidates(spec)
    if isinstance(spec, ir.AffineSpec):
        return types[0 if symmetric else -1]
    if spec.block == 32:
        return types[0]
    if spec.width <= 6 and "Q6_K" in types:
        return "Q6_K"
    if spec.width <= 6:
        return "Q8_0"
    raise NotExact(f"two blocks of 16 would share one scale, for which width {spec.width} leaves Q8_0 no room")


def candidates(spec: ir.BlockSpec | ir.AffineSpec) -> list[str]:
    """Stock types to try, in order: the one made for the width first, then by size.

    Raises:
        NotExact: the kind or the shape rules all of them out; the message says why.
    """
    columns = spec.shape[1]
    if columns % 32:
        raise NotExact(f"rows of {columns} weights are not a multiple of 32, the block of every stock type that fits")
    if isinstance(spec, ir.AffineSpec):
        if spec.block % 32:
            raise NotExact(f"affine blocks of {spec.block} are shorter than the 32 weights that share a ggml scale")
        return {2: ["Q4_0"], 4: ["Q4_0", "Q5_0"], 8: ["Q8_0"]}[spec.bits]
    if spec.format != "bfp":
        raise NotExact(f"no stock type has the value grid of {spec.format} blocks of width {spec.width}")
    types = [t for t in ("Q4_0", "Q5_0", "Q6_K", "Q8_0") if t != "Q6_K" or columns % _SUPER == 0]
    if spec.block == 32:
        natural = "Q4_0" if spec.width <= 4 else "Q5_0" if spec.width == 5 else "Q8_0"
        types.remove(natural)
        types.insert(0, natural)
    return types


def expects_first(spec: ir.BlockSpec | ir.AffineSpec) -> bool:
    """Whether :func:`expected_type` is the first of :func:`candidates`, so that :func:`choose` agrees if it fits."""
    return len(candidates(spec)) == 1 if isinstance(spec, ir.AffineSpec) else spec.block == 32


def choose(tensor: ir.Tensor) -> str:
    """Name the first of :func:`candidates` that holds every value of the tensor exactly.

    Raises:
        NotExact: none does; the message gives the limit that was met first.
    """
    spec = _spec(tensor)
    types = candidates(spec)
    if _natural(tensor, types[0]):
        return types[0]
    reasons: dict[str, str] = {}
    for name in types:
        try:
            for rows in ir.row_chunks(spec.shape):
                _fit(tensor, name, rows)
        except NotExact as error:
            reasons[name] = str(error)
        else:
            return name
    best = types[0] if spec.block >= 32 else "Q6_K" if "Q6_K" in types else "Q8_0"
    others = f" (nor do {', '.join(n for n in types if n != best)})" if len(types) > 1 else ""
    raise NotExact(f"{best} does not hold it{others}: {reasons[best]}")


def encode(tensor: ir.Tensor, name: str, rows: slice | None = None) -> Bytes:
    """Write a tensor, or a slice of its rows, as blocks of a stock type.

    Returns:
        uint8 [rows, bytes per row]; their values are those of ``ir.dequantize(tensor)``, bit for bit.

    Raises:
        NotExact: a value does not fit.
    """
    return _fit(tensor, name, rows or slice(None))


def _spec(tensor: ir.Tensor) -> ir.BlockSpec | ir.AffineSpec:
    if not isinstance(tensor.spec, ir.BlockSpec | ir.AffineSpec):
        raise NotExact(f"kind {tensor.spec.kind} has no stock type")
    return tensor.spec


def _natural(tensor: ir.Tensor, name: str) -> bool:
    """Whether exponents alone show that a 32-wide BFP block fits the type made for its width."""
    spec = tensor.spec
    if not isinstance(spec, ir.BlockSpec) or spec.block != 32 or name not in RANGES:
        return False
    exponents = tensor.arrays[".exponents"]
    used = exponents[exponents != ir.ZERO_BLOCK].astype(np.int32) - (spec.width - 1)
    return used.size == 0 or (int(used.min()) >= _LEAST and int(used.max()) <= _GREATEST)


def _fit(tensor: ir.Tensor, name: str, rows: slice) -> Bytes:
    spec = _spec(tensor)
    if isinstance(spec, ir.AffineSpec):
        return _affine(tensor, spec, name, rows)
    k = ir.block_integers(tensor, rows).astype(np.int32)
    shift = tensor.arrays[".exponents"][rows].astype(np.int32) - (spec.width - 1)
    if name == "Q6_K":
        return _q6_k(k.reshape(len(k), -1, _SUB), np.repeat(shift, spec.block // _SUB, axis=1))
    natural = name == candidates(spec)[0] and _natural(tensor, name)
    return _whole(k.reshape(len(k), -1, spec.block), shift, name, reduce=not natural)


def _reduced(k: Ints, shift: Ints) -> tuple[Ints, Ints]:
    """Move the zero bits that end all codes of a block into its exponent; blocks of zeros get ``_FREE``."""
    union = np.bitwise_or.reduce(np.abs(k), axis=-1)
    zeros = _TRAILING[union]
    return k >> zeros[..., None], np.where(union == 0, _FREE, shift + zeros)


def _power(least: Ints, what: str) -> Ints:
    """The exponent of d: the least exponent below it, within FP16; zero blocks pass through as ``_FREE``."""
    if (least < _LEAST).any():
        raise NotExact(
            f"{what} needs the scale 2**{int(least.min())}, below 2**{_LEAST}, the least power of two in FP16"
        )
    return np.where(least == _FREE, _FREE, np.minimum(least, _GREATEST))


def _whole(k: Ints, shift: Ints, name: str, *, reduce: bool) -> Bytes:
    """Blocks [rows, n, 16 or 32] with exponents [rows, n] as one FP16 scale per 32 weights."""
    if reduce:
        k, shift = _reduced(k, shift)
    else:
        shift = np.where(k.any(axis=-1), shift, _FREE)
    parts = 32 // k.shape[-1]
    shift = shift.reshape(len(k), -1, parts)
    power = _power(shift.min(axis=-1), "a block of 32")
    up = np.where(shift == _FREE, 0, np.minimum(shift - power[..., None], _TOO_FAR))
    q = (k.reshape(*shift.shape, -1) << up[..., None]).reshape(len(k), -1, 32)
    low, high = RANGES[name]
    if int(q.min()) < low or int(q.max()) > high:
        raise NotExact(f"32 weights that share a scale need integers beyond {low}..{high}")
    d = np.where(power == _FREE, np.float32(0), np.ldexp(np.float32(1), np.where(power == _FREE, 0, power)))
    return _PACK[name](q, d.astype(np.float16))


def _affine(tensor: ir.Tensor, spec: ir.AffineSpec, name: str, rows: slice) -> Bytes:
    """(q - zero) * scale: the difference is the stock integer, the FP16 scale its d."""
    codes = unpack(tensor.arrays[".codes"][rows], spec.blocks * spec.block, spec.bits).astype(np.int32)
    codes -= np.repeat(tensor.arrays[".zero"][rows].astype(np.int32), spec.block, axis=1)
    scale = np.repeat(tensor.arrays[".scale"][rows], spec.block // 32, axis=1)
    q = codes[:, : spec.shape[1]].reshape(len(codes), -1, 32)
    low, high = RANGES[name]
    if int(q.min()) < low or int(q.max()) > high:
        raise NotExact(f"codes minus their zero points lie in {int(q.min())}..{int(q.max())}, beyond {low}..{high}")
    return _PACK[name](q, scale[:, : q.shape[1]])


def _nibbles(q: Ints) -> Bytes:
    """[..., 32] non-negative integers -> [..., 16] bytes, the first half in the low nibbles."""
    low = q.astype(np.uint8) & np.uint8(15)
    packed: Bytes = low[..., :16] | (low[..., 16:] << np.uint8(4))
    return packed


def _scale_bytes(d: NDArray[np.float16]) -> Bytes:
    return np.ascontiguousarray(d, "<f2").view(np.uint8).reshape(*d.shape, 2)


def _join(*parts: Bytes) -> Bytes:
    """Fields [rows, blocks, bytes] side by side -> [rows, bytes per row]."""
    return np.concatenate(parts, axis=-1).reshape(len(parts[0]), -1)


def _pack_q4_0(q: Ints, d: NDArray[np.float16]) -> Bytes:
    return _join(_scale_bytes(d), _nibbles(q + 8))


def _pack_q5_0(q: Ints, d: NDArray[np.float16]) -> Bytes:
    q = q + 16
    fifth = np.packbits((q >> 4).astype(np.uint8), axis=-1, bitorder="little")
    return _join(_scale_bytes(d), fifth, _nibbles(q))


def _pack_q8_0(q: Ints, d: NDArray[np.float16]) -> Bytes:
    return _join(_scale_bytes(d), q.astype(np.int8).view(np.uint8))


_PACK: dict[str, Callable[[Ints, NDArray[np.float16]], Bytes]] = {
    "Q4_0": _pack_q4_0,
    "Q5_0": _pack_q5_0,
    "Q8_0": _pack_q8_0,
}


def _q6_k(k: Ints, shift: Ints) -> Bytes:
    """Sub-blocks [rows, n, 16] with exponents [rows, n] as Q6_K.

    The exponent of a sub-block is split into d's (shared by 256 weights), its scale's (0..6, as the scale is
    an int8) and a shift of its 6-bit codes.
    """
    k, shift = _reduced(k, shift)
    rows = len(k)
    k = k.reshape(rows, -1, _SUPER // _SUB, _SUB)
    shift = shift.reshape(rows, -1, _SUPER // _SUB)
    power = _power(shift.min(axis=-1), "a super-block of 256")
    above = np.where(shift == _FREE, 0, shift - power[..., None])
    scale = np.where(shift == _FREE, 0, 1 << np.minimum(above, 6))
    q = k << np.minimum(np.maximum(above - 6, 0), _TOO_FAR)[..., None]
    if int(q.min()) < -32 or int(q.max()) > 31:
        raise NotExact(
            f"exponents within 256 weights lie up to {int(above.max())} apart, more than the 6 of an int8 scale "
            "and the spare bits of 6-bit codes make up for"
        )
    d = np.where(power == _FREE, np.float32(0), np.ldexp(np.float32(1), np.where(power == _FREE, 0, power)))
    # Two halves of 128 codes; in each, code i = 32 g + j keeps its low nibble in byte j + 32 (g & 1), the
    # high nibble for g > 1, and its upper two bits at bit 2 g of byte j of the mask.
    codes = (q + 32).astype(np.uint8).reshape(rows, -1, 2, 4, 32)
    nibbles = codes & 15
    low = nibbles[..., :2, :] | (nibbles[..., 2:, :] << 4)
    upper = np.bitwise_or.reduce((codes >> 4) << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=-2)
    blocks = codes.shape[1]
    return _join(
        low.reshape(rows, blocks, 128),
        upper.reshape(rows, blocks, 64),
        scale.astype(np.int8).view(np.uint8),
        _scale_bytes(d.astype(np.float16)),
    )
