"""Block and affine tensors in stock ggml types: bit for bit, or refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from anyquant import ir
from anyquant.exporters.gguf import container, custom, metadata, stock
from anyquant.ir.packing import pack

BFP = Callable[[np.ndarray, np.ndarray, int, int], ir.Tensor]


def test_file_types_are_llama_cpp_s() -> None:
    assert set(metadata.FILE_TYPES) == set(container.TYPE_IDS) - set(custom.TYPES)
    for name, number in metadata.FILE_TYPES.items():
        expected = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"}
        expected["MXFP4"] = "MOSTLY_MXFP4_MOE"
        assert LlamaFileType(number).name == expected.get(name, f"MOSTLY_{name}")


def _values(blocks: np.ndarray, name: str) -> np.ndarray:
    """What gguf-py reads in blocks of a stock type."""
    values: np.ndarray = dequantize(blocks, GGMLQuantizationType[name])
    return values


def _exactly(tensor: ir.Tensor, name: str) -> None:
    blocks = stock.encode(tensor, name)
    assert blocks.dtype == np.uint8
    assert blocks.shape == ir.GGMLSpec(tensor.spec.shape, name).arrays()[".blocks"][1]
    expected = ir.dequantize(tensor)
    np.testing.assert_array_equal(_values(blocks, name), expected)
    np.testing.assert_array_equal(ir.dequantize_blocks(blocks, name), expected)


@pytest.fixture(scope="module")
def random_bfp(bfp: BFP) -> Callable[..., ir.Tensor]:
    """random_bfp(width, block, columns=512, spread=6, lowest=-8): codes of full range, some zero blocks."""

    def make(width: int, block: int, columns: int = 512, spread: int = 6, lowest: int = -8) -> ir.Tensor:
        rng = np.random.default_rng(width * 100 + block)
        largest = 2 ** (width - 1) - 1
        k = rng.integers(-largest, largest + 1, (9, columns))
        k[:, ::block] = rng.choice([-largest, largest], (9, columns // block))
        k.reshape(9, -1, block)[rng.random((9, columns // block)) < 0.1] = 0
        exponents = rng.integers(lowest, lowest + spread + 1, (9, columns // block))
        return bfp(k, exponents, width, block)

    return make


@pytest.mark.parametrize(
    ("width", "name"),
    [(2, "Q4_0"), (3, "Q4_0"), (4, "Q4_0"), (5, "Q5_0"), (6, "Q8_0"), (7, "Q8_0"), (8, "Q8_0")],
)
def test_blocks_of_32_take_the_type_made_for_their_width(
    random_bfp: Callable[..., ir.Tensor], width: int, name: str
) -> None:
    tensor = random_bfp(width, 32)
    assert stock.expected_type(tensor.spec) == name == stock.choose(tensor)
    _exactly(tensor, name)


def test_q4_0_holds_the_natural_scale_and_shifted_codes(bfp: BFP) -> None:
    k = np.zeros((1, 32), int)
    k[0, :5] = [7, -7, 2, 0, -1]
    k[0, 16] = 4
    blocks = stock.encode(bfp(k, np.array([[3]]), 4, 32), "Q4_0")
    assert blocks[0, :2].view("<f2")[0] == 1.0  # 2**(3-4+1)
    assert list(blocks[0, 2:8]) == [15 | 12 << 4, 1 | 8 << 4, 10 | 8 << 4, 8 | 8 << 4, 7 | 8 << 4, 8 | 8 << 4]


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6])
def test_blocks_of_16_take_q6_k_up_to_a_spread_of_6(random_bfp: Callable[..., ir.Tensor], width: int) -> None:
    tensor = random_bfp(width, 16)
    assert stock.expected_type(tensor.spec) == "Q6_K" == stock.choose(tensor)
    _exactly(tensor, "Q6_K")


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6])
def test_spare_bits_of_narrow_codes_extend_the_spread_of_q6_k(random_bfp: Callable[..., ir.Tensor], width: int) -> None:
    fits = random_bfp(width, 16, spread=6 + 6 - width)
    _exactly(fits, "Q6_K")
    if width > 2:
        with pytest.raises(stock.NotExact, match="apart, more than the 6"):
            stock.choose(random_bfp(width, 16, spread=6 + 6 - width + 2))


def test_blocks_of_16_pair_up_where_rows_are_not_multiples_of_256(random_bfp: Callable[..., ir.Tensor]) -> None:
    for width, spread, name in [(3, 1, "Q4_0"), (4, 1, "Q5_0"), (4, 4, "Q8_0"), (8, 0, "Q8_0")]:
        tensor = random_bfp(width, 16, columns=96, spread=spread)
        assert stock.choose(tensor) == name
        _exactly(tensor, name)
    with pytest.raises(stock.NotExact, match=r"beyond -128\.\.127"):
        stock.choose(random_bfp(6, 16, columns=96, spread=6))


def test_what_is_expected_of_blocks_of_16_without_values() -> None:
    assert stock.expected_type(ir.BlockSpec((4, 96), "bfp", 6, 16)) == "Q8_0"
    with pytest.raises(stock.NotExact, match="no room"):
        stock.expected_type(ir.BlockSpec((4, 512), "bfp", 7, 16))


def test_trailing_zeros_move_into_a_scale_that_fp16_cannot_hold(bfp: BFP) -> None:
    k = 4 * np.array([[1, -1] * 16], int)
    tensor = bfp(k, np.array([[-23]]), 4, 32)  # natural scale 2**-26
    assert stock.choose(tensor) == "Q4_0"
    _exactly(tensor, "Q4_0")
    with pytest.raises(stock.NotExact, match=r"2\*\*-26, below 2\*\*-24"):
        stock.choose(bfp(k + 1, np.array([[-23]]), 4, 32))


def test_the_least_and_the_greatest_scale(bfp: BFP) -> None:
    k = np.array([[7, -7] * 16, [0] * 32, [1] + [0] * 31], int)
    for exponent in (-24 + 3, 15 + 3):
        tensor = bfp(k, np.full((3, 1), exponent), 4, 32)
        assert stock.choose(tensor) == "Q4_0"
        _exactly(tensor, "Q4_0")
    above = bfp(k, np.full((3, 1), 15 + 3 + 1), 4, 32)  # 2**16: the codes double instead, in a wider type
    assert stock.choose(above) == "Q5_0"
    _exactly(above, "Q5_0")
    with pytest.raises(stock.NotExact, match="beyond"):
        stock.choose(bfp(k, np.full((3, 1), 127), 4, 32))


def test_all_zero_tensors_have_zero_scales(bfp: BFP) -> None:
    for block in (16, 32):
        tensor = bfp(np.zeros((2, 256), int), np.zeros((2, 256 // block), int), 6, block)
        for name in ("Q4_0", "Q5_0", "Q8_0", "Q6_K"):
            _exactly(tensor, name)
            assert not stock.encode(tensor, "Q8_0").any()


def test_encoding_a_slice_of_rows_gives_those_rows(random_bfp: Callable[..., ir.Tensor]) -> None:
    for tensor, name in ((random_bfp(4, 32), "Q4_0"), (random_bfp(6, 16), "Q6_K")):
        whole = stock.encode(tensor, name)
        np.testing.assert_array_equal(stock.encode(tensor, name, slice(3, 7)), whole[3:7])


def test_the_bytes_are_those_of_gguf_py_where_its_rounding_finds_our_scale(
    random_bfp: Callable[..., ir.Tensor],
) -> None:
    # Q8_0's scale is max |w| / 127: ours, as every block that is not zero holds a code of +-127.
    tensor = random_bfp(8, 32)
    theirs = quantize(ir.dequantize(tensor), GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(stock.encode(tensor, "Q8_0"), theirs)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ir.BlockSpec((2, 40), "bfp", 4, 32), "rows of 40 weights are not a multiple of 32"),
        (ir.BlockSpec((2, 48), "bfp", 4, 16), "rows of 48 weights are not a multiple of 32"),
        (ir.BlockSpec((2, 64), "minifloat", 4, 32, 2), "value grid of minifloat"),
        (ir.BlockSpec((2, 64), "log", 4, 32), "value grid of log"),
        (ir.AffineSpec((2, 64), 4, 16), "affine blocks of 16"),
        (ir.AffineSpec((2, 65), 4, 32), "rows of 65"),
    ],
)
def test_specs_that_no_stock_type_can_hold(spec: ir.BlockSpec | ir.AffineSpec, message: str) -> None:
    with pytest.raises(stock.NotExact, match=message):
        stock.expected_type(spec)


def test_other_kinds_have_no_stock_type() -> None:
    tensor = ir.Tensor(ir.DenseSpec((2, 32), "F32"), {".dense": np.zeros((2, 32), np.float32)})
    with pytest.raises(stock.NotExact, match="kind dense"):
        stock.choose(tensor)


@pytest.mark.parametrize(
    ("bits", "zero", "name"), [(2, 3, "Q4_0"), (4, 8, "Q4_0"), (4, 0, "Q5_0"), (4, 15, "Q5_0"), (8, 128, "Q8_0")]
)
@pytest.mark.parametrize("block", [32, 128])
def test_affine_with_fp16_scales_is_a_stock_type_as_it_is(bits: int, zero: int, name: str, block: int) -> None:
    rng = np.random.default_rng(bits)
    columns = 96
    spec = ir.AffineSpec((5, columns), bits, block)
    codes = rng.integers(0, 1 << bits, (5, spec.blocks * block)).astype(np.uint8)
    codes[:, :2] = [0, (1 << bits) - 1]
    codes[:, columns:] = 0
    arrays = {
        ".codes": pack(codes, bits),
        ".scale": rng.normal(size=(5, spec.blocks)).astype(np.float16),
        ".zero": np.full((5, spec.blocks), zero, np.uint8),
    }
    tensor = ir.Tensor(spec, arrays)
    assert stock.choose(tensor) == name
    assert stock.expected_type(spec) == {2: "Q4_0", 4: "Q5_0", 8: "Q8_0"}[bits]  # the largest, whatever the zero points
    assert stock.expected_type(spec, symmetric=True) == {2: "Q4_0", 4: "Q4_0", 8: "Q8_0"}[bits]
    assert stock.expects_first(spec) == (bits != 4)
    _exactly(tensor, name)
    if bits == 8:
        arrays[".zero"][:] = 0
        with pytest.raises(stock.NotExact, match=r"lie in 0\.\.255"):
            stock.choose(tensor)


@given(st.data())
def test_whatever_is_chosen_is_exact_and_whatever_is_refused_is_not_held(bfp: BFP, data: st.DataObject) -> None:
    """Any codes, any exponents of int8: gguf-py reads the very values, or the tensor is refused."""
    width = data.draw(st.integers(2, 8))
    block = data.draw(st.sampled_from([16, 32]))
    columns = data.draw(st.sampled_from([32, 96, 256]))
    largest = 2 ** (width - 1) - 1
    center = data.draw(st.integers(-60, 60))
    spread = data.draw(st.sampled_from([0, 1, 6, 9, 60]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    sparse = rng.random((2, columns)) < data.draw(st.sampled_from([0.02, 1.0]))
    k = rng.integers(-largest, largest + 1, (2, columns)) * sparse
    exponents = np.clip(rng.integers(center - spread, center + spread + 1, (2, columns // block)), -127, 127)
    tensor = bfp(k, exponents, width, block)
    held = []
    for name in stock.candidates(tensor.spec):
        try:
            _exactly(tensor, name)
        except stock.NotExact:
            continue
        held.append(name)
    if held:
        assert stock.choose(tensor) == held[0]
    else:
        with pytest.raises(stock.NotExact):
            stock.choose(tensor)
