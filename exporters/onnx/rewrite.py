"""The onnx-ir pass: float matrices become what they are stored as, and the nodes that read them change with them.

It edits structure alone; the data are written afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as oir

from anyquant.exporters.onnx.binding import Binding, Part
from anyquant.exporters.onnx.codebook import CodebookForm
from anyquant.exporters.onnx.codebook_nodes import CodebookNodes
from anyquant.exporters.onnx.editing import F32, GraphEditor, Item, tensor_shape
from anyquant.exporters.onnx.layout import Group, Stored
from anyquant.exporters.onnx.matmul_nbits import Form
from anyquant.exporters.onnx.nbits_nodes import NBitsNodes, Planes
from anyquant.exporters.protocol import ExportOptions

UPRIGHT, TRANSPOSED = ".float", ".float_transposed"  # suffixes of a group stored as floats


@dataclass(frozen=True)
class Uses:
    """Nodes that read a matrix, each in a way that the pass can replace; None: some node reads it otherwise."""

    matmuls: tuple[oir.Node, ...]
    gathers: tuple[oir.Node, ...]


def uses_of(value: oir.Value, *, transposed: bool) -> Uses | None:
    """How a graph uses an initializer."""
    matmuls: list[oir.Node] = []
    gathers: list[oir.Node] = []
    if value.is_graph_output():
        return None
    for node, index in value.uses():
        if node.op_type == "MatMul" and index == 1 and transposed:
            matmuls.append(node)
        elif node.op_type == "Gather" and index == 0 and not transposed and _axis0(node):
            gathers.append(node)
        elif node.op_type == "Transpose" and transposed and not node.outputs[0].is_graph_output():
            for reader, position in node.outputs[0].uses():
                if not (reader.op_type == "Gather" and position == 0 and _axis0(reader)):
                    return None
                gathers.append(reader)
        else:
            return None
    return Uses(tuple(matmuls), tuple(gathers))


def _axis0(node: oir.Node) -> bool:
    attribute = node.attributes.get("axis")
    return attribute is None or attribute.as_int() == 0


class Rewriter:
    """Edits one graph; ``held`` says where IR tensors ended up."""

    def __init__(self, model: oir.Model, options: ExportOptions) -> None:
        """Start on a graph as the builder made it; it is edited in place."""
        self._model = model
        self._editor = GraphEditor(model.graph)
        self._graph = model.graph
        self._nbits = NBitsNodes(self._editor, options.accuracy_level)
        self._codebooks = CodebookNodes(self._editor, options.fallback)
        self.held: list[tuple[tuple[Part, ...], str, bool]] = []
        """(rows of IR tensors, name of the value that shows them, whether that value is the matrix transposed)."""

    def replace(self, stored: Stored, uses: Uses) -> None:
        """Replace a float matrix by what it is stored as."""
        initializer = self._graph.initializers[stored.binding.initializer]
        readers = {node for node, _ in initializer.uses()}
        first = next(node for node in self._graph if node in readers)
        if stored.groups[0].form is None and len(stored.groups) == 1:
            self._half(stored, initializer, first)
            return
        planes = {
            g.name: self._nbits.store(g, stored.columns, first) for g in stored.groups if isinstance(g.form, Form)
        }
        for node in uses.matmuls:
            self._matmul(node, stored, planes)
        for node in uses.gathers:
            self._gather(node, stored, planes)
        for reader, _ in list(initializer.uses()):  # the Transpose of a tied embedding
            self._graph.remove(reader, safe=True)
        del self._graph.initializers[initializer.name or ""]

    def separate(self, binding: Binding) -> None:
        """Store a vector as it was before the graph source added a number, which ONNX Runtime adds again at load."""
        initializer = self._graph.initializers[binding.initializer]
        tensor = initializer.const_value
        assert tensor is not None
        readers = {node for node, _ in initializer.uses()}
        first = next(node for node in self._graph if node in readers)
        del self._graph.initializers[binding.initializer]
        group = Group(f"{binding.initializer}.stored", binding.parts, None)
        stored = self._editor.store(Item(group.name, F32, tensor_shape(tensor), group, UPRIGHT))
        addend = self._editor.table(f"anyquant.addend.{binding.addend:g}", np.array(binding.addend, np.float32))
        total = self._editor.node(first, "Add", [stored, addend], f"{binding.initializer}.sum")
        initializer.replace_all_uses_with(total)
        self.held.append((group.parts, group.name, False))

    def items(self) -> list[Item]:
        """Every external initializer of the edited graph in order."""
        return self._editor.items()

    def functions(self) -> list[onnx.FunctionProto]:
        """Functions that the edited graph calls."""
        return self._codebooks.functions(self._model)

    def _half(self, stored: Stored, initializer: oir.Value, first: oir.Node) -> None:
        """A 16-bit initializer of the same orientation and a Cast in place of the float one."""
        group, transposed = stored.groups[0], stored.binding.transposed
        dtype = oir.DataType[group.dtype]
        name, tensor = initializer.name or "", initializer.const_value
        assert tensor is not None
        del self._graph.initializers[name]
        suffix = TRANSPOSED if transposed else UPRIGHT
        half = self._editor.store(Item(f"{name}.half", dtype, tensor_shape(tensor), group, suffix))
        cast = self._editor.node(first, "Cast", [half], f"{name}.cast", to=F32)
        initializer.replace_all_uses_with(cast)
        self.held.append((group.parts, f"{name}.cast", transposed))

    def _matmul(self, node: oir.Node, stored: Stored, planes: Mapping[str, Planes]) -> None:
        base = node.name or ""
        products: list[oir.Value] = []
        shown: list[tuple[tuple[Part, ...], oir.Value]] = []
        for i, group in enumerate(stored.groups):
            name = base if len(stored.groups) == 1 else f"{base}.{i}"
            parts, whole = group.parts, None
            if isinstance(group.form, Form):
                product = self._nbits.product(node, group, stored.columns, planes[group.name], name)
            elif isinstance(group.form, CodebookForm):
                product, whole = self._codebooks.product(node, group, name)
                parts = (replace(parts[0], start=0, stop=group.form.spec.shape[0]),)
            else:
                product = self._float_product(node, group, stored.columns, name)
            products.append(product)
            shown.append((parts, whole or product))
        result = products[0]
        if len(products) > 1:
            result = self._editor.node(node, "Concat", products, base + ".concat", axis=-1)
        self._editor.supersede(node, result)
        self.held += [(parts, value.name or "", False) for parts, value in shown]

    def _float_product(self, node: oir.Node, group: Group, columns: int, name: str) -> oir.Value:
        """A product with some of the rows, stored [in, out]."""
        dtype = oir.DataType[group.dtype]
        weight = self._editor.store(Item(group.name, dtype, (columns, group.rows), group, TRANSPOSED))
        if dtype != F32:
            weight = self._editor.node(node, "Cast", [weight], group.name + ".cast", to=F32)
        return self._editor.node(node, "MatMul", [node.inputs[0], weight], name)

    def _gather(self, node: oir.Node, stored: Stored, planes: Mapping[str, Planes]) -> None:
        group = stored.groups[0]
        if isinstance(group.form, CodebookForm):
            rows = self._codebooks.rows(node, group)
        else:
            rows = self._nbits.rows(node, group, stored.columns, planes[group.name])
        self._editor.supersede(node, rows)
        self.held.append((group.parts, rows.name or "", False))
