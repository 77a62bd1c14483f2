"""Random tensors of the intermediate representation, for tests of exporters and of kernels.

Each holds what a reader may meet: codes of every value, channels without codes, blocks of zeros, scales below zero. The
same arguments give the same tensor. Nothing here needs a test framework.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anyquant import ir
from anyquant.ir.ggml_blocks import HALF_OFFSETS
from anyquant.ir.packing import pack

__all__ = ["affine_tensor", "block_tensor", "codebook_tensor", "ggml_tensor"]


def codebook_tensor(
    shape: tuple[int, int], axis: int, bits: ArrayLike, *, scaled: bool = False, outliers: int = 0, seed: int = 0
) -> ir.Tensor:
    """A codebook tensor of random codes; entries are normal, and outliers five times as large.

    Args:
        shape: [out, in].
        axis: whether rows (0) or columns (1) have codebooks.
        bits: widths of the channels, 0 to 8, taken in turn: one for all, or any number of them.
        scaled: with a scale of each input, float16 [in], of 0.5 to 2.
        outliers: how many weights, anywhere, are FP16 numbers of their own; their columns are uint16 up to 65536
            columns and uint32 beyond.
        seed: of the random numbers.

    Returns:
        A tensor that has passed :meth:`anyquant.ir.Tensor.check`.
    """
    rng, widths = np.random.default_rng(seed), np.resize(np.asarray(bits, np.uint8), shape[axis])
    spec = ir.CodebookSpec.from_bits(shape, axis, widths, input_scale=scaled, outliers=outliers)
    codes = [pack(rng.integers(0, 1 << b, (1, shape[1 - axis]), np.uint8), b)[0] for b in widths.tolist()]
    entries = [np.sort(rng.standard_normal(1 << b)) for b in widths.tolist()]
    arrays = {".bits": widths, ".codes": np.concatenate(codes), ".codebook": np.concatenate(entries).astype(np.float16)}
    if scaled:
        arrays[".input_scale"] = rng.uniform(0.5, 2, shape[1]).astype(np.float16)
    if outliers:
        row, column = np.divmod(np.sort(rng.choice(spec.numel, outliers, replace=False)), shape[1])
        arrays[".outlier_indptr"] = np.searchsorted(row, np.arange(shape[0] + 1)).astype(np.uint32)
        arrays[".outlier_index"] = column.astype(spec.arrays()[".outlier_index"][0])
        arrays[".outlier_value"] = (5 * rng.standard_normal(outliers)).astype(np.float16)
    return _checked(spec, arrays)


def block_tensor(spec: ir.BlockSpec, seed: int = 0, exponents: tuple[int, int] = (-20, 20)) -> ir.Tensor:
    """A block tensor of random codes; where the format has a zero, the last block of the last row is one of zeros.

    Args:
        spec: shape [out, in] and format.
        seed: of the random numbers.
        exponents: the least one, and the first that is too large.

    Returns:
        A tensor that has passed :meth:`anyquant.ir.Tensor.check`: of uint8 codes and int8 exponents [out, blocks].

    Raises:
        CorruptFileError: the format has values at these exponents that FP32 does not hold.
    """
    rng, sign = np.random.default_rng(seed), 1 << (spec.width - 1)
    codes = rng.integers(0, 2 * sign, (spec.shape[0], spec.blocks * spec.block), np.uint8)
    shared = rng.integers(*exponents, (spec.shape[0], spec.blocks), np.int8)
    if spec.format != "log":
        codes[codes == sign] = 0  # no negative zero
        codes[-1:, -spec.block :] = 0
    codes[:, spec.shape[1] :] = 0
    if spec.format != "log":
        shared[~codes.reshape(*shared.shape, spec.block).any(axis=2)] = ir.ZERO_BLOCK
    return _checked(spec, {".codes": pack(codes, spec.width), ".exponents": shared})


def affine_tensor(spec: ir.AffineSpec, seed: int = 0) -> ir.Tensor:
    """An affine tensor of random codes and zero points, and of scales of either sign.

    Args:
        spec: shape [out, in], bits and block length.
        seed: of the random numbers.

    Returns:
        A tensor that has passed :meth:`anyquant.ir.Tensor.check`: of uint8 codes, float16 scales and uint8 zero points,
        these [out, blocks].
    """
    rng, blocks = np.random.default_rng(seed), (spec.shape[0], spec.blocks)
    codes = rng.integers(0, 1 << spec.bits, (spec.shape[0], spec.blocks * spec.block), np.uint8)
    codes[:, spec.shape[1] :] = 0
    scale: NDArray[np.float16] = rng.standard_normal(blocks).astype(np.float16)
    zero = rng.integers(0, 1 << spec.bits, blocks, np.uint8)
    return _checked(spec, {".codes": pack(codes, spec.bits), ".scale": scale, ".zero": zero})


def ggml_tensor(spec: ir.GGMLSpec, seed: int = 0) -> ir.Tensor:
    """A tensor of stock ggml blocks of random bytes, whose scales and minima are normal and a hundredth as large.

    Args:
        spec: shape [out, in] and type.
        seed: of the random numbers.

    Returns:
        A tensor that has passed :meth:`anyquant.ir.Tensor.check`: uint8 blocks [out, row bytes].
    """
    rng, shape, size = np.random.default_rng(seed), spec.arrays()[".blocks"][1], ir.GGML_TYPES[spec.type][1]
    blocks = rng.integers(0, 256, shape, np.uint8).reshape(-1, size)
    halves = (rng.standard_normal((len(blocks), 2)) / 100).astype(np.float16).view(np.uint8)
    for number, at in enumerate(HALF_OFFSETS[spec.type]):
        blocks[:, at : at + 2] = halves[:, 2 * number : 2 * number + 2]
    if spec.type == "MXFP4":
        blocks[:, 0] = rng.integers(118, 124, len(blocks))  # powers of two
    elif spec.type == "IQ1_M":  # four bits of its scale end each of four words
        for word, nibble in enumerate((halves[:, 0] & 15, halves[:, 0] >> 4, halves[:, 1] & 15, halves[:, 1] >> 4)):
            blocks[:, 49 + 2 * word] = (blocks[:, 49 + 2 * word] & 15) | nibble << 4
    return _checked(spec, {".blocks": blocks.reshape(shape)})


def _checked(spec: ir.Spec, arrays: dict[str, np.ndarray]) -> ir.Tensor:
    tensor = ir.Tensor(spec, arrays)
    tensor.check("random")
    return tensor
