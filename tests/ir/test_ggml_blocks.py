"""Stock ggml blocks against the gguf package, for random bytes of every type."""

from __future__ import annotations

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import CorruptFileError
from anyquant.ir.ggml_blocks import HALF_OFFSETS

gguf = pytest.importorskip("gguf")


def random_blocks(type_name: str, rng: np.random.Generator, rows: int, blocks: int) -> np.ndarray:
    """Any bytes at all, but with finite scales."""
    size = ir.GGML_TYPES[type_name][1]
    raw = rng.integers(0, 256, (rows, blocks, size)).astype(np.uint8)
    for at in HALF_OFFSETS[type_name]:
        high = raw[:, :, at + 1]
        high[(high & 0x7C) == 0x7C] ^= 0x40  # the exponent of Inf and NaN
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("type_name", ir.GGML_TYPES)
def test_same_bits_as_gguf(type_name: str) -> None:
    kind = gguf.GGMLQuantizationType[type_name]
    assert gguf.GGML_QUANT_SIZES[kind] == ir.GGML_TYPES[type_name]
    blocks = random_blocks(type_name, np.random.default_rng(1), 5, 7)
    length = ir.GGML_TYPES[type_name][0]
    tensor = ir.Tensor(ir.GGMLSpec((5, 7 * length), type_name), {".blocks": blocks})
    tensor.check("w")
    values = ir.dequantize(tensor)
    expected = gguf.quants.dequantize(blocks, kind)
    assert values.dtype == np.float32
    assert values.shape == tensor.spec.shape
    # Bit for bit, but for the sign of zero.
    np.testing.assert_array_equal((values + 0).view(np.uint32), (expected + 0).view(np.uint32))
    for rows in (slice(1, 4), slice(4, 5), slice(None, None, 2), slice(0, 0)):
        np.testing.assert_array_equal(ir.dequantize(tensor, rows), values[rows])


@pytest.mark.parametrize("type_name", ir.GGML_TYPES)
@pytest.mark.parametrize("bad", [0x7C00, 0xFC00, 0x7E01, 0x7C01])
def test_just_the_halves_decide_finiteness(type_name: str, bad: int) -> None:
    rng = np.random.default_rng(2)
    length = ir.GGML_TYPES[type_name][0]
    for at in HALF_OFFSETS[type_name]:
        blocks = random_blocks(type_name, rng, 1, 1)
        assert np.isfinite(ir.dequantize_blocks(blocks, type_name)).all()
        blocks[0, at : at + 2] = np.array([bad], "<u2").view(np.uint8)
        assert not np.isfinite(ir.dequantize_blocks(blocks, type_name)).all()
        tensor = ir.Tensor(ir.GGMLSpec((1, length), type_name), {".blocks": blocks})
        with pytest.raises(CorruptFileError, match=r"w\.blocks: a non-finite scale .* at index \[0, 0\]"):
            tensor.check("w")


@pytest.mark.parametrize("type_name", ir.GGML_TYPES)
def test_largest_halves_stay_finite(type_name: str) -> None:
    """Every byte that widens the result at its maximum, scales and minima of opposite sign at +-65504."""
    size = ir.GGML_TYPES[type_name][1]
    for fill in (0x00, 0x7F, 0x80, 0xFF):
        for signs in ((0x7B, 0xFB), (0xFB, 0x7B), (0x7B, 0x7B)):
            blocks = np.full((1, size), fill, np.uint8)
            for at, high in zip(HALF_OFFSETS[type_name], signs, strict=False):
                blocks[0, at : at + 2] = [0xFF, high]
            assert np.isfinite(ir.dequantize_blocks(blocks, type_name)).all()
