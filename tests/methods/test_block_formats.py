"""Rounding to block formats against an oracle that works element by element in exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anyquant import ir
from anyquant.block_formats import quantize_blocks
from anyquant.errors import InputError
from anyquant.ir.packing import pack

FORMS = [
    *(("bfp", width, 0) for width in range(2, 9)),
    *(("minifloat", width, bits) for width in range(2, 9) for bits in range(1, width)),
    *(("log", width, 0) for width in range(2, 9)),
]


def two_to(power: int) -> Fraction:
    return Fraction(2) ** power


def floor_log2(value: Fraction) -> int:
    power = value.numerator.bit_length() - value.denominator.bit_length()
    return power if two_to(power) <= value else power - 1


def ceil_log2(value: Fraction) -> int:
    power = floor_log2(value)
    return power if two_to(power) == value else power + 1


def rule(largest: Fraction, form: str) -> int:
    power = floor_log2(largest) if form == "minifloat" else ceil_log2(largest)
    return min(max(power, -127), 127)


def rounded(value: Fraction, e: int, spec: ir.BlockSpec) -> Fraction:
    """The magnitude that stands for a magnitude; Python rounds fractions to even."""
    top = (1 << (spec.width - 1)) - 1
    if spec.format == "bfp":
        step = two_to(e - spec.width + 1)
        return min(round(value / step), top) * step
    if spec.format == "log":
        power = floor_log2(value)
        power += (value / two_to(power)) ** 2 > 2
        return two_to(min(max(power, e - top), e))
    mantissa_bits = spec.width - 1 - spec.exponent_width
    least = e - ((1 << spec.exponent_width) - 2)  # exponent of the least normal number
    binade = least if value == 0 else max(floor_log2(value), least)
    step = two_to(binade - mantissa_bits)
    largest = (2 - two_to(-mantissa_bits)) * two_to(e)
    return min(round(value / step) * step, largest)


def oracle_block(
    values: list[Fraction], weights: list[Fraction], spec: ir.BlockSpec, search: bool
) -> tuple[list[Fraction], Fraction]:
    """Values and weighted squared error of one block, from the definition."""
    largest = max(abs(value) for value in values)
    if largest == 0:
        return [Fraction(0)] * len(values), Fraction(0)
    first = rule(largest, spec.format)
    found: list[tuple[Fraction, list[Fraction]]] = []
    for e in (first, first - 1, first + 1) if search else (first,):
        e = min(max(e, -127), 127)
        magnitudes = [rounded(abs(value), e, spec) for value in values]
        error = sum(
            (w * (abs(v) - q) ** 2 for v, q, w in zip(values, magnitudes, weights, strict=True)),
            Fraction(0),
        )
        found.append((error, [-q if v < 0 else q for v, q in zip(values, magnitudes, strict=True)]))
    error, chosen = min(found, key=lambda pair: pair[0])  # the first of equals
    return chosen, error


def blocks_of(spec: ir.BlockSpec) -> Iterator[tuple[int, int, slice]]:
    for row in range(spec.shape[0]):
        for number in range(spec.blocks):
            yield row, number, slice(number * spec.block, min((number + 1) * spec.block, spec.shape[1]))


def check(
    weight: np.ndarray, spec: ir.BlockSpec, importance: np.ndarray | None = None, *, search: bool = False
) -> ir.Tensor:
    """Compare what the tensor stands for, and the errors, with the oracle; the tensor itself must pass its checks."""
    exponents, codes, errors = quantize_blocks(weight, spec, importance, search=search)
    assert (exponents.dtype, codes.dtype, errors.dtype) == (np.int8, np.uint8, np.float64)
    assert codes.shape == (spec.shape[0], spec.blocks, spec.block)
    packed = pack(codes.reshape(len(codes), -1), spec.width)
    tensor = ir.Tensor(spec, {".codes": packed, ".exponents": exponents})
    tensor.check("w")
    stands_for = ir.dequantize(tensor)
    counts = np.broadcast_to(np.float32(1) if importance is None else importance, weight.shape)
    for row, number, columns in blocks_of(spec):
        values = [Fraction(float(v)) for v in weight[row, columns]]
        weights = [Fraction(float(v)) for v in counts[row, columns]]
        expected, error = oracle_block(values, weights, spec, search)
        got = [Fraction(float(v)) for v in stands_for[row, columns]]
        assert errors[row, number] == pytest.approx(float(error), rel=1e-5, abs=1e-300)
        if not search:
            assert got == expected
            continue
        # Sums in FP64 may break a tie of two exponents the other way.
        real = sum((w * (v - q) ** 2 for v, q, w in zip(values, got, weights, strict=True)), Fraction(0))
        assert float(real) == pytest.approx(float(error), rel=1e-6, abs=1e-300)
    return tensor


def spread(shape: tuple[int, int], seed: int, powers: int = 6) -> np.ndarray:
    """Weights of many sizes, none of them zero."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * np.exp2(rng.integers(-powers, powers, shape))
    return np.where(values == 0, 1, values).astype(np.float32)


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize(("form", "width", "bits"), FORMS)
def test_equals_the_oracle(form: str, width: int, bits: int, block: int) -> None:
    weight = spread((4, 75), width)
    weight[1] = -0.375
    weight[2, :32] = 0.25
    if form != "log":
        weight[2, 32:] = 0
        weight[3, ::3] = 0
    check(weight, ir.BlockSpec((4, 75), form, width, block, bits))


@pytest.mark.parametrize(("form", "width", "bits"), [("bfp", 3, 0), ("minifloat", 4, 2), ("log", 3, 0)])
@pytest.mark.parametrize("shape", [(3, 45), (1, 16), (5, 1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_search_takes_the_exponent_of_least_error(
    form: str, width: int, bits: int, shape: tuple[int, int], weighted: bool
) -> None:
    weight = spread(shape, 3, powers=2)
    importance = np.exp2(np.random.default_rng(4).uniform(-4, 4, shape)).astype(np.float32) if weighted else None
    spec = ir.BlockSpec(shape, form, width, 16, bits)
    check(weight, spec, importance, search=True)
    plain = quantize_blocks(weight, spec, importance)[2]
    searched = quantize_blocks(weight, spec, importance, search=True)[2]
    assert (searched <= plain).all()
    if shape == (3, 45):
        assert searched.sum() < plain.sum()


def test_importance_of_columns_counts_in_every_row() -> None:
    weight = spread((3, 21), 5)
    importance = np.arange(21, dtype=np.float32)
    check(weight, ir.BlockSpec((3, 21), "bfp", 3, 16), importance)


EXTREMES = [
    [1.0],
    [-1.0, 1.0],
    [0.5, 0.4375, 0.46875],  # of bfp a power of two as the largest saturates; the third value is a tie
    [1.0, 0.75, 0.875, 0.9375, 0.96875, 0.4375, 0.21875],  # ties and carries of minifloat
    [1.9375, 1.96875, 1.9921875],
    [2.0**127, -(2.0**126)],
    [float(np.finfo(np.float32).max), -1.5 * 2.0**127, 1.0],
    [2.0**-126, 2.0**-149],
    [2.0**-149],
    [1.0, 2.0**-149, 3 * 2.0**-149],
    [3 * 2.0**-149, -(2.0**-148)],
]


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(("form", "width", "bits"), FORMS)
def test_extremes(form: str, width: int, bits: int, search: bool) -> None:
    for row in EXTREMES:
        check(np.array([row], np.float32), ir.BlockSpec((1, len(row)), form, width, 16, bits), search=search)


@pytest.mark.parametrize(("form", "width", "bits"), [form for form in FORMS if form[0] != "log"])
def test_zeros(form: str, width: int, bits: int) -> None:
    for row in [0.0] * 5, [-0.0, 3.0], [0.0] * 16 + [1.0]:
        tensor = check(np.array([row], np.float32), ir.BlockSpec((1, len(row)), form, width, 16, bits))
        empty = [not any(row[:16])] + [not any(row[16:])] * (len(row) > 16)
        assert [e == ir.ZERO_BLOCK for e in tensor.arrays[".exponents"][0]] == empty


@settings(max_examples=80)
@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 40)),
        elements=st.floats(-(2.0**40), 2.0**40, width=32),
    ),
    st.sampled_from(FORMS),
    st.sampled_from([16, 32]),
)
def test_any_matrix(weight: np.ndarray, form: tuple[str, int, int], block: int) -> None:
    if form[0] == "log":
        weight = np.where(weight == 0, np.float32(1), weight)
    check(weight, ir.BlockSpec((len(weight), weight.shape[1]), form[0], form[1], block, form[2]))


def test_the_logarithm_rounds_at_the_root_of_two() -> None:
    """The FP32 neighbours of sqrt(2), and of its products with powers of two, go to different sides."""
    below = np.float32(math.sqrt(2))
    below = below if float(below) ** 2 < 2 else np.nextafter(below, np.float32(0))
    above = np.nextafter(below, np.float32(2))
    assert float(below) ** 2 < 2 < float(above) ** 2
    weight = np.array([[8, below, above, below * 2, above * 2, -below / 2, -above / 2]], np.float32)
    tensor = check(weight, ir.BlockSpec((1, 7), "log", 5, 16))
    assert ir.dequantize(tensor)[0].tolist() == [8, 1, 2, 2, 4, -0.5, -1]


def test_a_minifloat_of_one_exponent_bit_is_bfp() -> None:
    weight = spread((5, 64), 7)
    bfp = quantize_blocks(weight, ir.BlockSpec((5, 64), "bfp", 5, 32))
    minifloat = quantize_blocks(weight, ir.BlockSpec((5, 64), "minifloat", 5, 32, 1))
    np.testing.assert_array_equal(minifloat[1], bfp[1])
    np.testing.assert_array_equal(minifloat[0] + 1, bfp[0])


@pytest.mark.parametrize(
    ("form", "width", "bits", "expected"),
    [
        ("bfp", 4, 0, 0.1125),
        ("bfp", 6, 0, 0.028),
        ("minifloat", 8, 4, 0.0268),
        ("minifloat", 6, 2, 0.0278),
        ("minifloat", 4, 2, 0.1154),
        ("log", 4, 0, 0.2055),
        ("log", 8, 0, 0.2055),
    ],
)
def test_relative_error_of_gaussian_weights(form: str, width: int, bits: int, expected: float) -> None:
    """Root of the relative squared error, blocks of 16; those of minifloat by a separate calculation in FP64."""
    weight = (np.random.default_rng(0).standard_normal((1024, 512)) * 0.02).astype(np.float32)
    errors = quantize_blocks(weight, ir.BlockSpec((1024, 512), form, width, 16, bits))[2]
    assert math.sqrt(errors.sum() / np.square(weight, dtype=np.float64).sum()) == pytest.approx(expected, rel=0.01)


def test_rows_do_not_depend_on_each_other() -> None:
    weight = spread((6, 50), 8)
    for form, width, bits in (("bfp", 4, 0), ("minifloat", 5, 2), ("log", 4, 0)):
        spec = ir.BlockSpec((6, 50), form, width, 16, bits)
        whole = quantize_blocks(weight, spec, search=True)
        parts = [quantize_blocks(weight[row : row + 1], spec, search=True) for row in range(6)]
        for i in range(3):
            np.testing.assert_array_equal(whole[i], np.concatenate([part[i] for part in parts]))


def test_a_logarithm_has_no_zero() -> None:
    weight = spread((4, 20), 9)
    weight[2, 5] = weight[3, 1] = 0
    message = r"2 of 80 weights are zero, the first at index \[2, 5\].*bfp or minifloat"
    with pytest.raises(InputError, match=message):
        quantize_blocks(weight, ir.BlockSpec((4, 20), "log", 4, 16))
