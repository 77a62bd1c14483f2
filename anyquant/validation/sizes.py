"""Bytes of what is measured."""

from __future__ import annotations

from pathlib import Path

from anyquant import ir
from anyquant.runtime.onnx_session import model_file


def ir_bytes(model: ir.Model) -> int:
    """Bytes of the IR folder's weight files and manifest; tokenizer and other side files are not counted."""
    return sum(ir.file_sizes(model).values())


def onnx_bytes(path: Path) -> int:
    """Bytes of the graph and of the files its weights lie in."""
    import onnx

    file = model_file(path)
    model = onnx.load(str(file), load_external_data=False)
    locations = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location" and tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    beside = (file.parent / location for location in locations)
    total: int = file.stat().st_size + sum(part.stat().st_size for part in beside if part.is_file())
    return total
