"""The bodies of CodebookMatMul and CodebookGather in standard operators; docs/onnx-operators.md defines them.

A model carries the functions that its nodes call, so any runtime computes them; one that has a kernel of that name
uses the kernel instead. The text is in ONNX's own syntax. Its heart turns widths, planes and codebooks of some
channels into FP32, and how that is called decides what a runtime that folds constants makes of it:

* fold: on all that is stored. ONNX Runtime then computes the matrix once, at load, and multiplies in FP32.
* stream: in a Scan over blocks of channels. Nothing is folded across a Scan, so the matrix stays packed, and what is
  decoded at a time has a bounded size.

While it folds, ONNX Runtime keeps every intermediate result of all matrices at once. Hence bits are widened to bytes
late, steps that no tensor of the model needs are left out, and Gemm reads either orientation without another copy.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx.parser

from anyquant import ir
from anyquant.exporters.onnx.function_gather import gather_body
from anyquant.exporters.onnx.function_steps import CONSTANTS, Steps, decode, finish, outlier_places
from anyquant.exporters.onnx.function_stream import BLOCK, stream_body

DOMAIN, VERSION = "anyquant", 1
MATMUL, GATHER = "CodebookMatMul", "CodebookGather"

_STORED = "bits, planes, codebook, input_scale, outlier_indptr, outlier_index, outlier_value"


def steps_for(specs: Iterable[ir.CodebookSpec]) -> Steps:
    """The steps that at least one of the tensors needs."""
    specs = list(specs)
    return Steps(
        any(spec.shape[1 - spec.axis] % 8 for spec in specs),
        any(spec.input_scale for spec in specs),
        any(spec.outliers for spec in specs),
    )


def matmul_function(opset: int, fallback: str, steps: Steps, block: int = BLOCK) -> onnx.FunctionProto:
    """CodebookMatMul for a model that imports this version of the standard operators, 18 or later."""
    body = _fold(steps) if fallback == "fold" else stream_body(steps, block)
    return _parse(opset, f"{MATMUL} <K, N, transB> (A, {_STORED}, bias) => (Y)", _PRODUCT + body + _RESULT)


def gather_function(opset: int, steps: Steps) -> onnx.FunctionProto:
    """CodebookGather for a model that imports this version of the standard operators, 18 or later.

    It decodes the rows that are looked up and no others, so it is the same for both fallbacks.
    """
    return _parse(opset, f"{GATHER} <K> (indices, {_STORED}) => (Y)", gather_body(steps))


def _parse(opset: int, signature: str, body: str) -> onnx.FunctionProto:
    header = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">'
    function = onnx.parser.parse_function(f"{header}\n{signature}\n{{\n{CONSTANTS}{body}\n}}")
    _prune(function)
    return function


def _prune(function: onnx.FunctionProto) -> None:
    """Remove nodes that nothing reads; runtimes take their time over every node of every call."""
    needed = set(function.output)
    kept = []
    for node in reversed(function.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
            for attribute in node.attribute:
                needed.update(name for inner in attribute.g.node for name in inner.input)
    del function.node[:]
    function.node.extend(reversed(kept))


# K and N are attributes: the size of nothing that is stored depends on A, so everything of it can be folded.
_PRODUCT = """
  N_number = Constant <value_int: int = @N> ()
  n = Reshape (N_number, one)
  transposed_number = Constant <value_int: int = @transB> ()
  t = Reshape (transposed_number, one)
  not_t = Sub (one, t)
  k_and_n = Add (k, n)
  channels = Shape (bits)
  length = Sub (k_and_n, channels)
  to_matrix = Concat <axis = 0> (minus_one, k)
  a = Reshape (A, to_matrix)
"""

_RESULT = """
  leading = Shape <end = -1> (A)
  from_matrix = Concat <axis = 0> (leading, n)
  Y = Reshape <allowzero = 1> (y, from_matrix)
"""


def _fold(steps: Steps) -> str:
    text = "  spare_entries = Constant <value = int64[1] {256}> ()\n"
    text += decode("bits", "planes", "codebook", "spare_entries", steps)
    if steps.scaled:
        text += "  scale = Cast <to = 1> (input_scale)\n"
    if steps.outliers:
        text += "  row_starts_32 = Slice (outlier_indptr, one, n)\n  row_starts = Cast <to = 7> (row_starts_32)\n"
        text += outlier_places("row_starts", "outlier_index", "outlier_value", "zero")
    last_steps, weight = finish(steps, "scale", "outlier_channel", "outlier_position", "outlier_32")
    return text + last_steps + f"  y = Gemm <transB: int = @transB> (a, {weight}, bias)\n"
