"""Every way in which a tensor's arrays can be wrong is found, and named with array, index and count."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import CorruptFileError
from anyquant.ir import packing
from anyquant.ir.packing import pack
from anyquant.ir.tensor import as_stored

Maker = Callable[..., ir.Tensor]


def altered(tensor: ir.Tensor, suffix: str, index: object, value: object) -> ir.Tensor:
    arrays = {key: array.copy() for key, array in tensor.arrays.items()}
    arrays[suffix][index] = value
    return ir.Tensor(tensor.spec, arrays)


def assert_refused(tensor: ir.Tensor, message: str) -> None:
    with pytest.raises(CorruptFileError, match=re.escape(message)) as caught:
        tensor.check("some.name")
    assert str(caught.value).startswith("some.name")
    assert caught.value.exit_code == 3


def test_the_zoo_is_in_order(zoo: dict[str, ir.Tensor]) -> None:
    for name, tensor in zoo.items():
        tensor.check(name)


def test_arrays_missing_extra_or_of_another_form(zoo: dict[str, ir.Tensor]) -> None:
    for tensor in zoo.values():
        for suffix, array in tensor.arrays.items():
            rest = {key: value for key, value in tensor.arrays.items() if key != suffix}
            assert_refused(ir.Tensor(tensor.spec, rest), "has arrays")
            assert_refused(ir.Tensor(tensor.spec, {**tensor.arrays, ".weight": array}), "has arrays")
            for wrong in (array[None], array.astype(">i8"), array.astype(object), array.reshape(-1, 1, 1)):
                assert_refused(ir.Tensor(tensor.spec, {**rest, suffix: wrong}), "must be")
            if array.dtype.itemsize > 1:
                swapped = array.astype(array.dtype.newbyteorder(">"))
                assert_refused(ir.Tensor(tensor.spec, {**rest, suffix: swapped}), "must be")


# --- block


def block(codes: list[int], exponents: list[int], **spec: object) -> ir.Tensor:
    """A tensor of one row."""
    full = ir.BlockSpec((1, len(codes)), block=16, **spec)
    padded = codes + [0] * (full.blocks * 16 - len(codes))
    arrays = {".codes": pack(np.array([padded]), full.width), ".exponents": np.array([exponents], np.int8)}
    return ir.Tensor(full, arrays)


def test_block_negative_zero() -> None:
    for form, exponent_width in (("bfp", 0), ("minifloat", 2)):
        tensor = block([1, 8, 2, 8], [0], format=form, exponent_width=exponent_width)
        assert_refused(tensor, ".codes: negative zero at index [0, 1] (2 in all)")
    block([1, 8], [0], format="log").check("w")  # there it is a value as any other


def test_block_zero_exponent_marks_just_zero_blocks() -> None:
    block([0] * 16 + [1], [-128, 0]).check("w")
    assert_refused(block([0] * 16 + [1], [0, 0]), "exponent -128 must mark just the zero blocks; wrong at index [0, 0]")
    assert_refused(block([0] * 16 + [1], [-128, -128]), "just the zero blocks; wrong at index [0, 1] (1 in all)")
    assert_refused(block([1, 2], [-128], format="log"), ".exponents: a zero block in a log tensor")


@pytest.mark.parametrize("form", ["bfp", "log"])
def test_block_padding(form: str) -> None:
    tensor = block([1] * 17, [0, 0], format=form)
    tensor.check("w")
    message = ".codes: a code beyond the last column is not zero at index [0, 14] (1 in all)"
    assert_refused(altered(tensor, ".codes", (0, -1), 0x10), message)


def test_log_below_float32() -> None:
    # 6 bits of magnitude: code 0 means 2**(e - 63).
    block([0] * 3, [-86], format="log", width=7).check("w")
    message = ".codes: a value below 2**-149, the least of FP32, at index [0, 1] (2 in all)"
    assert_refused(block([1, 0, 0], [-87], format="log", width=7), message)


def test_minifloat_below_float32() -> None:
    # 3 bits of exponent, 4 of mantissa: the least bit is 2**(1 - 7 + e - 4).
    block([1], [-127], format="minifloat", width=8, exponent_width=3).check("w")
    # 6 bits of exponent: field f means 2**(f - 63 + e); e = -100: field 14 is 2**-149, with one bit of mantissa.
    spec = {"format": "minifloat", "width": 8, "exponent_width": 6}
    block([14 << 1], [-100], **spec).check("w")
    assert_refused(block([1, 14 << 1 | 1], [-100], **spec), ".codes: a value that FP32 cannot hold")
    assert_refused(block([14 << 1 | 1], [-100], **spec), "at index [0, 0] (1 in all)")
    assert_refused(block([1], [-127], **spec), "a value that FP32 cannot hold")


@pytest.mark.parametrize("width", range(2, 9))
def test_minifloat_check_agrees_with_exact_values(width: int) -> None:
    """For all codes and the low exponents: accepted if and only if FP32 holds the value."""
    for exponent_width in range(1, width):
        mantissa_bits = width - 1 - exponent_width
        for exponent in (-127, -120, -90):
            for code in range(1, 1 << (width - 1)):
                field, mantissa = divmod(code, 1 << mantissa_bits)
                power = max(field, 1) - ((1 << exponent_width) - 1) + exponent
                exact = (mantissa / (1 << mantissa_bits) + (field > 0)) * 2.0**power  # exact in FP64
                tensor = block([code], [exponent], format="minifloat", width=width, exponent_width=exponent_width)
                if float(np.float32(exact)) == exact:
                    tensor.check("w")
                    assert ir.dequantize(tensor)[0, 0] == exact
                else:
                    assert_refused(tensor, "FP32 cannot hold")


def test_counts_and_indices_run_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.ones((6, 16), np.uint8)
    codes[3:, 5] = 8
    arrays = {".codes": pack(codes, 4), ".exponents": np.zeros((6, 1), np.int8)}
    monkeypatch.setattr(packing, "_CHUNK", 32)
    assert_refused(ir.Tensor(ir.BlockSpec((6, 16), block=16), arrays), "negative zero at index [3, 5] (3 in all)")


# --- codebook


def test_codebook_widths(make_codebook: Maker) -> None:
    tensor = make_codebook((3, 5), 0, [1, 2, 3])
    assert_refused(altered(tensor, ".bits", 1, 9), ".bits: a width above 8 at index [1]")
    assert_refused(altered(tensor, ".bits", 1, 255), ".bits: a width above 8")
    assert_refused(altered(tensor, ".bits", 2, 2), "the widths call for 5 code bytes and 10 codebook entries")


def test_codebook_entries(make_codebook: Maker) -> None:
    tensor = make_codebook((3, 5), 0, [1, 2, 0])
    signalling = np.array(0x7C01, "<u2").view("<f2")
    for bad in (np.nan, np.inf, -np.inf, signalling):
        assert_refused(altered(tensor, ".codebook", 6, bad), ".codebook: a non-finite entry at index [6] (1 in all)")
    unsorted = altered(tensor, ".codebook", slice(2, 6), [1, 2, 3, 2.5])
    assert_refused(unsorted, ".codebook: entries are not ascending at index [5] (1 in all)")
    altered(tensor, ".codebook", slice(None), [5, 6, 1, 2, 2, 2, -9]).check("w")  # anew in each channel; spare ones
    assert_refused(altered(tensor, ".codebook", slice(0, 2), [2, 1]), "entries are not ascending at index [1]")


@pytest.mark.parametrize("axis", [0, 1])
def test_codebook_padding(axis: int, make_codebook: Maker) -> None:
    shape = (3, 5) if axis == 0 else (5, 3)
    tensor = make_codebook(shape, axis, [0, 8, 3])  # 0, 5 and 2 bytes, the last with one bit to spare
    tensor.check("w")
    assert_refused(altered(tensor, ".codes", 6, 0x80), ".codes: padding bits are not zero in the channel at index [2]")


def test_codebook_input_scale(make_codebook: Maker) -> None:
    tensor = make_codebook((2, 5), 1, [1] * 5, input_scale=True)
    for bad in (0.0, -0.0, -1.0, np.nan, np.inf):
        message = ".input_scale: a scale that is not positive and finite at index [3]"
        assert_refused(altered(tensor, ".input_scale", 3, bad), message)
    altered(tensor, ".input_scale", 3, 2.0**-24).check("w")


def test_codebook_outliers(make_codebook: Maker) -> None:
    tensor = make_codebook((3, 4), 0, [1, 1, 1], outliers=4)
    good = altered(tensor, ".outlier_indptr", slice(None), [0, 2, 2, 4])
    good = altered(good, ".outlier_index", slice(None), [1, 3, 0, 1])
    good.check("w")
    runs = "must run from 0 to 4"
    assert_refused(altered(good, ".outlier_indptr", 0, 1), runs)
    assert_refused(altered(good, ".outlier_indptr", 3, 3), runs)
    assert_refused(altered(good, ".outlier_indptr", 3, 2**32 - 1), runs)
    assert_refused(altered(good, ".outlier_indptr", 1, 3), "row pointers descend at index [1]")
    assert_refused(altered(good, ".outlier_indptr", 1, 2**32 - 1), "row pointers descend")
    assert_refused(altered(good, ".outlier_index", 3, 4), ".outlier_index: a column beyond 3 at index [3]")
    assert_refused(altered(good, ".outlier_index", 1, 1), "not strictly ascending in their row at index [1]")
    assert_refused(altered(good, ".outlier_index", 1, 0), "not strictly ascending in their row at index [1]")
    for bad in (np.nan, np.inf):
        assert_refused(altered(good, ".outlier_value", 2, bad), ".outlier_value: a non-finite value at index [2]")


# --- affine


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_affine(bits: int, make_tensor: Maker) -> None:
    tensor = make_tensor(ir.AffineSpec((2, 17), bits, 16))
    tensor.check("w")
    for bad in (np.nan, np.inf):
        assert_refused(altered(tensor, ".scale", (1, 1), bad), ".scale: a non-finite scale at index [1, 1] (1 in all)")
    assert_refused(altered(tensor, ".codes", (1, -1), 1), ".codes: a code beyond the last column is not zero at index")
    altered(tensor, ".zero", (1, 0), (1 << bits) - 1).check("w")
    if bits < 8:
        message = f".zero: a zero point above {(1 << bits) - 1} at index [1, 0]"
        assert_refused(altered(tensor, ".zero", (1, 0), 1 << bits), message)


# --- dense (ggml: with its dequantization)


@pytest.mark.parametrize(
    ("dtype", "pattern", "bad"),
    [
        ("F16", "<u2", [0x7C00, 0xFC00, 0x7E00, 0x7C01]),
        ("BF16", "<u2", [0x7F80, 0xFF80, 0x7FC0, 0x7F81]),
        ("F32", "<u4", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001]),
        ("F64", "<u8", [0x7FF0000000000000, 0xFFF8000000000000, 0x7FF0000000000001]),
    ],
)
def test_dense_non_finite(dtype: str, pattern: str, bad: list[int], make_tensor: Maker) -> None:
    tensor = make_tensor(ir.DenseSpec((3, 4), dtype))
    for bits in bad:
        value = np.array(bits, pattern).view(tensor.arrays[".dense"].dtype)
        assert_refused(altered(tensor, ".dense", (2, 1), value), ".dense: a value that is not finite")
        assert_refused(altered(tensor, ".dense", (2, 1), value), "at index [2, 1] (1 in all)")
        assert not np.isfinite(ir.dequantize(altered(tensor, ".dense", (2, 1), value))).all()
    scalar = make_tensor(ir.DenseSpec((), dtype))
    assert_refused(altered(scalar, ".dense", (), value), "at index [] (1 in all)")


def test_dense_f64_beyond_float32(make_tensor: Maker) -> None:
    tensor = make_tensor(ir.DenseSpec((3,), "F64"))
    assert_refused(altered(tensor, ".dense", 1, 1e39), "a value that is not finite in FP32 at index [1] (1 in all)")


def test_check_needs_little_memory() -> None:
    """16 million codes are checked without an intermediate of several times their number."""
    spec = ir.BlockSpec((4096, 4096))
    arrays = {suffix: np.zeros(shape, dtype) for suffix, (dtype, shape) in spec.arrays().items()}
    arrays[".exponents"][:] = -128
    tracemalloc.start()
    ir.Tensor(spec, arrays).check("w")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_as_stored() -> None:
    scalar = as_stored(np.float32(1), np.dtype("<f4"))
    assert scalar.shape == ()
    turned = as_stored(np.ones((2, 3), ">f4").T, np.dtype("<f4"))
    assert turned.flags.c_contiguous
    assert turned.dtype == np.dtype("<f4")
