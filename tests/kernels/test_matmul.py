"""Products with packed codebook matrices, against dequantizing and multiplying in FP64."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyquant import ir
from anyquant.runtime import native, native_matmul
from anyquant.runtime.native_matmul import Level, PackedMatrix
from anyquant.testing import affine_tensor, block_tensor, codebook_tensor

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no compiled library: {native.why_not()}")

LEVELS = [Level.SCALAR, Level.AVX2, Level.AVX512]
SHAPES = [(1, 1), (7, 33), (8, 512), (70, 577), (65, 64), (300, 1100), (530, 1536), (1000, 40)]
WIDTHS: dict[str, Callable[[int], np.ndarray]] = {
    **{str(bits): (lambda n, bits=bits: np.full(n, bits)) for bits in range(9)},  # type: ignore[misc]
    "mixed": lambda n: np.random.default_rng(n).integers(0, 9, n),
    "3 and 4": lambda n: 3 + np.arange(n) % 2,
}


def activations(batch: int, columns: int) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, columns)).astype(np.float32)


def error(y: np.ndarray, x: np.ndarray, tensor: ir.Tensor) -> float:
    """The largest error of a sum, relative to the sum of magnitudes that it is of."""
    weight, inputs = ir.dequantize(tensor).astype(np.float64), x.astype(np.float64)
    expected, size = inputs @ weight.T, np.abs(inputs) @ np.abs(weight.T)
    assert y.dtype == np.float32
    assert y.shape == expected.shape
    return float((np.abs(y - expected) / np.maximum(size, 1e-30)).max(initial=0))


def levels() -> list[Level]:
    return [level for level in LEVELS if level <= native_matmul.best_level()]


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_width_shape_and_axis(shape: tuple[int, int], axis: int, widths: str) -> None:
    """With all instructions that there are, of one and of many rows of activations, in several parts."""
    bits = WIDTHS[widths](shape[axis])
    for scaled, outliers in ((False, 0), (True, min(shape[0] * shape[1], 40))):
        tensor = codebook_tensor(shape, axis, bits, scaled=scaled, outliers=outliers)
        packed = PackedMatrix(tensor)
        for batch in (1, 2, 3, 4, 6, 7, 9):
            x = activations(batch, shape[1])
            for level in levels():
                assert error(packed.multiply(x, parts=1 + batch % 3, level=level), x, tensor) < 1e-6


def every_block(shape: tuple[int, int]) -> list[ir.Tensor]:
    found = []
    for width in range(2, 9):
        for block in (16, 32):
            for form, exponent_width in (("bfp", 0), ("log", 0), ("minifloat", max(1, width // 2))):
                found.append(block_tensor(ir.BlockSpec(shape, form, width, block, exponent_width)))
    for bits in (2, 4, 8):
        found += [affine_tensor(ir.AffineSpec(shape, bits, block)) for block in (16, 32, 64, 128, 256)]
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_every_block_format(shape: tuple[int, int]) -> None:
    for tensor in every_block(shape):
        packed = PackedMatrix(tensor)
        for batch in (1, 2, 3, 9):
            x = activations(batch, shape[1])
            for level in levels():
                y = packed.multiply(x, parts=1 + batch % 3, level=level)
                assert error(y, x, tensor) < 1e-5, (tensor.spec, batch, level)  # zeros of affine cancel


@pytest.mark.parametrize("widths", ["0", "3", "4", "7", "mixed"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (70, 577), (300, 1100)])
def test_bands(shape: tuple[int, int], axis: int, widths: str) -> None:
    """As llama.cpp asks for them, of one and of two rows of activations."""
    bits = WIDTHS[widths](shape[axis])
    for scaled, outliers in ((False, 0), (True, min(shape[0] * shape[1], 40))):
        tensor = codebook_tensor(shape, axis, bits, scaled=scaled, outliers=outliers)
        packed, x = PackedMatrix(tensor, in_bands=True), activations(3, shape[1])
        for level in levels():
            assert error(packed.multiply_in_bands(x, level), x, tensor) < 1e-6
        if axis:
            assert error(packed.multiply(x), x, tensor) < 1e-6
        else:  # packed for nothing else
            with pytest.raises(ValueError, match="refused"):
                packed.multiply(x)


@pytest.mark.parametrize("shape", [(7, 33), (70, 577), (9, 1536)])
def test_every_block_format_in_bands(shape: tuple[int, int]) -> None:
    for tensor in every_block(shape):
        packed, x = PackedMatrix(tensor, in_bands=True), activations(3, shape[1])
        for level in levels():
            assert error(packed.multiply_in_bands(x, level), x, tensor) < 1e-5, (tensor.spec, level)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("batch", [65, 66, 67, 69, 131, 133, 135])
def test_more_rows_than_one_pass_serves(axis: int, batch: int) -> None:
    shape = (150, 700)
    tensor = codebook_tensor(shape, axis, 2 + np.arange(shape[axis]) % 4, scaled=True, outliers=200)
    packed, x = PackedMatrix(tensor), activations(batch, shape[1])
    for level in levels():
        assert error(packed.multiply(x, level=level), x, tensor) < 1e-6


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("batch", [1, 2, 4, 6, 9, 140])
def test_results_do_not_depend_on_parts(axis: int, batch: int) -> None:
    shape = (521, 700)
    packed = PackedMatrix(codebook_tensor(shape, axis, np.arange(shape[axis]) % 9, outliers=100))
    x = activations(batch, shape[1])
    whole = packed.multiply(x)
    for parts in (2, 3, 7, 64, 1000):
        np.testing.assert_array_equal(packed.multiply(x, parts=parts), whole)


@pytest.mark.parametrize("axis", [0, 1])
def test_outliers_alone_and_everywhere(axis: int) -> None:
    """They replace what codes say, also where all weights are outliers, and in rows without codes."""
    shape = (9, 70)
    for bits in (np.zeros(shape[axis]), np.full(shape[axis], 3)):
        tensor = codebook_tensor(shape, axis, bits, scaled=True, outliers=shape[0] * shape[1])
        packed = PackedMatrix(tensor)
        for level, batch in itertools.product(levels(), (1, 3, 11)):
            x = activations(batch, shape[1])
            assert error(packed.multiply(x, level=level), x, tensor) < 1e-5  # the values beneath cancel


@pytest.mark.parametrize("axis", [0, 1])
def test_outliers_of_columns_whose_scale_is_zero(axis: int) -> None:
    """They stay what they are, though all codes of their columns count nothing."""
    shape = (300, 70)
    tensor = codebook_tensor(shape, axis, np.arange(shape[axis]) % 5, scaled=True, outliers=900)
    tensor.arrays[".input_scale"][::3] = 0
    tensor.arrays[".input_scale"][1::3] = 6e-8  # the smallest
    packed = PackedMatrix(tensor)
    for level, batch in itertools.product(levels(), (1, 3, 11)):
        x = activations(batch, shape[1])
        assert error(packed.multiply(x, level=level), x, tensor) < 1e-6


@pytest.mark.parametrize("level", list(Level)[1:])
def test_the_environment_limits_instructions(level: Level) -> None:
    program = "from anyquant.runtime.native_matmul import best_level; print(best_level().name)"
    environment = {**os.environ, "ANYQUANT_CPU": level.name.lower()}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == min(level, native_matmul.best_level()).name


def test_zero_and_constant_rows() -> None:
    tensor = codebook_tensor((10, 200), 0, np.full(10, 4))
    tensor.arrays[".codebook"][:] = np.repeat(np.arange(10) - 3, 16)
    packed, x = PackedMatrix(tensor), activations(2, 200)
    for level in levels():
        y = packed.multiply(x, level=level)
        assert not y[:, 3].any()
        assert error(y, x, tensor) < 1e-6


def test_no_activations() -> None:
    packed = PackedMatrix(codebook_tensor((10, 20), 0, np.full(10, 2)))
    assert packed.multiply(np.empty((0, 20), np.float32)).shape == (0, 10)
    about = packed.packed.ctypes.data
    for workspace in (None, 1):  # of no bytes, and so wherever it likes
        assert native.library().aq_matmul_prepare(about, None, 0, workspace, 0) == 0
        assert native.library().aq_matmul_run(about, 0, workspace, None, 0, 1, 0) == 0


@pytest.mark.parametrize(
    ("bits", "length"), [(bits, length) for bits in range(1, 9) for length in (512, 576, 1536, 4096)]
)
def test_memory_is_near_the_stored_size(bits: int, length: int) -> None:
    """Whole units lose nothing but with 7 bits; a tail takes whole chunks of 64, nibbles or bytes."""
    for axis in (0, 1):
        shape = (64, length) if axis == 0 else (length, 64)
        tensor = codebook_tensor(shape, axis, np.full(64, bits))
        tail = -(-(length % 512) // 64)
        unit, chunk = 64 * (8 if bits == 7 else bits), 32 if bits <= 4 else 64
        codes = 64 * (length // 512 * unit + min(tail * chunk, unit))
        entries = 64 * max(16, 1 << bits) * 2
        assert codes + entries <= PackedMatrix(tensor).nbytes < codes + entries + 64 * 4 + 1024


def test_other_activations_are_refused() -> None:
    packed = PackedMatrix(codebook_tensor((10, 20), 0, np.full(10, 2)))
    for wrong in (np.ones((1, 21), np.float32), np.ones(20, np.float32), np.ones((1, 20))):
        with pytest.raises(ValueError, match=r"expected float32 \[batch, 20\]"):
            packed.multiply(wrong)


def test_instructions_that_are_not_there_are_refused() -> None:
    packed = PackedMatrix(codebook_tensor((10, 20), 0, np.full(10, 2)))
    with pytest.raises(ValueError, match="a bad argument"):
        packed.multiply(activations(1, 20), level=9)  # type: ignore[arg-type]


def test_other_kinds_are_refused() -> None:
    dense = ir.Tensor(ir.DenseSpec((3, 4), "F32"), {".dense": np.zeros((3, 4), np.float32)})
    with pytest.raises(TypeError, match="kind dense"):
        PackedMatrix(dense)


@pytest.mark.parametrize("name", [".bits", ".codes", ".codebook", ".input_scale", ".outlier_indptr", ".outlier_value"])
@pytest.mark.parametrize("by", [-1, 1])
def test_arrays_of_another_length_are_refused(name: str, by: int) -> None:
    tensor = codebook_tensor((10, 33), 0, np.arange(10) % 9, scaled=True, outliers=5)
    array = tensor.arrays[name]
    tensor.arrays[name] = array[:-1] if by < 0 else np.concatenate([array, array[:1]])
    with pytest.raises(ValueError, match="do not fit together"):
        PackedMatrix(tensor)


def test_hostile_widths_and_outliers_are_refused() -> None:
    tensor = codebook_tensor((10, 33), 0, np.full(10, 2), outliers=5)
    tensor.arrays[".bits"] = np.full(10, 9, np.uint8)
    with pytest.raises(ValueError, match="do not fit together"):
        PackedMatrix(tensor)
    for name, at, value in (
        (".outlier_index", 0, 33), (".outlier_index", 4, 65535), (".outlier_indptr", 3, 2**32 - 1),
        (".outlier_indptr", 0, 1), (".outlier_indptr", -1, 4),
    ):  # fmt: skip
        tensor = codebook_tensor((10, 33), 0, np.full(10, 2), outliers=5)
        tensor.arrays[name][at] = value
        with pytest.raises(ValueError, match="outliers out of order"):
            PackedMatrix(tensor)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_header_is_refused_or_packed(data: st.DataObject) -> None:
    """Sizes that do not fit the arrays never reach them: nothing is read there."""
    size = st.one_of(st.integers(0, 40), st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1]))
    arrays = {name: np.zeros(data.draw(st.integers(0, 40)), np.uint8) for name in native_matmul._CODEBOOK}
    arrays["bits"] = np.array(data.draw(st.lists(st.integers(0, 9), max_size=12)), np.uint8)
    given_ = {"rows": data.draw(size), "cols": data.draw(size), "axis": data.draw(st.integers(-1, 2)), "index_bytes": 2}
    for name, array in arrays.items():
        present = data.draw(st.booleans())
        width = 1 if name in ("bits", "codes") else 4 if name == "outlier_indptr" else 2
        given_ |= {name: array.ctypes.data if present else None, f"{name}_len": array.size // width}
    matrix_ = native_matmul._CodebookMatrix(**given_)
    nbytes = native.library().aq_matmul_bytes(ctypes.addressof(matrix_))
    if nbytes:
        packed = native_matmul._aligned(nbytes)
        assert native.library().aq_matmul_pack(ctypes.addressof(matrix_), packed.ctypes.data, nbytes) in (0, -3)
        assert native.library().aq_matmul_pack(ctypes.addressof(matrix_), packed.ctypes.data, nbytes - 64) == -2
