"""Dequantization against formulas written element by element from the design, in exact fractions."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyquant import ir
from anyquant.ir import packing

Maker = Callable[..., ir.Tensor]


def code_at(row: np.ndarray, index: int, bits: int) -> int:
    """Code i of a byte string, at bits [i*b, i*b+b), least significant bit first."""
    return sum((int(row[p // 8]) >> (p % 8) & 1) << k for k, p in enumerate(range(index * bits, (index + 1) * bits)))


def two_to(power: int) -> Fraction:
    return Fraction(2) ** power


def assert_equal_bits(found: np.ndarray, expected: list[list[Fraction]] | np.ndarray) -> None:
    """Equal to the last bit; -0 counts as 0. Fractions must be exact in FP32."""
    if not isinstance(expected, np.ndarray):
        for row in expected:
            for value in row:
                assert Fraction(float(np.float32(float(value)))) == value
        expected = np.array([[float(v) for v in row] for row in expected], np.float32)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


def block_value(spec: ir.BlockSpec, code: int, exponent: int) -> Fraction:
    """The value of a code, straight from the definition of its format."""
    magnitude, negative = code % (1 << (spec.width - 1)), code >> (spec.width - 1)
    sign = -1 if negative else 1
    if spec.format == "bfp":
        return sign * magnitude * two_to(exponent - spec.width + 1)
    if spec.format == "log":
        return sign * two_to(exponent - ((1 << (spec.width - 1)) - 1) + magnitude)
    mantissa_bits = spec.width - 1 - spec.exponent_width
    field, mantissa = divmod(magnitude, 1 << mantissa_bits)
    bias = (1 << spec.exponent_width) - 1 - exponent  # the largest field stands for the shared exponent
    if field == 0:
        return sign * Fraction(mantissa, 1 << mantissa_bits) * two_to(1 - bias)
    return sign * (1 + Fraction(mantissa, 1 << mantissa_bits)) * two_to(field - bias)


BLOCKS = [
    *(("bfp", width, 0) for width in range(2, 9)),
    *(("log", width, 0) for width in range(2, 9)),
    *(("minifloat", width, e) for width in range(2, 9) for e in range(1, min(width, 6))),
]


@pytest.mark.parametrize(("form", "width", "exponent_width"), BLOCKS)
def test_block(form: str, width: int, exponent_width: int, make_tensor: Maker) -> None:
    spec = ir.BlockSpec((3, 37), form, width, 16, exponent_width)
    tensor = make_tensor(spec, seed=width)
    tensor.check("w")
    expected = [
        [
            block_value(
                spec,
                code_at(tensor.arrays[".codes"][row], column, width),
                int(tensor.arrays[".exponents"][row, column // 16]),
            )
            for column in range(37)
        ]
        for row in range(3)
    ]
    assert_equal_bits(ir.dequantize(tensor), expected)


def test_every_minifloat_code() -> None:
    """All codes of 5 bits with 2 exponent bits; subnormals included. Worked out by hand in the golden vectors too."""
    spec = ir.BlockSpec((1, 32), "minifloat", 5, 32, 2)
    codes = np.arange(32, dtype=np.uint8)[None]
    codes[0, 16] = 0  # negative zero is forbidden
    arrays = {".codes": packing.pack(codes, 5), ".exponents": np.zeros((1, 1), np.int8)}
    tensor = ir.Tensor(spec, arrays)
    tensor.check("w")
    positive = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28]  # in units of 2**-4
    expected = [[Fraction(p, 16) for p in positive] + [Fraction(-p, 16) for p in positive]]
    assert_equal_bits(ir.dequantize(tensor), expected)


@pytest.mark.parametrize("exponent", [-127, -126, 0, 126, 127])
@pytest.mark.parametrize(("form", "width", "exponent_width"), [("bfp", 8, 0), ("bfp", 2, 0), ("minifloat", 8, 4)])
def test_block_at_the_ends_of_the_exponent(form: str, width: int, exponent_width: int, exponent: int) -> None:
    spec = ir.BlockSpec((1, 16), form, width, 16, exponent_width)
    top = (1 << (width - 1)) - 1
    codes = np.array([[1, top, top | 1 << (width - 1)] + [0] * 13], np.uint8)
    if form == "minifloat" and exponent < -120:
        codes[0, 0] = 0x78  # the least value would be below FP32's; that is refused elsewhere
    arrays = {".codes": packing.pack(codes, width), ".exponents": np.array([[exponent]], np.int8)}
    tensor = ir.Tensor(spec, arrays)
    tensor.check("w")
    expected = [[block_value(spec, int(code), exponent) for code in codes[0]]]
    assert_equal_bits(ir.dequantize(tensor), expected)


def test_block_integers(make_tensor: Maker) -> None:
    for width in range(2, 9):
        tensor = make_tensor(ir.BlockSpec((3, 37), "bfp", width, 16), seed=width)
        integers = ir.block_integers(tensor)
        assert integers.dtype == np.int16
        assert integers.shape == (3, 37)
        exponents = np.repeat(tensor.arrays[".exponents"].astype(int), 16, axis=1)[:, :37]
        expected = [
            [int(k) * two_to(int(e) - width + 1) for k, e in zip(row, row_e, strict=True)]
            for row, row_e in zip(integers, exponents, strict=True)
        ]
        assert_equal_bits(ir.dequantize(tensor), expected)
        np.testing.assert_array_equal(ir.block_integers(tensor, slice(1, 3)), integers[1:3])


def test_block_integers_refuses_other_kinds(make_tensor: Maker) -> None:
    for spec in (ir.BlockSpec((1, 16), "log"), ir.DenseSpec((1, 16), "F32")):
        with pytest.raises(TypeError, match="BFP"):
            ir.block_integers(make_tensor(spec))


def codebook_values(tensor: ir.Tensor) -> np.ndarray:
    """Channel after channel, code after code, with running offsets."""
    spec, arrays = tensor.spec, tensor.arrays
    assert isinstance(spec, ir.CodebookSpec)
    values = np.zeros(spec.shape, np.float32)
    byte = entry = 0
    for channel, width in enumerate(int(b) for b in arrays[".bits"]):
        length = spec.shape[1] if spec.axis == 0 else spec.shape[0]
        for i in range(length):
            half = arrays[".codebook"][entry + code_at(arrays[".codes"][byte:], i, width)]
            row, column = (channel, i) if spec.axis == 0 else (i, channel)
            value = np.float32(half)
            if spec.input_scale:
                value = value * np.float32(arrays[".input_scale"][column])
            values[row, column] = value
        byte += -(-length * width // 8)
        entry += 1 << width
    assert byte == len(arrays[".codes"])
    assert entry == len(arrays[".codebook"])
    if spec.outliers:
        for row in range(spec.shape[0]):
            for i in range(int(arrays[".outlier_indptr"][row]), int(arrays[".outlier_indptr"][row + 1])):
                values[row, int(arrays[".outlier_index"][i])] = np.float32(arrays[".outlier_value"][i])
    return values


@st.composite
def codebooks(draw: st.DrawFn) -> dict[str, object]:
    axis = draw(st.integers(0, 1))
    channels, length = draw(st.integers(1, 6)), draw(st.integers(1, 19))
    shape = (channels, length) if axis == 0 else (length, channels)
    return {
        "shape": shape,
        "axis": axis,
        "bits": draw(st.lists(st.integers(0, 8), min_size=channels, max_size=channels)),
        "seed": draw(st.integers(0, 1000)),
        "input_scale": draw(st.booleans()),
        "outliers": draw(st.sampled_from([0, 1, channels * length // 2, channels * length])),
    }


@given(codebooks(), st.data())
def test_codebook(make_codebook: Maker, case: dict[str, object], data: st.DataObject) -> None:
    tensor = make_codebook(**case)
    tensor.check("w")
    expected = codebook_values(tensor)
    assert_equal_bits(ir.dequantize(tensor), expected)
    rows = data.draw(st.slices(expected.shape[0]))
    assert_equal_bits(ir.dequantize(tensor, rows), np.ascontiguousarray(expected[rows]))


def test_outliers_replace_without_scale(make_codebook: Maker) -> None:
    tensor = make_codebook((2, 3), 0, [0, 0], input_scale=True, outliers=6)
    np.testing.assert_array_equal(ir.dequantize(tensor).reshape(-1), tensor.arrays[".outlier_value"].astype(np.float32))


def test_product_is_rounded_once_in_fp32() -> None:
    spec = ir.CodebookSpec.from_bits((1, 1), 0, np.array([0], np.uint8), input_scale=True)
    entry, scale = np.float16(1.0009765625), np.float16(1.0009765625)  # 1 + 2**-10: the product needs 21 bits
    arrays = {".bits": np.zeros(1, np.uint8), ".codes": np.zeros(0, np.uint8), ".codebook": np.array([entry])}
    tensor = ir.Tensor(spec, arrays | {".input_scale": np.array([scale])})
    assert_equal_bits(ir.dequantize(tensor), [[Fraction(1025, 1024) ** 2]])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("columns", "block"), [(1, 16), (32, 16), (33, 32), (300, 256)])
def test_affine(bits: int, columns: int, block: int, make_tensor: Maker) -> None:
    tensor = make_tensor(ir.AffineSpec((2, columns), bits, block), seed=bits)
    tensor.check("w")
    arrays = tensor.arrays
    expected = [
        [
            (code_at(arrays[".codes"][row], column, bits) - int(arrays[".zero"][row, column // block]))
            * Fraction(float(arrays[".scale"][row, column // block]))
            for column in range(columns)
        ]
        for row in range(2)
    ]
    assert_equal_bits(ir.dequantize(tensor), expected)


DENSE_CASES = [  # dtype, bit patterns, values
    ("F16", "<u2", [0x0000, 0x8000, 0x0001, 0x3C00, 0x7BFF, 0xFBFF], [0, 0, 2.0**-24, 1, 65504, -65504]),
    ("BF16", "<u2", [0x0000, 0x8000, 0x0001, 0x3F80, 0xC049, 0x7F7F], [0, 0, 2.0**-133, 1, -3.140625, 255 * 2.0**120]),
    ("F32", "<u4", [0x80000000, 0x00000001, 0x3F800000, 0xFF7FFFFF], [0, 2.0**-149, 1, -(2.0**128 - 2.0**104)]),
    ("F64", "<u8", [0x8000000000000000, 0x3FF0000010000000, 0x3FF0000010000001], [0, 1, 1 + 2.0**-23]),
]


@pytest.mark.parametrize(("dtype", "pattern", "bits", "values"), DENSE_CASES)
def test_dense(dtype: str, pattern: str, bits: list[int], values: list[float]) -> None:
    spec = ir.DenseSpec((len(bits),), dtype)
    stored = np.array(bits, pattern).view(spec.arrays()[".dense"][0])
    tensor = ir.Tensor(spec, {".dense": stored})
    tensor.check("w")
    found = ir.dequantize(tensor)
    assert_equal_bits(found, np.array(values, np.float32))
    assert bool(np.signbit(found[1 if dtype in ("F16", "BF16") else 0]))  # -0 itself stays; the digest turns it
    assert not np.shares_memory(found, stored)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (3, 0), (2, 3, 4)])
def test_dense_shapes(dtype: str, shape: tuple[int, ...], make_tensor: Maker) -> None:
    tensor = make_tensor(ir.DenseSpec(shape, dtype))
    tensor.check("w")
    values = ir.dequantize(tensor)
    assert values.shape == shape
    assert values.flags.c_contiguous
    assert ir.tensor_digest(tensor) == ir.digest(values)
    if shape:
        np.testing.assert_array_equal(ir.dequantize(tensor, slice(1, 2)), values[1:2])


SLICES = [slice(0, 1), slice(1, 3), slice(None, None, 2), slice(None, None, -1), slice(2, None, -2), slice(3, 3)]


@pytest.mark.parametrize("rows", SLICES, ids=str)
def test_rows_are_rows_of_the_whole(zoo: dict[str, ir.Tensor], rows: slice) -> None:
    for name, tensor in zoo.items():
        if tensor.spec.shape:
            whole = ir.dequantize(tensor)
            part = ir.dequantize(tensor, rows)
            np.testing.assert_array_equal(part, whole[rows], err_msg=name)


def test_chunks_do_not_show(zoo: dict[str, ir.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: ir.dequantize(tensor) for name, tensor in zoo.items()}
    digests = {name: ir.digest(values) for name, values in whole.items()}
    monkeypatch.setattr(packing, "_CHUNK", 50)
    for name, tensor in zoo.items():
        tensor.check(name)
        np.testing.assert_array_equal(ir.dequantize(tensor), whole[name], err_msg=name)
        assert ir.tensor_digest(tensor) == digests[name]
