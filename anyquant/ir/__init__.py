"""The intermediate representation: five kinds of tensors, their bytes, and the folder that holds them.

NumPy only: nothing here imports torch, transformers, gguf or onnx, nor any other part of anyquant but errors.
"""

from __future__ import annotations

from anyquant.ir.container import Model, file_sizes, open_ir
from anyquant.ir.dequantize import block_integers, dequantize, digest, row_chunks, tensor_digest
from anyquant.ir.ggml_blocks import dequantize_blocks
from anyquant.ir.json_io import read_json
from anyquant.ir.manifest import MANIFEST, Entry, same_plan
from anyquant.ir.permute import with_rows
from anyquant.ir.safetensors_io import write_safetensors
from anyquant.ir.spec import (
    DENSE_DTYPES,
    FP16_MAX,
    GGML_TYPES,
    AffineSpec,
    Arrays,
    BlockSpec,
    CodebookSpec,
    DenseSpec,
    GGMLSpec,
    Spec,
)
from anyquant.ir.tensor import ZERO_BLOCK, Tensor
from anyquant.ir.writer import Loss, Progress, refuse_existing, sync, write_ir

__all__ = [
    "DENSE_DTYPES",
    "FP16_MAX",
    "GGML_TYPES",
    "MANIFEST",
    "ZERO_BLOCK",
    "AffineSpec",
    "Arrays",
    "BlockSpec",
    "CodebookSpec",
    "DenseSpec",
    "Entry",
    "GGMLSpec",
    "Loss",
    "Model",
    "Progress",
    "Spec",
    "Tensor",
    "block_integers",
    "dequantize",
    "dequantize_blocks",
    "digest",
    "file_sizes",
    "open_ir",
    "read_json",
    "refuse_existing",
    "row_chunks",
    "same_plan",
    "sync",
    "tensor_digest",
    "with_rows",
    "write_ir",
    "write_safetensors",
]
