"""Tensor types of our own: what goes in comes out, and the smallest type is taken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anyquant import ir
from anyquant.exporters.gguf import container, custom
from anyquant.testing import affine_tensor, block_tensor, codebook_tensor

NAME = "blk.7.ffn_up.weight"
MIXED = [3, 0, 8, 1, 4, 7, 2, 5, 6]


def assert_held(tensor: ir.Tensor) -> None:
    """As it was, arrays and values, in the bytes that the type has for it."""
    assert isinstance(tensor.spec, custom.Held)
    name = custom.type_for(tensor.spec)
    assert name is not None
    data = custom.encode(NAME, tensor, name)
    assert data.dtype == np.uint8
    assert data.shape == (container.nbytes(name, tensor.spec.shape),)
    found = custom.decode(NAME, tensor.spec.shape, data)
    assert found.spec == tensor.spec
    assert set(found.arrays) == set(tensor.arrays)
    for key, array in tensor.arrays.items():
        assert found.arrays[key].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[key].view(np.uint8), array.view(np.uint8))
    assert ir.tensor_digest(found) == ir.tensor_digest(tensor)


@pytest.mark.parametrize(("scaled", "outliers"), [(False, 0), (True, 0), (False, 9), (True, 9)])
@pytest.mark.parametrize(
    ("axis", "shape"),
    [(0, (9, 576)), (0, (33, 480)), (0, (5, 2048)), (0, (333, 32)), (1, (577, 32)), (1, (40, 288)), (1, (1001, 96))],
)
def test_codebooks_of_mixed_widths(axis: int, shape: tuple[int, int], scaled: bool, outliers: int) -> None:
    # Short channels have narrow codebooks: no type has room for 256 entries of a row of 32.
    bits = MIXED if shape[1 - axis] > 400 else [2, 0, 1, 3]
    assert_held(codebook_tensor(shape, axis, bits, scaled=scaled, outliers=outliers))


@pytest.mark.parametrize("bits", range(9))
@pytest.mark.parametrize("axis", [0, 1])
def test_codebooks_of_one_width(axis: int, bits: int) -> None:
    assert_held(codebook_tensor([(4, 12800), (12801, 32)][axis], axis, bits))


def test_one_row() -> None:
    assert_held(codebook_tensor((1, 2048), 0, 3, outliers=5))
    assert_held(block_tensor(ir.BlockSpec((1, 2048), "log", 3, 32)))
    assert_held(affine_tensor(ir.AffineSpec((1, 2048), 4, 64)))


def test_columns_beyond_16_bits() -> None:
    tensor = codebook_tensor((2, 65568), 0, 2, outliers=50)
    assert tensor.arrays[".outlier_index"].dtype == np.uint32
    assert_held(tensor)


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("width", range(2, 9))
def test_blocks(width: int, block: int) -> None:
    # Of 8 bits and blocks of 16, which have 8.5 bits per weight before the header, nothing holds any.
    for form, exponent_width in (("bfp", 0), ("log", 0), *(("minifloat", e) for e in range(1, width))):
        spec = ir.BlockSpec((7, 8224), form, width, block, min(exponent_width, 6))
        if (width, block) == (8, 16):
            assert custom.type_for(spec) is None
        else:
            assert_held(block_tensor(spec, width))


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_affine(bits: int, block: int) -> None:
    spec = ir.AffineSpec((7, 8224), bits, block)
    if bits == 8 and block < 64:  # 3 bytes of scale and zero make it more than 8.5 bits
        assert custom.type_for(spec) is None
    else:
        assert_held(affine_tensor(spec))


def needed(spec: custom.Held) -> int:
    """Bytes of a blob by the format: a header of 256, sections padded to 64, a table where blocks are."""
    sizes = [dtype.itemsize * int(np.prod(shape)) for dtype, shape in spec.arrays().values()]
    if isinstance(spec, ir.BlockSpec):
        sizes.append(4 * 2**spec.width)
    return 256 + sum((size + 63) // 64 * 64 for size in sizes)


@given(
    rows=st.integers(1, 300), columns=st.integers(1, 40).map(lambda n: 32 * n), axis=st.sampled_from([0, 1]),
    bits=st.lists(st.integers(0, 8), min_size=1, max_size=9),
)  # fmt: skip
@example(rows=56, columns=32, axis=0, bits=[0])  # 448 bytes, just what the smallest type has
@example(rows=55, columns=32, axis=0, bits=[0])
def test_the_smallest_type_that_holds_it(rows: int, columns: int, axis: int, bits: list[int]) -> None:
    widths = np.resize(np.array(bits, np.uint8), (rows, columns)[axis])
    spec = ir.CodebookSpec.from_bits((rows, columns), axis, widths, outliers=rows % 3)
    sizes = {8: "2_0", 10: "2_5", 12: "3_0", 14: "3_5", 17: "4_25", 21: "5_25", 34: "8_5"}
    fitting = [name for size, name in sizes.items() if rows * columns // 32 * size >= needed(spec)]
    assert custom.type_for(spec) == (f"ANYQUANT_{fitting[0]}" if fitting else None)


def test_types_by_hand() -> None:
    assert custom.type_for(ir.CodebookSpec.from_bits((56, 32), 0, np.zeros(56))) == "ANYQUANT_2_0"
    assert custom.type_for(ir.CodebookSpec.from_bits((55, 32), 0, np.zeros(55))) == "ANYQUANT_2_5"
    assert custom.type_for(ir.BlockSpec((1024, 1024), "bfp", 4, 32)) == "ANYQUANT_5_25"  # 4.25, and its header
    assert custom.type_for(ir.BlockSpec((1024, 1024), "bfp", 3, 32)) == "ANYQUANT_3_5"
    for columns in (1, 31, 33, 48, 65):  # no whole blocks
        assert custom.type_for(ir.CodebookSpec.from_bits((900, columns), 0, np.zeros(900))) is None
        assert custom.type_for(ir.BlockSpec((900, columns), "bfp", 2, 16)) is None
        assert custom.type_for(ir.AffineSpec((900, columns), 2, 32)) is None
    assert custom.type_for(ir.BlockSpec((1, 32), "bfp", 2, 32)) is None  # a header alone is more


def test_what_codes_of_blocks_stand_for() -> None:
    """In units of 2**-4; the code of a negative zero, which no tensor has, stands for 0."""
    table = custom.table_of(ir.BlockSpec((8, 32), "minifloat", 5, 32, 2))
    positive = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28]
    assert (16 * table).tolist() == positive + [-value for value in positive]
    assert custom.table_of(ir.BlockSpec((8, 32), "log", 3, 32)).tolist() == [
        sign * 2.0 ** (power - 3) for sign in (1, -1) for power in range(4)
    ]
