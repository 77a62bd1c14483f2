"""What the method affine makes, in ONNX Runtime: every width and block length that the representation has."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import onnx
import pytest

from anyquant import ir
from anyquant.exporters.onnx.matmul_nbits import form_of, integer_matrix
from anyquant.exporters.protocol import ExportOptions
from anyquant.methods.affine import BLOCKS, AffineMethod

PAIRS = list(itertools.product((2, 4, 8), BLOCKS))
METHOD = AffineMethod()


def _tensor(bits: int, block: int, shape: tuple[int, int] = (6, 203)) -> ir.Tensor:
    weight = np.random.default_rng(bits + block).normal(0.2, 1, shape).astype(np.float32)
    weight[1] = 0
    weight[2] = -0.75
    settings = METHOD.settings({"feedback": False, "blocks": str(block), "widths": str(bits)})
    return METHOD.quantize(weight, np.zeros(1, np.uint8), None, settings)


def _product(tensor: ir.Tensor, inputs: np.ndarray, accuracy_level: int) -> np.ndarray:
    """inputs times the transposed matrix by MatMulNBits of ONNX Runtime, planes added as the exporter's graph does."""
    import onnxruntime
    from onnx import TensorProto, helper

    form, (rows, columns) = form_of(tensor.spec), tensor.spec.shape
    assert form is not None
    arrays = integer_matrix(tensor, slice(None)).arrays()
    scale = arrays[".scale"].astype(np.float32)
    sides = [("low", 1), ("high", 16)] if form.bits == 8 else [("low", 1)]
    constants, nodes = [], []
    for side, factor in sides:
        for name, array in (
            (side, arrays[f".{side}"]),
            (f"{side}_scale", scale * np.float32(factor)),
            (f"{side}_zero", arrays[f".zero_{side}"]),
        ):
            constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", side, f"{side}_scale", f"{side}_zero"],
                [f"y_{side}"],
                domain="com.microsoft",
                K=columns,
                N=rows,
                bits=4,
                block_size=form.block,
                accuracy_level=accuracy_level,
            )
        )
    outputs = [node.output[0] for node in nodes]
    nodes.append(
        helper.make_node("Add", outputs, ["y"]) if len(sides) > 1 else helper.make_node("Identity", outputs, ["y"])
    )
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", kind, list(inputs.shape))],
        [helper.make_tensor_value_info("y", kind, [len(inputs), rows])],
        constants,
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(["y"], {"x": inputs})[0]
    return result


@pytest.mark.parametrize(("bits", "block"), PAIRS)
def test_the_operator_holds_the_dequantized_values(bits: int, block: int) -> None:
    tensor = _tensor(bits, block)
    values = ir.dequantize(tensor)
    # One input at a time is 1: the outputs are weights, and nothing is rounded on the way.
    assert np.array_equal(_product(tensor, np.eye(values.shape[1], dtype=np.float32), 0), values.T)


@pytest.mark.parametrize(("bits", "block"), PAIRS)
def test_accuracy_level_4_rounds_activations_alone(bits: int, block: int) -> None:
    tensor = _tensor(bits, block, (64, 512))
    inputs = np.random.default_rng(1).standard_normal((16, 512)).astype(np.float32)
    wanted = inputs.astype(np.float64) @ ir.dequantize(tensor).astype(np.float64).T
    exact, rounded = (_product(tensor, inputs, level) for level in (0, 4))
    size = np.sqrt((wanted**2).mean())
    assert np.abs(exact - wanted).max() < 1e-5 * size
    error = np.sqrt(((rounded - wanted) ** 2).mean()) / size
    assert error < 0.012  # 8 bits for each block of activations


@pytest.mark.slow
def test_a_model_of_every_width_and_block(export_tiny: Callable, verify: Callable, logits_of: Callable) -> None:
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def choose(name: str) -> str:
        if "embed_tokens" in name:
            bits, block = PAIRS[14]
        elif "layers" in name and name.split(".")[-2] in modules:
            bits, block = PAIRS[7 * int(name.split(".")[2]) + modules.index(name.split(".")[-2])]
        else:
            return ""
        return f"affine{bits}/{block}"

    exported = export_tiny(choose, hidden=256)
    verify(exported)
    quantized = [entry.spec for entry in exported.model.entries.values() if entry.quantized]
    assert {(spec.bits, spec.block) for spec in quantized} == set(PAIRS)
    labels = {"MatMulNBits 4-bit", "MatMulNBits 2 x 4-bit"}
    assert {exported.plan.types[name] for name, entry in exported.model.entries.items() if entry.quantized} == labels

    rounding = export_tiny(choose, ExportOptions(accuracy_level=4), hidden=256)
    assert any("round activations (4: to 8 bits" in note for note in rounding.plan.notes)
    onnxruntime, torch = logits_of(rounding)
    assert 1e-5 < np.abs(onnxruntime - torch).max() / np.abs(torch).max() < 0.05
