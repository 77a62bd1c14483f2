"""The reference kernels: weights from the arrays of a tensor as they are stored, and products of dense matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant.ir import GGML_TYPES, AffineSpec, BlockSpec, CodebookSpec, GGMLSpec, Tensor, ggml_grids
from anyquant.ir.packing import code_offsets, entry_offsets
from anyquant.runtime.cuda.products import Machine, Output

Quantized = CodebookSpec | BlockSpec | AffineSpec | GGMLSpec
KINDS = (CodebookSpec, BlockSpec, AffineSpec, GGMLSpec)
"""Kinds of tensors that the kernels dequantize: all but dense ones."""
_BLOCK = 256
_FORMATS = ("bfp", "minifloat", "log")
_GGML = tuple(GGML_TYPES)
Arrays = dict[str, NDArray[Any]]


def stored_arrays(tensor: Tensor) -> Arrays:
    """What :func:`dequantize` has to be given of a tensor, on the machine.

    Raises:
        TypeError: there is no kernel for its kind.
    """
    if not isinstance(tensor.spec, KINDS):
        raise TypeError(f"no kernel dequantizes tensors of the kind {tensor.spec.kind}")
    arrays = {name.removeprefix("."): np.ascontiguousarray(array) for name, array in tensor.arrays.items()}
    if isinstance(tensor.spec, CodebookSpec):
        bits = tensor.arrays[".bits"]
        arrays["stream"] = code_offsets(bits, tensor.spec.shape[1 - tensor.spec.axis])[:-1]
        arrays["entry"] = entry_offsets(bits)[:-1]
    if isinstance(tensor.spec, GGMLSpec) and (points := ggml_grids.points_of(tensor.spec.type)) is not None:
        arrays["grid"] = points
    # An array without elements has no address.
    return {name: array if array.size else np.zeros(1, array.dtype) for name, array in arrays.items()}


def dequantize(machine: Machine, spec: Quantized, stored: dict[str, Any], weight: Any) -> None:
    """FP32 values [out, in], to the last bit those of :func:`anyquant.ir.dequantize`.

    Args:
        machine: where to.
        spec: of the tensor.
        stored: memory there with what :func:`stored_arrays` gives.
        weight: room for the values there.
    """
    rows, columns = spec.shape
    grid = (-(-rows * columns // _BLOCK), 1)
    if isinstance(spec, BlockSpec):
        row_bytes = spec.arrays()[".codes"][1][1]
        machine.launch(
            "reference.cu", {}, "dequantize_block", grid, _BLOCK, 0, stored["codes"], stored["exponents"], row_bytes,
            spec.blocks, spec.block, _FORMATS.index(spec.format), spec.width, spec.exponent_width, rows, columns,
            Output(weight),
        )  # fmt: skip
        return
    if isinstance(spec, GGMLSpec):
        machine.launch(
            "ggml.cu", {}, "dequantize_ggml", grid, _BLOCK, 0, stored["blocks"], stored.get("grid"),
            _GGML.index(spec.type), *GGML_TYPES[spec.type], rows, columns, Output(weight),
        )  # fmt: skip
        return
    if isinstance(spec, AffineSpec):
        row_bytes = spec.arrays()[".codes"][1][1]
        machine.launch(
            "reference.cu", {}, "dequantize_affine", grid, _BLOCK, 0, stored["codes"], stored["scale"], stored["zero"],
            row_bytes, spec.blocks, spec.block, spec.bits, rows, columns, Output(weight),
        )  # fmt: skip
        return
    machine.launch(
        "reference.cu", {}, "dequantize_codebook", grid, _BLOCK, 0, stored["bits"], stored["codes"], stored["stream"],
        stored["codebook"], stored["entry"], stored.get("input_scale"), rows, columns, spec.axis, Output(weight),
    )  # fmt: skip
    if spec.outliers:
        machine.launch(
            "reference.cu", {}, "replace_outliers", (-(-rows // _BLOCK), 1), _BLOCK, 0, stored["outlier_indptr"],
            stored["outlier_index"], spec.arrays()[".outlier_index"][0].itemsize, stored["outlier_value"], rows,
            columns, Output(weight),
        )  # fmt: skip


def multiply(machine: Machine, shape: tuple[int, int], weight: Any, x: Any, batch: int, y: Any) -> None:
    """FP32 activations [batch, in] times a transposed FP32 matrix [out, in]: y [batch, out], each sum in one order."""
    machine.launch(
        "reference.cu", {}, "multiply", (-(-shape[0] // _BLOCK), batch), _BLOCK, 0,
        weight, x, shape[0], shape[1], Output(y),
    )  # fmt: skip
