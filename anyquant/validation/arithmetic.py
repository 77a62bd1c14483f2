"""Which arithmetic a runtime uses for a file: that decides how close its logits must be.

FP32 paths differ from PyTorch by the order of sums alone. Runtimes that round activations on the way (to 8 bits for
ggml's stock types, to 16 for F16 files) are a little further off, whatever the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyquant.errors import CorruptFileError, MissingDependency
from anyquant.gguf_container import Header
from anyquant.runtime.onnx_session import model_file

_ROUNDING_TYPES = {
    1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip


_GELU = ("gpt2", "gemma", "gemma2")
"""Architectures whose activation function llama.cpp looks up in a table, on the CPU: FP16 in and out."""


@dataclass(frozen=True)
class Arithmetic:
    """How a runtime computes with a file.

    Attributes:
        kind: "fp32" or "rounded".
        reason: in words.
        rounding: why the file's weights may be roundings of the IR's, "" if they must be equal.
        metadata: what anyquant's exporter recorded in the file.
    """

    kind: str
    reason: str
    rounding: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


def gguf_arithmetic(header: Header) -> Arithmetic:
    """From the types of the matrices that llama.cpp multiplies with."""
    tied = "output.weight" not in header.tensors
    used = {
        name: tensor.type_id
        for name, tensor in header.tensors.items()
        # An embedding is only looked up, and dequantized exactly, unless it is the output matrix too.
        if len(tensor.shape) > 1 and (tied or name != "token_embd.weight")
    }
    rounding = Counter(_ROUNDING_TYPES[t] for t in used.values() if t in _ROUNDING_TYPES)
    metadata = {key: header.get(key) for key in header.values if key.startswith("anyquant.")}
    note = _recorded_rounding(metadata)
    if not rounding and header.get("general.architecture") in _GELU:
        return Arithmetic("rounded", "llama.cpp takes GELU from a table in FP16", note, metadata)
    if not rounding:
        return _fp32("no matrix has a type whose product rounds activations", note, metadata)
    words = ", ".join(f"{count} {name}" for name, count in rounding.most_common())
    return Arithmetic(
        "rounded", f"llama.cpp rounds the activations for matrices of stock types ({words})", note, metadata
    )


def _fp32(reason: str, rounding: str, metadata: dict[str, Any]) -> Arithmetic:
    """FP32, unless the weights themselves were rounded: then the logits cannot be as close."""
    if rounding:
        return Arithmetic("rounded", f"the weights may be rounded ({rounding})", rounding, metadata)
    return Arithmetic("fp32", reason, "", metadata)


def _recorded_rounding(metadata: dict[str, Any]) -> str:
    """Whether the exporter was allowed to round; no layout alone is an excuse."""
    allowed = str(metadata.get("anyquant.allow_rounding", "")).lower() == "true"
    return "written with --allow-rounding" if allowed else ""


def onnx_arithmetic(path: Path) -> Arithmetic:
    """From the graph's MatMulNBits nodes and the type of its logits.

    CodebookMatMul decodes to FP32 and multiplies in FP32, as its function in the model and as a kernel.

    Raises:
        MissingDependency: onnx is not installed.
        CorruptFileError: the file is not an ONNX model.
    """
    try:
        import onnx
    except ImportError:
        raise MissingDependency("onnx", "onnx", "validating an ONNX file") from None
    file = model_file(path)
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:
        raise CorruptFileError(f"{file} is not an ONNX model: {error}") from None
    recorded = {entry.key: entry.value for entry in model.metadata_props}
    metadata = {key: value for key, value in recorded.items() if key.startswith("anyquant.")}
    note = _recorded_rounding(metadata)
    nodes = [n for part in (model.graph, *model.functions) for n in _nodes(part.node)]
    levels = Counter(_accuracy_level(node) for node in nodes if node.op_type == "MatMulNBits")
    if any(level in (2, 3, 4) for level in levels):
        words = ", ".join(f"{count} at level {level}" for level, count in sorted(levels.items()))
        return Arithmetic("rounded", f"MatMulNBits above accuracy level 1 rounds activations ({words})", note, metadata)
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    if any(output.type.tensor_type.elem_type in halves for output in model.graph.output):
        return Arithmetic("rounded", "the graph computes in 16-bit floats", note, metadata)
    codebooks = sum(node.op_type == "CodebookMatMul" for node in nodes)
    words = f" ({codebooks} CodebookMatMul)" if codebooks else ""
    return _fp32(f"the graph computes in FP32{words}", note, metadata)


def _nodes(nodes: Iterable[Any]) -> Iterable[Any]:
    """Nodes, and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g.node)


def _accuracy_level(node: Any) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "accuracy_level"), 0)
