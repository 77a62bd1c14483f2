"""Rows in another order, against dequantizing first and ordering the values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyquant import ir

Maker = Callable[..., ir.Tensor]

ROWS = [1, 2, 7, 8, 9, 33]
MIXED = np.array([3, 0, 8, 1, 4, 7, 2, 5, 6], np.uint8)


def orders(rows: int) -> list[np.ndarray]:
    """As they were, backwards, pairs of halves as llama.cpp has them, and at random."""
    halves = np.arange(rows // 2 * 2).reshape(2, -1).T.ravel()
    return [
        np.arange(rows),
        np.arange(rows)[::-1],
        np.concatenate([halves, np.arange(len(halves), rows)]),
        np.random.default_rng(rows).permutation(rows),
    ]


def assert_ordered(tensor: ir.Tensor, order: np.ndarray) -> None:
    """The same values in another order, of the same spec, in arrays that a reader takes; the tensor stays as it was."""
    tensor.check("before")
    before = ir.dequantize(tensor)
    found = ir.with_rows(tensor, order)
    assert found.spec == tensor.spec
    assert sum(array.nbytes for array in found.arrays.values()) == tensor.spec.nbytes
    found.check("after")
    # Bits, so that a negative zero counts as another value.
    np.testing.assert_array_equal(ir.dequantize(found).view(np.uint32), before[order].view(np.uint32))
    np.testing.assert_array_equal(ir.dequantize(tensor), before)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("scaled", "outliers"), [(False, 0), (True, 0), (False, 5), (True, 5)])
@pytest.mark.parametrize("axis", [0, 1])
def test_codebooks(axis: int, scaled: bool, outliers: int, rows: int, make_codebook: Maker) -> None:
    shape = (rows, 13)
    bits = np.resize(MIXED, shape[axis])
    tensor = make_codebook(shape, axis, bits, seed=rows, input_scale=scaled, outliers=outliers)
    for order in orders(rows):
        assert_ordered(tensor, order)


@pytest.mark.parametrize("bits", range(9))
@pytest.mark.parametrize("axis", [0, 1])
def test_codebooks_of_one_width(axis: int, bits: int, make_codebook: Maker) -> None:
    """Streams of columns end within a byte, as do those of rows."""
    shape = (11, 5)
    tensor = make_codebook(shape, axis, np.full(shape[axis], bits), outliers=2)
    for order in orders(shape[0]):
        assert_ordered(tensor, order)


@pytest.mark.parametrize("axis", [0, 1])
def test_outliers_follow_their_rows(axis: int, make_codebook: Maker) -> None:
    """All of them in one row, the first or the last; in all places."""
    shape = (4, 6)
    tensor = make_codebook(shape, axis, np.resize([2, 0, 3], shape[axis]), outliers=3)
    for row in (0, 1, 3):
        indptr = np.where(np.arange(5) > row, 3, 0).astype(np.uint32)
        arrays = {**tensor.arrays, ".outlier_indptr": indptr, ".outlier_index": np.array([0, 2, 5], np.uint16)}
        for order in orders(4):
            assert_ordered(ir.Tensor(tensor.spec, arrays), order)
    everywhere = make_codebook(shape, axis, np.zeros(shape[axis]), outliers=24)
    for order in orders(4):
        assert_ordered(everywhere, order)


@pytest.mark.parametrize(
    "spec",
    [
        *(ir.BlockSpec((7, 37), form, width, block) for form in ("bfp", "log") for width in (2, 5, 8)
          for block in (16, 32)),
        *(ir.BlockSpec((7, 37), "minifloat", width, 16, width // 2) for width in (2, 5, 8)),
        *(ir.AffineSpec((5, 40), bits, block) for bits in (2, 4, 8) for block in (16, 32, 256)),
        *(ir.GGMLSpec((6, 256), name) for name in ("Q4_0", "Q4_1", "Q8_0", "Q6_K", "Q3_K")),
        *(ir.DenseSpec((9, 3), dtype) for dtype in ir.DENSE_DTYPES),
        ir.BlockSpec((1, 1), "bfp", 3, 16),
        ir.AffineSpec((1, 1), 4, 32),
        ir.GGMLSpec((1, 32), "Q5_1"),
        ir.DenseSpec((1, 1), "BF16"),
    ],
    ids=str,
)  # fmt: skip
def test_every_other_kind(spec: ir.Spec, make_tensor: Maker) -> None:
    tensor = make_tensor(spec, seed=3)
    for order in orders(spec.shape[0]):
        assert_ordered(tensor, order)


@given(data=st.data())
def test_any_order_and_its_inverse(data: st.DataObject, make_codebook: Maker) -> None:
    """There and back are the very same arrays."""
    shape = (data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)))
    axis = data.draw(st.sampled_from([0, 1]))
    bits = data.draw(st.lists(st.integers(0, 8), min_size=shape[axis], max_size=shape[axis]))
    outliers = data.draw(st.integers(0, min(12, shape[0] * shape[1])))
    tensor = make_codebook(shape, axis, bits, input_scale=data.draw(st.booleans()), outliers=outliers)
    order = np.array(data.draw(st.permutations(range(shape[0]))), np.int64)
    assert_ordered(tensor, order)
    back = ir.with_rows(ir.with_rows(tensor, order), np.argsort(order))
    for name, array in tensor.arrays.items():
        assert back.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(back.arrays[name].view(np.uint8), array.view(np.uint8))
