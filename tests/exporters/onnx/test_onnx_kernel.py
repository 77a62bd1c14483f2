"""CodebookMatMul by our library in ONNX Runtime, this version and the oldest one, against dequantizing in FP64."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from anyquant import ir
from anyquant.exporters.onnx.codebook import stored_arrays
from anyquant.runtime import native
from anyquant.runtime.onnx_session import LIBRARY
from anyquant.testing import codebook_tensor

REASON = f"no compiled operators: {native.missing(LIBRARY)}"
pytestmark = pytest.mark.skipif(native.path_of(LIBRARY) is None, reason=REASON)

ModelOf = Callable[..., onnx.ModelProto]

SHAPES = [(1, 1), (7, 33), (8, 512), (70, 577), (530, 1100), (1000, 40)]
WIDTHS: dict[str, Callable[[int], np.ndarray]] = {
    "zero": lambda n: np.zeros(n),
    "one": lambda n: np.ones(n),
    "mixed": lambda n: np.random.default_rng(n).integers(0, 9, n),
    "eight": lambda n: np.full(n, 8),
}


def session(model: onnx.ModelProto, threads: int = 1, optimized: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.path_of(LIBRARY)))
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def error(y: np.ndarray, x: np.ndarray, tensor: ir.Tensor, bias: np.ndarray) -> float:
    """The largest error of a sum, relative to the sum of magnitudes that it is of."""
    weight, inputs = ir.dequantize(tensor).astype(np.float64), x.astype(np.float64)
    expected, size = inputs @ weight.T + bias, np.abs(inputs) @ np.abs(weight.T) + np.abs(bias)
    assert y.shape == expected.shape
    return float((np.abs(y - expected) / np.maximum(size, 1e-30)).max(initial=0))


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(model_of: ModelOf, shape: tuple[int, int], axis: int, widths: str) -> None:
    rng, bits = np.random.default_rng(1), WIDTHS[widths](shape[axis])
    numel = shape[0] * shape[1]
    for scaled, outliers in ((False, 0), (True, min(numel, 40)), (False, numel if numel < 9999 else 0)):
        tensor = codebook_tensor(shape, axis, bits, scaled=scaled, outliers=outliers)
        for bias in (np.zeros(1, np.float32), rng.normal(size=shape[0]).astype(np.float32)):
            run = session(model_of(tensor, "fold", bias=bias), threads=2)
            for leading in ((1, 1), (2, 3), (1, 70)):
                x = rng.normal(size=(*leading, shape[1])).astype(np.float32)
                assert error(run.run(None, {"given": x})[0], x, tensor, bias) < 2e-6


def test_onnxruntime_takes_the_kernel_and_not_the_function(model_of: ModelOf, tmp_path: Path) -> None:
    for fallback in ("fold", "stream"):
        model = model_of(codebook_tensor((64, 96), 0, np.full(64, 3)), fallback)
        session(model, optimized=tmp_path / "optimized.onnx")
        graph = onnx.load(tmp_path / "optimized.onnx").graph
        assert [(node.domain, node.op_type) for node in graph.node] == [("anyquant", "CodebookMatMul")]


@pytest.mark.parametrize("axis", [0, 1])
def test_threads_change_nothing(model_of: ModelOf, axis: int) -> None:
    shape = (1000, 1030)
    tensor = codebook_tensor(shape, axis, np.arange(shape[axis]) % 6, scaled=True, outliers=500)
    x = np.random.default_rng(0).normal(size=(1, 5, shape[1])).astype(np.float32)
    results = [session(model_of(tensor, "fold"), threads).run(None, {"given": x})[0].tobytes() for threads in (1, 2, 5)]
    assert len(set(results)) == 1


def test_sessions_at_the_same_time(model_of: ModelOf) -> None:
    """Each registers the library; each has its own matrix."""
    tensors = [codebook_tensor((300, 40), 0, np.full(300, bits)) for bits in (1, 2, 3)]
    sessions = [session(model_of(tensor, "fold")) for tensor in tensors]
    x = np.ones((1, 1, 40), np.float32)
    for tensor, run in zip(tensors, sessions, strict=True):
        assert error(run.run(None, {"given": x})[0], x, tensor, np.zeros(1)) < 1e-6


def test_one_session_from_several_threads(model_of: ModelOf) -> None:
    tensor = codebook_tensor((700, 600), 0, np.arange(700) % 5, outliers=300)
    run = session(model_of(tensor, "fold"), threads=2)
    xs = [np.random.default_rng(i).normal(size=(1, 1 + i % 9, 600)).astype(np.float32) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: run.run(None, {"given": x})[0], xs))
    assert max(error(y, x, tensor, np.zeros(1)) for x, y in zip(xs, results, strict=True)) < 2e-6


@pytest.mark.parametrize("leading", [(0, 3), (2, 0)])
def test_no_activations_have_no_products(model_of: ModelOf, leading: tuple[int, int]) -> None:
    run = session(model_of(codebook_tensor((13, 24), 0, np.arange(13) % 5), "fold"))
    assert run.run(None, {"given": np.zeros((*leading, 24), np.float32)})[0].shape == (*leading, 13)


def test_unused_planes_change_nothing(model_of: ModelOf) -> None:
    tensor = codebook_tensor((6, 20), 0, np.array([3, 0, 8, 1, 2, 5]))
    planes = stored_arrays(tensor)[".planes"]
    more = np.concatenate([planes, np.full((2, planes.shape[1]), 255, np.uint8)])
    x = np.eye(20, dtype=np.float32)[None]
    results = [
        session(model_of(tensor, "fold", **given)).run(None, {"given": x})[0] for given in ({}, {"planes": more})
    ]
    assert np.array_equal(*results)


f2, u1, u2, u4 = np.float16, np.uint8, np.uint16, np.uint32
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "widths": ({"bits": np.full(5, 2, u1)}, "5 widths for 6 channels"),
    "a width": ({"bits": np.array([2, 2, 9, 2, 2, 2], u1)}, "channel 2 has a width of 9 bits"),
    "plane bytes": ({"planes": np.zeros((12, 2), u1)}, "planes of 2 bytes for channels of 20"),
    "no planes": ({"planes": np.zeros((0, 3), u1)}, "0 planes for 12 bits"),
    "planes": ({"planes": np.zeros((11, 3), u1)}, "11 planes for 12 bits"),
    "flat planes": ({"planes": np.zeros(36, u1)}, "planes has 1 dimensions, not 2"),
    "codebook": ({"codebook": np.zeros(23, f2)}, "23 codebook entries, the widths call for 24"),
    "infinity": ({"codebook": np.r_[np.zeros(23), np.inf].astype(f2)}, "codebook entry 23 is not finite"),
    "scale": ({"input_scale": np.ones(19, f2)}, "input_scale has 19 elements for 20 inputs"),
    "one scale": ({"input_scale": np.full(1, 2, f2)}, "input_scale has 1 elements for 20 inputs"),
    "pointers": ({"outlier_indptr": np.zeros(6, u4)}, "outlier_indptr has 6 elements for 6 rows"),
    "one pointer": ({"outlier_indptr": np.ones(1, u4)}, "outlier_indptr has 1 elements"),
    "values": ({"outlier_value": np.zeros(3, f2)}, "2 columns for 3 outliers"),
    "index type": ({"outlier_index": np.zeros(2, np.int64)}, "neither uint16 nor uint32"),
    "column": ({"outlier_index": np.array([1, 20], u2)}, "outlier 1 of row 1 is out of order, or in column 20 of 20"),
    "order": ({"outlier_index": np.array([1, 1], u2)}, "outlier 1 of row 1 is out of order"),
    "ends": ({"outlier_indptr": np.array([0, 0, 0, 0, 0, 0, 3], u4)}, "runs from 0 to 3 for 2 outliers"),
    "descends": ({"outlier_indptr": np.array([0, 2, 0, 2, 2, 2, 2], u4)}, "outlier_indptr descends after row 1"),
    "beyond": ({"outlier_indptr": np.array([0, 9, 2, 2, 2, 2, 2], u4)}, "outlier_indptr descends after row 0"),
    "start": ({"outlier_indptr": np.array([1, 2, 2, 2, 2, 2, 2], u4)}, "runs from 1 to 2 for 2 outliers"),
    "bias": ({"bias": np.zeros(5, np.float32)}, "bias has 5 elements for 6 outputs"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_means_nothing_is_refused(model_of: ModelOf, case: str) -> None:
    changed, message = HOSTILE[case]
    outliers = {
        "outlier_indptr": np.array([0, 0, 2, 2, 2, 2, 2], u4),
        "outlier_index": np.array([3, 7], u2),
        "outlier_value": np.ones(2, f2),
    }
    tensor = codebook_tensor((6, 20), 0, np.full(6, 2))
    session(model_of(tensor, "fold", **outliers))
    model = model_of(tensor, "fold", **{**outliers, **changed})
    model.graph.node[0].name = "layer/7"
    with pytest.raises(Exception, match=f"CodebookMatMul layer/7: .*{message}"):
        session(model)


@pytest.mark.parametrize(("name", "value"), [("K", 0), ("K", 1 << 31), ("N", -1), ("transB", 2)])
def test_sizes_that_mean_nothing(model_of: ModelOf, name: str, value: int) -> None:
    model = model_of(codebook_tensor((6, 20), 0, np.full(6, 2)), "fold")
    next(a for a in model.graph.node[0].attribute if a.name == name).i = value
    with pytest.raises(Exception, match=f"{name} is {value}"):
        session(model)


def test_matrices_that_are_not_constant(model_of: ModelOf) -> None:
    model = model_of(codebook_tensor((6, 20), 0, np.full(6, 2)), "fold")
    planes = next(tensor for tensor in model.graph.initializer if tensor.name == "w.planes")
    model.graph.initializer.remove(planes)
    model.graph.input.append(onnx.helper.make_tensor_value_info("w.planes", onnx.TensorProto.UINT8, [12, 3]))
    with pytest.raises(Exception, match="planes is not a constant of the graph"):
        session(model)


def test_activations_of_another_width(model_of: ModelOf) -> None:
    model = model_of(codebook_tensor((6, 20), 0, np.full(6, 2)), "fold")
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "any"
    with pytest.raises(Exception, match="the last dimension of A is not K"):
        session(model).run(None, {"given": np.ones((1, 1, 19), np.float32)})


CHILD = """
import sys
import numpy as np
import onnxruntime as ort

print(ort.__version__)
options = ort.SessionOptions()
options.log_severity_level = 4
if sys.argv[1]:
    options.register_custom_ops_library(sys.argv[1])
options.optimized_model_filepath = "optimized.onnx"
session = ort.InferenceSession("model.onnx", options, providers=sys.argv[2:] or ["CPUExecutionProvider"])
np.save("y.npy", session.run(None, {"given": np.load("x.npy")})[0])
"""


def test_beside_the_kernel_for_gpus(model_of: ModelOf, tmp_path: Path) -> None:
    """Registered for both, the operator is still the CPU's own there."""
    tensor = codebook_tensor((30, 70), 1, [2, 3])
    x = np.random.default_rng(1).normal(size=(1, 3, 70)).astype(np.float32)
    onnx.save(model_of(tensor, "fold"), tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", CHILD, str(native.path_of(LIBRARY))]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "ANYQUANT_ONNXRUNTIME_CUDA": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert error(np.load(tmp_path / "y.npy"), x, tensor, np.zeros(1)) < 2e-6
    assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node] == ["CodebookMatMul"]


@pytest.mark.cuda
@pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="ONNX Runtime is one for CPUs")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_on_a_gpu(model_of: ModelOf, tmp_path: Path, rows: int, axis: int) -> None:
    tensor = codebook_tensor((530, 1100), axis, [2, 3, 4], scaled=True, outliers=300)
    bias = np.random.default_rng(0).normal(size=530).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(1, rows, 1100)).astype(np.float32)
    onnx.save(model_of(tensor, "fold", bias=bias), tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", x)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(native.path_of(LIBRARY)), "CUDAExecutionProvider"],
        cwd=tmp_path, env={**os.environ, "ANYQUANT_ONNXRUNTIME_CUDA": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert error(np.load(tmp_path / "y.npy"), x, tensor, bias) < 2e-6
    assert "CodebookMatMul" in {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}


@pytest.mark.parametrize("axis", [0, 1])
def test_the_oldest_onnxruntime(model_of: ModelOf, old_onnxruntime: Path, tmp_path: Path, axis: int) -> None:
    shape = (70, 577)
    tensor = codebook_tensor(shape, axis, np.arange(shape[axis]) % 9, scaled=True, outliers=60)
    bias = np.random.default_rng(0).normal(size=70).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(1, 3, 577)).astype(np.float32)
    onnx.save(model_of(tensor, "fold", bias=bias, opset=20), tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", x)
    with zipfile.ZipFile(old_onnxruntime) as wheel:
        wheel.extractall(tmp_path / "wheel")
    for library in (str(native.path_of(LIBRARY)), ""):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, library],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path / "wheel"), "ANYQUANT_ONNXRUNTIME_CUDA": str(axis)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split() == ["1.20.1"]
        assert error(np.load(tmp_path / "y.npy"), x, tensor, bias) < 2e-6
        operators = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
        assert ("CodebookMatMul" in operators) == bool(library)
