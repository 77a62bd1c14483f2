"""CodebookMatMul and CodebookGather, one node each: in ONNX Runtime, in ONNX's reference, and after optimization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from anyquant import ir
from anyquant.exporters.onnx.codebook import stored_arrays
from anyquant.exporters.onnx.functions import (
    DOMAIN,
    GATHER,
    MATMUL,
    Steps,
    gather_function,
    matmul_function,
    steps_for,
)
from anyquant.testing import codebook_tensor

FALLBACKS = ("fold", "stream")
SHAPES = [(5, 16), (16, 5), (7, 7), (1, 9), (9, 1), (13, 24)]


class GatherElements(OpRun):  # type: ignore[misc]
    """The reference's own fails where the axis has more than 64 elements, or one."""

    op_domain = ""

    def _run(self, data: np.ndarray, indices: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
        return (np.take_along_axis(data, indices.astype(np.int64), axis),)


def session(model: onnx.ModelProto, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, given: np.ndarray) -> np.ndarray:
    result: np.ndarray = session(model).run(None, {"given": given})[0]
    return result


def reference(model: onnx.ModelProto, given: np.ndarray) -> np.ndarray:
    """By ONNX's own inliner and evaluator, which knows attributes of functions in nested graphs only when inlined."""
    inlined = onnx.inliner.inline_local_functions(model)
    result: np.ndarray = ReferenceEvaluator(inlined, new_ops=[GatherElements]).run(None, {"given": given})[0]
    return result


def cases(axes: tuple[int, ...]) -> Iterator[Any]:
    """Shapes, axes and widths, each with one combination of scale and outliers: none, a few, all."""
    turn = 0
    for shape in SHAPES:
        for axis in axes:
            channels = shape[axis]
            rng = np.random.default_rng(turn)
            widths = {"mixed": rng.integers(0, 9, channels), "zero": [0] * channels, "one": [1] * channels}
            for name, bits in {**widths, "eight": [8] * channels}.items():
                numel = shape[0] * shape[1]
                settings = {"scaled": bool(turn % 2), "outliers": (0, numel // 3, numel)[turn % 3], "seed": turn}
                turn += 1
                yield pytest.param(shape, axis, np.array(bits), settings, id=f"{shape}-{axis}-{name}-{turn % 6}")


ModelOf = Callable[..., onnx.ModelProto]


@pytest.mark.parametrize("fallback", FALLBACKS)
@pytest.mark.parametrize(("shape", "axis", "bits", "settings"), list(cases((0, 1))))
def test_products(
    model_of: ModelOf,
    shape: tuple[int, int],
    axis: int,
    bits: np.ndarray,
    settings: dict[str, Any],
    fallback: str,
) -> None:
    tensor = codebook_tensor(shape, axis, bits, **settings)
    weights = ir.dequantize(tensor)
    rng = np.random.default_rng(1)
    bias = rng.normal(size=shape[0]).astype(np.float32)
    activations = rng.normal(size=(2, 3, shape[1])).astype(np.float32)
    expected = activations @ weights.T + bias
    identity = np.eye(shape[1], dtype=np.float32)[None]
    for steps in (steps_for([tensor.spec]), Steps()):  # what it needs, and what other tensors of a model may need
        model = model_of(tensor, fallback, steps, bias)
        onnx.checker.check_model(model, full_check=True)
        np.testing.assert_allclose(run(model, activations), expected, atol=1e-4)
        np.testing.assert_allclose(reference(model, activations), expected, atol=1e-4)
        # One term of each sum is not zero: the weights come out bit for bit.
        found = run(model_of(tensor, fallback, steps), identity)[0].T
        assert ir.digest(found) == ir.digest(weights)


@pytest.mark.parametrize(("shape", "axis", "bits", "settings"), list(cases((0,))))
def test_rows(model_of: ModelOf, shape: tuple[int, int], axis: int, bits: np.ndarray, settings: dict[str, Any]) -> None:
    tensor = codebook_tensor(shape, axis, bits, **settings)
    weights = ir.dequantize(tensor)
    indices = np.random.default_rng(2).integers(-shape[0], shape[0], (2, 5))  # some twice, some from the end
    for steps in (steps_for([tensor.spec]), Steps()):
        model = model_of(tensor, steps=steps)
        onnx.checker.check_model(model, full_check=True)
        assert np.array_equal(run(model, indices), weights[indices])
        assert np.array_equal(reference(model, indices), weights[indices])


def test_blocks_of_one_channel_and_of_all(model_of: ModelOf) -> None:
    for axis in (0, 1):
        tensor = codebook_tensor((12, 20), axis, np.arange((12, 20)[axis]) % 9, scaled=True, outliers=30)
        expected = ir.dequantize(tensor)
        for block in (1, 1 << 20):
            model = model_of(tensor, "stream", block=block)
            assert np.array_equal(run(model, np.eye(20, dtype=np.float32)[None])[0].T, expected)


def test_columns_beyond_16_bits(model_of: ModelOf) -> None:
    tensor = codebook_tensor((3, 65544), 0, np.array([1, 0, 2]), outliers=50)
    assert tensor.arrays[".outlier_index"].dtype == np.uint32
    weights = ir.dequantize(tensor)
    activations = np.random.default_rng(0).normal(size=(1, 2, 65544)).astype(np.float32)
    for fallback in FALLBACKS:
        np.testing.assert_allclose(run(model_of(tensor, fallback), activations), activations @ weights.T, atol=5e-3)
    assert np.array_equal(run(model_of(tensor), np.array([[2, 0]])), weights[[[2, 0]]])


@pytest.mark.parametrize("opset", [18, 20, 21, 23, 24])
def test_the_opset_of_the_model_is_used(model_of: ModelOf, opset: int) -> None:
    tensor = codebook_tensor((6, 20), 0, np.array([3, 0, 8, 1, 2, 5]), scaled=True, outliers=9)
    weights = ir.dequantize(tensor)
    for fallback in FALLBACKS:
        model = model_of(tensor, fallback, opset=opset)
        onnx.checker.check_model(model, full_check=True)
        assert np.array_equal(run(model, np.eye(20, dtype=np.float32)[None])[0].T, weights)
    assert np.array_equal(run(model_of(tensor, opset=opset), np.array([[5, 0]])), weights[[[5, 0]]])


def test_unused_planes_change_nothing(model_of: ModelOf) -> None:
    tensor = codebook_tensor((6, 16), 0, np.array([3, 0, 8, 1, 2, 5]))
    planes = stored_arrays(tensor)[".planes"]
    more = np.concatenate([planes, np.full((2, planes.shape[1]), 255, np.uint8)])
    identity = np.eye(16, dtype=np.float32)[None]
    for fallback in FALLBACKS:
        found = run(model_of(tensor, fallback, planes=more), identity)
        assert np.array_equal(found, run(model_of(tensor, fallback), identity))


def test_a_kernel_of_that_name_is_used_instead(model_of: ModelOf) -> None:
    class CodebookMatMul(OpRun):  # type: ignore[misc]
        op_domain = DOMAIN

        def _run(self, activations: np.ndarray, *stored: np.ndarray, **sizes: int) -> tuple[np.ndarray]:
            assert [array.dtype.name for array in stored[:3]] == ["uint8", "uint8", "float16"]
            return (np.full((*activations.shape[:-1], sizes["N"]), 7, np.float32),)

    model = model_of(codebook_tensor((4, 8), 0, np.full(4, 2)), "fold")
    activations = np.ones((1, 1, 8), np.float32)
    result = ReferenceEvaluator(model, new_ops=[CodebookMatMul]).run(None, {"given": activations})[0]
    assert (result == 7).all()


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def all_steps(axis: int) -> ir.Tensor:
    """A matrix that needs every step, large enough for tables and counters to be small beside it."""
    return codebook_tensor((252, 516), axis, [2, 3, 4], scaled=True, outliers=60)


@pytest.mark.parametrize("axis", [0, 1])
def test_fold_leaves_one_matrix_and_no_decoding(model_of: ModelOf, axis: int, tmp_path: Path) -> None:
    session(model_of(all_steps(axis), "fold"), tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    assert {node.op_type for node in graph.node} <= {"Shape", "Concat", "Reshape", "Gemm"}
    large = [tensor for tensor in graph.initializer if np.prod(tensor.dims) > 16]
    assert [(list(t.dims), t.data_type) for t in large] == [([(252, 516)[axis], (516, 252)[axis]], 1)]


@pytest.mark.parametrize("axis", [0, 1])
def test_stream_keeps_nothing_larger_than_what_is_stored(model_of: ModelOf, axis: int, tmp_path: Path) -> None:
    tensor = all_steps(axis)
    session(model_of(tensor, "stream", block=1 << 14), tmp_path / "optimized.onnx")
    graphs = list(_graphs(onnx.load(tmp_path / "optimized.onnx").graph))
    assert len(graphs) == 2
    assert "GatherElements" in {node.op_type for node in graphs[1].node}
    held = [numpy_helper.to_array(t) for graph in graphs for t in graph.initializer]
    stored = sum(array.nbytes for array in stored_arrays(tensor).values())
    planes = stored_arrays(tensor)[".planes"].nbytes
    assert max(array.nbytes for array in held) == planes
    # What was folded: offsets of blocks, the scale in FP32, and the table of the bits of a byte.
    assert sum(array.nbytes for array in held) < stored + 4 * 516 + 2048 + 4096


def test_bodies_have_only_the_steps_that_are_needed() -> None:
    def operators(function: onnx.FunctionProto) -> set[str]:
        return {node.op_type for node in function.node}

    few = Steps(ragged=False, scaled=False, outliers=False)
    full = operators(matmul_function(18, "fold", Steps()))
    assert {"Slice", "ScatterND", "ScatterElements"} <= full
    assert operators(matmul_function(18, "fold", few)) == full - {"Slice", "Neg", "Sub", "ScatterND", "ScatterElements"}
    assert "ScatterND" in operators(gather_function(18, Steps()))
    assert "ScatterND" not in operators(gather_function(18, few))
    assert (matmul_function(18, "fold", few).name, gather_function(18, few).name) == (MATMUL, GATHER)


@pytest.mark.parametrize("fallback", FALLBACKS)
@pytest.mark.parametrize("axis", [0, 1])
def test_no_activations_have_no_products(model_of: ModelOf, fallback: str, axis: int) -> None:
    tensor = codebook_tensor((13, 24), axis, np.arange((13, 24)[axis]) % 5, scaled=True, outliers=9)
    found = run(model_of(tensor, fallback), np.zeros((2, 0, 24), np.float32))
    assert found.shape == (2, 0, 13)
