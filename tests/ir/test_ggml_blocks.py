"""Stock ggml blocks against the gguf package, for random bytes of every type."""

from __future__ import annotations

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import CorruptFileError
from anyquant.ir.ggml_blocks import HALF_OFFSETS, finite_blocks
from anyquant.ir.ggml_grids import grid

gguf = pytest.importorskip("gguf")

GRIDS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S")


def set_scale(blocks: np.ndarray, type_name: str, bits: int, which: int = 0) -> None:
    """Write an FP16 into blocks [n, size] as scale or minimum; IQ1_M has a nibble of it in each of four words."""
    if type_name == "IQ1_M":
        for word in range(4):
            high = 49 + 2 * word
            blocks[:, high] = (blocks[:, high] & 15) | ((bits >> 4 * word) & 15) << 4
    else:
        at = HALF_OFFSETS[type_name][which]
        blocks[:, at : at + 2] = [bits & 255, bits >> 8]


def random_blocks(type_name: str, rng: np.random.Generator, rows: int, blocks: int) -> np.ndarray:
    """Any bytes at all, but with finite scales."""
    size = ir.GGML_TYPES[type_name][1]
    raw = rng.integers(0, 256, (rows, blocks, size)).astype(np.uint8)
    for at in HALF_OFFSETS[type_name]:
        high = raw[:, :, at + 1]
        high[(high & 0x7C) == 0x7C] ^= 0x40  # the exponent of Inf and NaN
    if type_name == "IQ1_M":  # there the high nibble has the sign and the upper three bits of the exponent
        raw[:, :, 55][(raw[:, :, 55] & 0x70) == 0x70] ^= 0x40
    if type_name == "MXFP4":
        raw[:, :, 0] %= 253
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("type_name", ir.GGML_TYPES)
def test_same_bits_as_gguf(type_name: str) -> None:
    kind = gguf.GGMLQuantizationType[type_name]
    assert gguf.GGML_QUANT_SIZES[kind] == ir.GGML_TYPES[type_name]
    blocks = random_blocks(type_name, np.random.default_rng(1), 5, 70)
    length = ir.GGML_TYPES[type_name][0]
    tensor = ir.Tensor(ir.GGMLSpec((5, 70 * length), type_name), {".blocks": blocks})
    tensor.check("w")
    values = ir.dequantize(tensor)
    expected = gguf.quants.dequantize(blocks, kind)
    assert np.isfinite(expected).all()
    assert values.dtype == np.float32
    assert values.shape == tensor.spec.shape
    # Bit for bit, but for the sign of zero.
    np.testing.assert_array_equal((values + 0).view(np.uint32), (expected + 0).view(np.uint32))
    for rows in (slice(1, 4), slice(4, 5), slice(None, None, 2), slice(0, 0)):
        np.testing.assert_array_equal(ir.dequantize(tensor, rows), values[rows])


def test_every_exponent_of_mxfp4() -> None:
    blocks = np.zeros((256, 17), np.uint8)
    blocks[:, 0] = np.arange(256)
    blocks[:, 1:] = np.arange(16) | (np.arange(16)[::-1] << 4)
    with np.errstate(over="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
    values = ir.dequantize_blocks(blocks[:253], "MXFP4")
    np.testing.assert_array_equal((values + 0).view(np.uint32), (expected[:253] + 0).view(np.uint32))
    assert np.isinf(expected[253:]).any(axis=1).all()


@pytest.mark.parametrize("name", GRIDS)
def test_every_point_of_the_grids(name: str) -> None:
    kind = getattr(gguf.quants, name)
    kind.init_grid()
    np.testing.assert_array_equal(grid(name), kind.grid.reshape(kind.grid_shape))
    with pytest.raises(ValueError, match="read-only"):
        grid(name)[0, 0] = 0


@pytest.mark.parametrize("type_name", [name for name, halves in HALF_OFFSETS.items() if halves])
@pytest.mark.parametrize("bad", [0x7C00, 0xFC00, 0x7E01, 0x7C01])
def test_just_the_halves_decide_finiteness(type_name: str, bad: int) -> None:
    rng = np.random.default_rng(2)
    length = ir.GGML_TYPES[type_name][0]
    for which in range(len(HALF_OFFSETS[type_name])):
        blocks = random_blocks(type_name, rng, 1, 1)
        assert np.isfinite(ir.dequantize_blocks(blocks, type_name)).all()
        set_scale(blocks, type_name, bad, which)
        assert not np.isfinite(ir.dequantize_blocks(blocks, type_name)).all()
        tensor = ir.Tensor(ir.GGMLSpec((1, length), type_name), {".blocks": blocks})
        with pytest.raises(CorruptFileError, match=r"w\.blocks: a non-finite scale .* at index \[0, 0\]"):
            tensor.check("w")


@pytest.mark.parametrize("type_name", ir.GGML_TYPES)
def test_finite_blocks_have_finite_values(type_name: str) -> None:
    size = ir.GGML_TYPES[type_name][1]
    blocks = np.random.default_rng(3).integers(0, 256, (4000, size)).astype(np.uint8)
    known = finite_blocks(blocks, type_name)
    finite = np.isfinite(ir.dequantize_blocks(blocks, type_name)).all(axis=1)
    assert known.any()
    assert not known.all()
    if type_name == "MXFP4":  # the exponent decides, even where small codes would have fitted
        assert finite[known].all()
        assert (blocks[~known, 0] > 252).all()
    else:
        np.testing.assert_array_equal(known, finite)


@pytest.mark.parametrize("type_name", ir.GGML_TYPES)
def test_largest_halves_stay_finite(type_name: str) -> None:
    """Every byte that widens the result at its maximum, scales and minima of opposite sign at +-65504."""
    size = ir.GGML_TYPES[type_name][1]
    for fill in (0x00, 0x7F, 0x80, 0xFF):
        for signs in ((0x7B, 0xFB), (0xFB, 0x7B), (0x7B, 0x7B)):
            blocks = np.full((1, size), fill, np.uint8)
            if type_name == "MXFP4":
                blocks[0, 0] = 252
            for which in range(len(HALF_OFFSETS[type_name]) or int(type_name == "IQ1_M")):
                set_scale(blocks, type_name, signs[which] << 8 | 0xFF, which)
            assert finite_blocks(blocks, type_name).all()
            assert np.isfinite(ir.dequantize_blocks(blocks, type_name)).all()
