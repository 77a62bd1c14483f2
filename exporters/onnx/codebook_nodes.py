"""Nodes for codebook tensors: anyquant::CodebookMatMul and anyquant::CodebookGather, and their functions."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as oir

from anyquant import ir
from anyquant.exporters.onnx.codebook import NEUTRAL, STORED, CodebookForm, array_shapes
from anyquant.exporters.onnx.editing import GraphEditor
from anyquant.exporters.onnx.functions import (
    DOMAIN,
    GATHER,
    MATMUL,
    VERSION,
    gather_function,
    matmul_function,
    steps_for,
)
from anyquant.exporters.onnx.layout import Group


class CodebookNodes:
    """Stores tensors once and reads them: as a matrix, as a table of rows, or both where an embedding is the head."""

    def __init__(self, editor: GraphEditor, fallback: str) -> None:
        """Write to a graph; ``fallback`` says which body CodebookMatMul gets."""
        self._editor = editor
        self._fallback = fallback
        self._stored: dict[str, list[oir.Value]] = {}
        self._products: dict[tuple[str, str], oir.Value] = {}
        self._used: dict[str, list[ir.CodebookSpec]] = {}

    def product(self, node: oir.Node, group: Group, name: str) -> tuple[oir.Value, oir.Value]:
        """The product of a MatMul's activations with the rows of a group; and that with the whole tensor.

        A tensor is stored whole: the bytes of some of its rows are not known from its spec. Where a graph cuts it, both
        halves come out of one product.
        """
        part, spec = group.parts[0], _spec(group)
        activations = node.inputs[0]
        assert activations is not None
        key = (part.tensor, activations.name or "")
        if key not in self._products:
            inputs = [activations, *self._arrays(group)]
            inputs.append(self._editor.constant("anyquant.no_bias", np.zeros(1, np.float32)))
            shape = {"K": spec.shape[1], "N": spec.shape[0], "transB": 1 - spec.axis}
            # Before all that read the activations: another of them may share this product.
            readers = {reader for reader, _ in activations.uses()}
            first = next(reader for reader in self._editor.graph if reader in readers)
            self._products[key] = self._editor.node(first, MATMUL, inputs, f"{name}.codebook", DOMAIN, **shape)
            self._used.setdefault(MATMUL, []).append(spec)
        whole = self._products[key]
        if part.rows == spec.shape[0]:
            return whole, whole
        ends = (part.start, part.stop, -1)
        bounds = [self._editor.constant(f"anyquant.int64.{n}", np.array([n], np.int64)) for n in ends]
        return self._editor.node(node, "Slice", [whole, *bounds], f"{name}.slice"), whole

    def rows(self, node: oir.Node, group: Group) -> oir.Value:
        """The rows of a tensor that a Gather looks up."""
        spec = _spec(group)
        self._used.setdefault(GATHER, []).append(spec)
        inputs = [node.inputs[1], *self._arrays(group)]
        return self._editor.node(node, GATHER, inputs, f"{node.name}.codebook", DOMAIN, K=spec.shape[1])

    def functions(self, model: oir.Model) -> list[onnx.FunctionProto]:
        """The functions that the nodes call; their domain is imported."""
        if not self._used:
            return []
        model.opset_imports[DOMAIN] = VERSION
        opset = model.opset_imports[""]
        steps = {name: steps_for(specs) for name, specs in sorted(self._used.items())}
        return [
            matmul_function(opset, self._fallback, s) if name == MATMUL else gather_function(opset, s)
            for name, s in steps.items()
        ]

    def _arrays(self, group: Group) -> list[oir.Value]:
        tensor = group.parts[0].tensor
        if tensor not in self._stored:
            values = self._editor.store_groups(group, array_shapes(_spec(group)))
            self._stored[tensor] = [
                values[suffix] if suffix in values else self._editor.constant(f"anyquant.no{suffix}", NEUTRAL[suffix])
                for suffix in STORED
            ]
        return self._stored[tensor]


def _spec(group: Group) -> ir.CodebookSpec:
    assert isinstance(group.form, CodebookForm)
    return group.form.spec
