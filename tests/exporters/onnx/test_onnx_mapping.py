"""The exact mapping to 4-bit planes, tensor by tensor, against an independent decoding of the planes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from anyquant import ir
from anyquant.exporters.onnx.matmul_nbits import Form, array_shapes, form_of, integer_matrix, scale_table

from_values = Callable[..., ir.Tensor]


def _decode(arrays: dict[str, np.ndarray], form: Form, columns: int) -> np.ndarray:
    """FP32 products and sum in the order of the graph: high plane at 16 times the scale, plus the low plane."""
    scale = arrays[".scale"]
    scale = scale_table(form.width)[scale] if form.scale == "exponent" else scale.astype(np.float32)

    def plane(side: str, factor: int, default: int) -> np.ndarray:
        packed = arrays["." + side]
        q = np.empty((*packed.shape[:2], 2 * packed.shape[2]), np.float32)
        q[..., 0::2], q[..., 1::2] = packed & 15, packed >> 4
        zero = np.full(scale.shape, default, np.float32)
        if f".zero_{side}" in arrays:
            stored = arrays[f".zero_{side}"]
            pairs = np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(stored), -1)
            zero = pairs[:, : scale.shape[1]].astype(np.float32)
        product: np.ndarray = (q - zero[:, :, None]) * (scale * np.float32(factor))[:, :, None]
        return product

    values = plane("low", 1, 8) if form.bits == 4 else plane("high", 16, 8) + plane("low", 1, 0)
    return values.reshape(len(values), -1)[:, :columns]


def _check(tensor: ir.Tensor, rows: slice = slice(None)) -> Form:
    form = form_of(tensor.spec)
    assert form is not None
    wanted = ir.dequantize(tensor, rows)
    matrix = integer_matrix(tensor, rows)
    arrays = matrix.arrays()
    shapes = array_shapes(form, *wanted.shape)
    assert {k: (a.dtype, a.shape) for k, a in arrays.items()} == shapes
    assert np.array_equal(_decode(arrays, form, wanted.shape[1]), wanted)
    assert np.array_equal(matrix.values(wanted.shape[1]), wanted)
    return form


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("width", range(2, 9))
def test_bfp_of_every_width(tensor_of: from_values, width: int, block: int) -> None:
    values = np.random.default_rng(width).normal(size=(7, 83)).astype(np.float32)
    values[2, 16:48] = 0
    tensor = tensor_of(values, f"bfp{width}/{block}")
    form = _check(tensor)
    _check(tensor, slice(2, 5))
    assert form == Form(4 if width <= 4 else 8, block, "exponent", width=width)


@pytest.mark.parametrize("width", [2, 8])
def test_bfp_at_both_ends_of_the_exponents(width: int) -> None:
    largest = (1 << (width - 1)) - 1
    codes = np.full((2, 32), largest, np.uint8)
    codes[:, 1::2] |= 1 << (width - 1)
    packed = np.packbits(
        ((codes[..., None] >> np.arange(width, dtype=np.uint8)) & 1).reshape(2, -1), axis=1, bitorder="little"
    )
    arrays = {".codes": packed, ".exponents": np.array([[-127], [127]], np.int8)}
    tensor = ir.Tensor(ir.BlockSpec((2, 32), "bfp", width, 32), arrays)
    tensor.check("extremes")
    assert np.isfinite(ir.dequantize(tensor)).all()
    _check(tensor)


@pytest.mark.parametrize(("bits", "block"), [(2, 16), (4, 32), (8, 64), (8, 256)])
def test_affine(tensor_of: from_values, bits: int, block: int) -> None:
    values = np.random.default_rng(bits).normal(0.3, 1, (5, 333)).astype(np.float32)
    form = _check(tensor_of(values, f"affine{bits}/{block}"))
    assert form == Form(max(bits, 4), block, "f16", zero=True)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "Q6_K"])
def test_stock_types(tensor_of: from_values, type_name: str) -> None:
    tensor = tensor_of(np.empty((9, 512), np.float32), type_name)
    _check(tensor)
    _check(tensor, slice(3, 4))


@pytest.mark.parametrize(
    "spec",
    [
        ir.GGMLSpec((4, 32), "Q4_1"),
        ir.GGMLSpec((4, 256), "Q4_K"),
        ir.BlockSpec((4, 32), "log", 4),
        ir.BlockSpec((4, 32), "minifloat", 4, 32, 2),
        ir.DenseSpec((4, 32), "F16"),
    ],
)
def test_kinds_without_an_integer_form(spec: ir.Spec) -> None:
    assert form_of(spec) is None
    with pytest.raises(TypeError, match="no integer form"):
        integer_matrix(ir.Tensor(spec, {}), slice(None))


@pytest.mark.parametrize("width", range(2, 9))
def test_the_table_covers_every_step(width: int) -> None:
    table = scale_table(width).astype(np.float64)
    assert np.array_equal(np.log2(table), np.arange(256) - 128 - width + 1)
