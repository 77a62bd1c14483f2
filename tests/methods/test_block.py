"""The block method against an oracle that works element by element in exact arithmetic."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anyquant import ir
from anyquant.errors import UsageError
from anyquant.methods.block import WIDTHS, BlockMethod

METHOD = BlockMethod()


def round_half_even(value: Fraction) -> int:
    return round(value)  # Fraction rounds ties to even


def ceil_log2(value: float) -> int:
    mantissa, exponent = math.frexp(value)
    return exponent - (mantissa == 0.5)


def oracle_block(values: list[float], width: int) -> tuple[list[Fraction], Fraction]:
    """Values and squared error of one block, from the definition."""
    largest = max(abs(v) for v in values)
    if largest == 0:
        return [Fraction(0)] * len(values), Fraction(0)
    top = (1 << (width - 1)) - 1
    exponent = min(max(ceil_log2(largest), -127), 127)
    step = Fraction(2) ** (exponent - width + 1)
    rounded = [min(round_half_even(Fraction(abs(v)) / step), top) * step * (-1 if v < 0 else 1) for v in values]
    return rounded, sum(((Fraction(v) - q) ** 2 for v, q in zip(values, rounded, strict=True)), Fraction(0))


def oracle(weight: np.ndarray, width: int, block: int) -> tuple[np.ndarray, float]:
    out = np.zeros(weight.shape, np.float32)
    total = Fraction(0)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], block):
            values, error = oracle_block([float(v) for v in weight[row, start : start + block]], width)
            out[row, start : start + block] = [float(v) for v in values]
            total += error
    return out, float(total)


def check(weight: np.ndarray, width: int, block: int) -> None:
    chosen = METHOD.settings({"block": block})
    level = np.array([width - WIDTHS[0]], np.uint8)
    tensor = METHOD.quantize(weight, level, None, chosen)
    tensor.check("w")
    assert tensor.spec == ir.BlockSpec(weight.shape, "bfp", width, block)
    expected, error = oracle(weight, width, block)
    np.testing.assert_array_equal(ir.dequantize(tensor), expected)
    power = sum(float(v) ** 2 for v in weight.ravel())
    relative = error / power * weight.size if power else 0.0
    assert METHOD.errors(weight, None, chosen)[0, level[0]] == pytest.approx(relative, rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("width", WIDTHS)
def test_equals_the_oracle(width: int, block: int) -> None:
    rng = np.random.default_rng(width)
    weight = (rng.standard_normal((3, 75)) * np.exp2(rng.integers(-6, 6, (3, 75)))).astype(np.float32)
    weight[1] = 0
    weight[2, :32] = 0.25
    check(weight, width, block)


@pytest.mark.parametrize(
    "row",
    [
        [0.0] * 5,
        [1.0],
        [-1.0, 1.0],
        [0.5, 0.4375, 0.46875],  # a power of two as the largest saturates; the third value is a tie
        [2.0**127, -(2.0**126)],
        [2.0**-126, 2.0**-149],
        [2.0**-149],
        [-0.0, 3.0],
    ],
)
@pytest.mark.parametrize("width", [2, 4, 8])
def test_extremes(row: list[float], width: int) -> None:
    check(np.array([row], np.float32), width, 16)


@settings(max_examples=60, deadline=None)
@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 40)),
        elements=st.floats(-100, 100, width=32, allow_subnormal=False),
    ),
    st.sampled_from(list(WIDTHS)),
)
def test_any_matrix(weight: np.ndarray, width: int) -> None:
    check(weight, width, 32)


def test_more_bits_leave_less_error() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    errors = METHOD.errors(weight, None, METHOD.settings({}))
    assert errors.shape == (1, len(WIDTHS))
    assert all(after < 0.5 * before for before, after in itertools.pairwise(errors[0]))


def test_levels_are_widths_by_bytes() -> None:
    chosen = METHOD.settings({"block": 16})
    levels = METHOD.levels((4, 100), chosen)
    assert (levels.units, levels.overhead) == (1, 0)
    assert levels.code_bytes == tuple(4 * 7 * 16 * w // 8 for w in WIDTHS)
    assert levels.nbytes == tuple(codes + 4 * 7 for codes in levels.code_bytes)
    for level, nbytes in enumerate(levels.nbytes):
        assert METHOD.spec((4, 100), np.array([level], np.uint8), chosen).nbytes == nbytes


@pytest.mark.parametrize(
    ("options", "word"), [({"block": 64}, "64"), ({"format": "int"}, "'int'"), ({"bits": 4}, "'bits'")]
)
def test_bad_options_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        METHOD.settings(options)
