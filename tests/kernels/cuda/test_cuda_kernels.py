"""The CUDA kernels in the emulator, against the oracle: every kind, width and odd shape."""

from __future__ import annotations

import numpy as np
import pytest

from anyquant import ir
from anyquant.runtime.cuda import layout, products, reference
from anyquant.runtime.cuda.products import Output, Type
from anyquant.testing import affine_tensor, block_tensor, codebook_tensor, ggml_tensor
from tests.kernels.cuda.machine import EmulatedGpu, dequantized, expanded, from_kind, multiplied, to_kind

MIXED = [4, 0, 2, 3, 1, 8, 5, 7, 6]
SHAPES = [(1, 1), (1, 300), (33, 129), (70, 128), (300, 40)]
LIMIT = {Type.FP32: 2e-6, Type.FP16: 1e-3, Type.BF16: 5e-3}  # results of 16 bits are rounded themselves


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> EmulatedGpu:
    return EmulatedGpu(tmp_path_factory.mktemp("emulated"))


def assert_product(gpu: EmulatedGpu, tensor: ir.Tensor, batch: int, kind: Type) -> None:
    x = np.random.default_rng(batch).standard_normal((batch, tensor.spec.shape[1])).astype(np.float32)
    found = multiplied(gpu, tensor, x, kind)
    exact = from_kind(to_kind(x, kind), kind) @ ir.dequantize(tensor).astype(np.float64).T
    # Of a few results, all may be small by chance: not what rounding goes by.
    sizes = np.sqrt(from_kind(to_kind(x, kind), kind) ** 2 @ ir.dequantize(tensor).astype(np.float64).T ** 2)
    error = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(np.maximum(sizes, np.abs(exact)), axis=1)
    assert error.max() <= LIMIT[kind], (tensor.spec, batch, kind, error.max())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_odd_shapes(gpu: EmulatedGpu, shape: tuple[int, int], axis: int) -> None:
    tensor = codebook_tensor(shape, axis, MIXED, scaled=True, outliers=max(1, shape[0] * shape[1] // 50))
    for batch, kind in [(1, Type.FP32), (3, Type.FP16), (8, Type.FP32), (5, Type.BF16), (17, Type.FP16)]:
        assert_product(gpu, tensor, batch, kind)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", range(9))
def test_products_of_one_width(gpu: EmulatedGpu, bits: int, axis: int) -> None:
    tensor = codebook_tensor((40, 200), axis, bits)
    for batch, kind in [(1, Type.FP32), (8, Type.FP16)]:
        assert_product(gpu, tensor, batch, kind)


@pytest.mark.parametrize("axis", [0, 1])
def test_many_columns_and_wide_indices(gpu: EmulatedGpu, axis: int) -> None:
    tensor = codebook_tensor((3, 65600), axis, [2, 4], outliers=70)
    assert tensor.arrays[".outlier_index"].itemsize == 4
    assert_product(gpu, tensor, 1, Type.FP32)
    assert_product(gpu, tensor, 6, Type.FP16)


@pytest.mark.parametrize("axis", [0, 1])
def test_outliers_alone(gpu: EmulatedGpu, axis: int) -> None:
    tensor = codebook_tensor((20, 70), axis, 0, outliers=1400)
    assert_product(gpu, tensor, 2, Type.FP32)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_same_bits_each_time(gpu: EmulatedGpu, axis: int) -> None:
    tensor = codebook_tensor((64, 512), axis, [2, 3, 4], scaled=True, outliers=80)
    x = np.random.default_rng(0).standard_normal((12, 512)).astype(np.float32)
    for some, kind in [(x[:4], Type.FP32), (x, Type.FP16)]:
        first, again = (multiplied(gpu, tensor, some, kind) for _ in range(2))
        assert (first == again).all()
        # Another batch changes nothing in a row's sum.
        assert (multiplied(gpu, tensor, some[:3], Type.FP32) == multiplied(gpu, tensor, some[:4], Type.FP32)[:3]).all()


def test_activations_beyond_fp16(gpu: EmulatedGpu) -> None:
    tensor = codebook_tensor((32, 256), 0, 4, scaled=True)
    x = np.random.default_rng(0).standard_normal((6, 256)).astype(np.float32)
    x *= np.array([1e30, 1e-30, 1, 0, 3e4, 65504])[:, None].astype(np.float32)
    found = multiplied(gpu, tensor, x, Type.BF16)
    exact = from_kind(to_kind(x, Type.BF16), Type.BF16) @ ir.dequantize(tensor).astype(np.float64).T
    norms = np.linalg.norm(exact, axis=1)
    assert (np.linalg.norm(found - exact, axis=1) <= 5e-3 * norms).all()


def test_what_is_not_finite_stays_in_its_row(gpu: EmulatedGpu) -> None:
    tensor = codebook_tensor((32, 256), 0, 4)
    x = np.ones((6, 256), np.float32)
    x[1, 3], x[2, 5] = np.inf, np.nan
    for found in (multiplied(gpu, tensor, x, Type.FP32), multiplied(gpu, tensor, x, Type.FP16)):
        assert np.isfinite(found[[0, 3, 4, 5]]).all()
        assert not np.isfinite(found[[1, 2]]).any()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_expanded_weights_are_the_oracles(gpu: EmulatedGpu, shape: tuple[int, int], axis: int) -> None:
    for scaled, outliers in [(False, 0), (True, 1 + shape[0] * shape[1] // 40)]:
        tensor = codebook_tensor(shape, axis, MIXED, scaled=scaled, outliers=outliers)
        weight = ir.dequantize(tensor)
        assert ir.digest(expanded(gpu, tensor, Type.FP32)) == ir.digest(weight)
        for kind in (Type.FP16, Type.BF16):
            assert (from_kind(expanded(gpu, tensor, kind), kind) == from_kind(to_kind(weight, kind), kind)).all()


REFERENCES = [
    *(codebook_tensor((33, 50), axis, MIXED) for axis in (0, 1)),
    *(codebook_tensor((33, 50), axis, MIXED, scaled=True, outliers=40) for axis in (0, 1)),
    codebook_tensor((7, 9), 0, 0),
    *(
        block_tensor(ir.BlockSpec((5, 70), form, width, block, exponent_width))
        for form, width, exponent_width in [
            ("bfp", 2, 0), ("bfp", 5, 0), ("bfp", 8, 0), ("log", 3, 0), ("minifloat", 4, 2), ("minifloat", 8, 4),
        ]
        for block in (16, 32)
    ),
    *(affine_tensor(ir.AffineSpec((5, 300), bits, block)) for bits in (2, 4, 8) for block in (16, 256)),
    *(ggml_tensor(ir.GGMLSpec((3, 1024), name)) for name in ir.GGML_TYPES),
]  # fmt: skip


@pytest.mark.parametrize("tensor", REFERENCES, ids=lambda tensor: f"{tensor.spec}")
def test_reference_kernels(gpu: EmulatedGpu, tensor: ir.Tensor) -> None:
    weight = dequantized(gpu, tensor)
    assert ir.digest(weight) == ir.digest(ir.dequantize(tensor))
    x = np.random.default_rng(0).standard_normal((3, weight.shape[1])).astype(np.float32)
    y = np.full((3, weight.shape[0]), np.nan, np.float32)
    reference.multiply(gpu, weight.shape, weight, x, 3, y)
    sizes = np.abs(x).astype(np.float64) @ np.abs(weight.T).astype(np.float64)
    assert (np.abs(y - x.astype(np.float64) @ weight.T.astype(np.float64)) <= 1e-6 * sizes).all()


def test_every_tile_and_warp_count(gpu: EmulatedGpu, tmp_path: object) -> None:
    """With many multiprocessors blocks have 16 warps; with few, 8."""
    tensor = codebook_tensor((64, 1500), 0, [3, 4], outliers=20)
    x = np.random.default_rng(0).standard_normal((2, 1500)).astype(np.float32)
    few = multiplied(gpu, tensor, x, Type.FP32)
    gpu.multiprocessors, before = 1, gpu.multiprocessors
    many = multiplied(gpu, tensor, x, Type.FP32)
    gpu.multiprocessors = before
    assert np.allclose(few, many, rtol=1e-5, atol=1e-5)


def test_batches_that_are_too_large() -> None:
    about, _ = layout.pack_codebook(codebook_tensor((4, 4), 0, 2))
    for batch, kind in [(0, Type.FP32), (9, Type.FP32), (33, Type.FP16)]:
        with pytest.raises(ValueError, match=r"not 1 to"):
            products.multiply(None, about, None, None, kind, batch, None)  # type: ignore[arg-type]


def test_what_is_no_codebook() -> None:
    with pytest.raises(TypeError, match=r"kind block"):
        layout.pack_codebook(block_tensor(ir.BlockSpec((2, 16))))
    dense = ir.Tensor(ir.DenseSpec((2, 2), "F32"), {".dense": np.zeros((2, 2), np.float32)})
    with pytest.raises(TypeError, match=r"kind dense"):
        reference.stored_arrays(dense)


def test_outputs_alone_are_written(gpu: EmulatedGpu) -> None:
    """An array that is not marked as an output is refused by the emulator."""
    from tests.kernels.cuda.emulated import EmulatorError

    w = np.ones((2, 2), np.float32)
    with pytest.raises(EmulatorError):
        gpu.launch("reference.cu", {}, "multiply", (1, 1), 256, 0, w, w, 2, 2, w.copy())
    gpu.launch("reference.cu", {}, "multiply", (1, 1), 256, 0, w, w, 2, 2, Output(w.copy()))
