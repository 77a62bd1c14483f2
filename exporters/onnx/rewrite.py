"""The onnx-ir pass: float matrices become MatMulNBits and GatherBlockQuantized, or halves behind a Cast.

It edits structure alone. Initializers of the result are external, at offsets given by :func:`place`; the data are
written afterwards, from the same list.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as oir

from anyquant.exporters.onnx.binding import Binding
from anyquant.exporters.onnx.layout import Group, Stored
from anyquant.exporters.onnx.matmul_nbits import array_shapes, scale_table

ALIGNMENT = 64
DATA_FILE = "model.onnx.data"
TABLE = "anyquant.exponent_scales"
SIXTEEN = "anyquant.sixteen"
UPRIGHT, TRANSPOSED = ".float", ".float_transposed"  # suffixes of a group stored as floats
_DOMAIN = "com.microsoft"
_U8, _F16, _F32, _I64 = (oir.DataType.UINT8, oir.DataType.FLOAT16, oir.DataType.FLOAT, oir.DataType.INT64)
_TYPES = {np.dtype(np.uint8): _U8, np.dtype(np.float16): _F16, np.dtype(np.float32): _F32}


@dataclass(frozen=True)
class Item:
    """One initializer of the file: its bytes come from a group's arrays, from the graph source, or are constant."""

    name: str
    dtype: oir.DataType
    shape: tuple[int, ...]
    group: Group | None = None
    suffix: str = ""
    constant: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the data file, padding not counted."""
        return int(self.dtype.itemsize) * math.prod(self.shape)


def place(items: list[Item]) -> tuple[list[int], int]:
    """Offset of each item in the data file, and the file's size."""
    offsets, end = [], 0
    for item in items:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        offsets.append(start)
        end = start + item.nbytes
    return offsets, end


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


def tensor_shape(tensor: oir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a stored tensor, which has no symbols."""
    return tuple(int(n) for n in tensor.shape.numpy())


def _axis0(node: oir.Node) -> bool:
    attribute = node.attributes.get("axis")
    return attribute is None or attribute.as_int() == 0


class Rewriter:
    """Edits one graph; ``items`` are its initializers afterwards, ``held`` says where IR tensors ended up."""

    def __init__(self, model: oir.Model, accuracy_level: int) -> None:
        """Start on a graph as the builder made it.

        Args:
            model: edited in place.
            accuracy_level: of the MatMulNBits nodes.
        """
        self._graph = model.graph
        self._accuracy_level = accuracy_level
        self._new: list[Item] = []
        self._shared: dict[str, oir.Value] = {}
        self.held: list[tuple[Group, str, bool]] = []
        """(group, name of the value that shows it, whether that value is the matrix transposed)."""

    def replace(self, stored: Stored, uses: Uses) -> None:
        """Replace a float matrix by what it is stored as."""
        initializer = self._graph.initializers[stored.binding.initializer]
        readers = {node for node, _ in initializer.uses()}
        first = next(node for node in self._graph if node in readers)
        if stored.groups[0].form is None and len(stored.groups) == 1:
            self._half(stored, initializer, first)
            return
        planes = {g.name: self._planes(g, stored.columns, first) for g in stored.groups if g.form}
        for node in uses.matmuls:
            self._matmul(node, stored, planes)
        for node in uses.gathers:
            self._gather(node, stored, planes[stored.groups[0].name])
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
        stored = self._initializer(Item(group.name, _F32, tensor_shape(tensor), group, UPRIGHT))
        addend = self._constant(f"anyquant.addend.{binding.addend:g}", np.array(binding.addend, np.float32))
        total = self._node(first, "Add", [stored, addend], f"{binding.initializer}.sum")
        initializer.replace_all_uses_with(total)
        self.held.append((group, group.name, False))

    def items(self) -> list[Item]:
        """Every external initializer of the edited graph in order: the builder's, then the new ones."""
        new = {item.name: item for item in self._new}
        items = []
        for name, value in self._graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            if isinstance(tensor, oir.Tensor):  # a small one of ours, inside the proto
                continue
            shape = tensor_shape(tensor)
            items.append(new.get(name) or Item(name, oir.DataType(tensor.dtype), shape))
        return items

    # --- storing

    def _initializer(self, item: Item) -> oir.Value:
        tensor = oir.ExternalTensor(DATA_FILE, 0, item.nbytes, item.dtype, shape=oir.Shape(item.shape), name=item.name)
        value = oir.Value(
            name=item.name, shape=oir.Shape(item.shape), type=oir.TensorType(item.dtype), const_value=tensor
        )
        self._graph.register_initializer(value)
        self._new.append(item)
        return value

    def _constant(self, name: str, array: np.ndarray) -> oir.Value:
        """A shared initializer; integers, which are shapes, lie in the proto: ONNX Runtime reads them early."""
        if name not in self._shared and array.dtype == np.int64:
            tensor = oir.Tensor(array, name=name)
            value = oir.Value(name=name, shape=oir.Shape(array.shape), type=oir.TensorType(_I64), const_value=tensor)
            self._graph.register_initializer(value)
            self._shared[name] = value
        elif name not in self._shared:
            self._shared[name] = self._initializer(Item(name, _F32, array.shape, constant=array))
        return self._shared[name]

    def _node(
        self, before: oir.Node, op: str, inputs: list[oir.Value | None], name: str, domain: str = "", **attributes: Any
    ) -> oir.Value:
        node = oir.node(op, inputs, attributes, domain=domain, name=name)
        node.outputs[0].name = name
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _half(self, stored: Stored, initializer: oir.Value, first: oir.Node) -> None:
        """A 16-bit initializer of the same orientation and a Cast in place of the float one."""
        group, transposed = stored.groups[0], stored.binding.transposed
        dtype = oir.DataType[group.dtype]
        name, tensor = initializer.name or "", initializer.const_value
        assert tensor is not None
        del self._graph.initializers[name]
        shape = tensor_shape(tensor)
        half = self._initializer(Item(f"{name}.half", dtype, shape, group, TRANSPOSED if transposed else UPRIGHT))
        cast = self._node(first, "Cast", [half], f"{name}.cast", to=_F32)
        initializer.replace_all_uses_with(cast)
        self.held.append((group, f"{name}.cast", transposed))

    def _planes(self, group: Group, columns: int, before: oir.Node) -> dict[str, oir.Value]:
        """Initializers of a group, its scales in FP32, and the zero points that are not the default."""
        form = group.form
        assert form is not None
        values: dict[str, oir.Value] = {}
        for suffix, (dtype, shape) in array_shapes(form, group.rows, columns).items():
            values[suffix] = self._initializer(Item(group.name + suffix, _TYPES[dtype], shape, group, suffix))
        scale = values[".scale"]
        name = group.name + ".scale"
        if form.scale == "exponent":
            index = self._node(before, "Cast", [scale], name + ".index", to=oir.DataType.INT32)
            scale = self._node(before, "Gather", [self._table(form.width), index], name + ".value")
        elif form.scale == "f16":
            scale = self._node(before, "Cast", [scale], name + ".value", to=_F32)
        values["scale"] = scale
        if form.bits == 8:
            sixteen = self._constant(SIXTEEN, np.array(16, np.float32))
            values["scale_high"] = self._node(before, "Mul", [scale, sixteen], name + ".high")
            if not form.zero:
                values[".zero_low"] = self._zeros(group.rows, -(-columns // form.block))
        return values

    def _table(self, width: int) -> oir.Value:
        return self._constant(f"{TABLE}.{width}", scale_table(width))

    def _zeros(self, rows: int, blocks: int) -> oir.Value:
        """Zero points 0 for the low plane, [rows, blocks / 2] bytes, made at load instead of being stored."""
        size = (rows, -(-blocks // 2))
        name = f"anyquant.zeros.{size[0]}x{size[1]}"
        if name not in self._shared:
            dims = self._constant(name + ".shape", np.array(size, np.int64))
            zero = oir.tensor(np.zeros(1, np.uint8))
            # At the very start, so that it precedes every reader.
            start = next(iter(self._graph))
            self._shared[name] = self._node(start, "ConstantOfShape", [dims], name, value=zero)
        return self._shared[name]

    # --- reading

    def _matmul(self, node: oir.Node, stored: Stored, planes: Mapping[str, dict[str, oir.Value]]) -> None:
        activations, base = node.inputs[0], node.name or ""
        products = []
        for i, group in enumerate(stored.groups):
            name = base if len(stored.groups) == 1 else f"{base}.{i}"
            if group.form is None:
                products.append(self._float_product(node, group, stored.columns, name))
                continue
            p = planes[group.name]
            shape = {"K": stored.columns, "N": group.rows, "bits": 4, "block_size": group.form.block}
            if self._accuracy_level > 0:
                shape["accuracy_level"] = self._accuracy_level
            low = [activations, p[".low"], p["scale"], p.get(".zero_low")]
            product = self._node(node, "MatMulNBits", _trim(low), name + ".low", _DOMAIN, **shape)
            if group.form.bits == 8:
                high = [activations, p[".high"], p["scale_high"], p.get(".zero_high")]
                upper = self._node(node, "MatMulNBits", _trim(high), name + ".high", _DOMAIN, **shape)
                product = self._node(node, "Add", [upper, product], name + ".sum")
            products.append(product)
        shown = products
        if len(products) > 1:
            shown = [self._node(node, "Concat", list(products), base + ".concat", axis=-1)]
        old = node.outputs[0]
        name = old.name or ""
        shown[0].type, shown[0].shape, shown[0].name = old.type, old.shape, name
        old.replace_all_uses_with(shown[0], replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        for group, product in zip(stored.groups, products, strict=True):
            self.held.append((group, product.name or "", False))

    def _float_product(self, node: oir.Node, group: Group, columns: int, name: str) -> oir.Value:
        """A product with some of the rows, stored [in, out]."""
        dtype = oir.DataType[group.dtype]
        weight = self._initializer(Item(group.name, dtype, (columns, group.rows), group, TRANSPOSED))
        if dtype != _F32:
            weight = self._node(node, "Cast", [weight], group.name + ".cast", to=_F32)
        return self._node(node, "MatMul", [node.inputs[0], weight], name)

    def _gather(self, node: oir.Node, stored: Stored, p: dict[str, oir.Value]) -> None:
        group, base = stored.groups[0], node.name or ""
        form = group.form
        assert form is not None
        padded = -(-stored.columns // form.block) * form.block
        flat = self._constant(f"{group.name}.flat", np.array([group.rows, padded // 2], np.int64))
        attributes = {"bits": 4, "block_size": form.block, "gather_axis": 0, "quantize_axis": 1}

        def plane(side: str, scale: str) -> oir.Value:
            data = self._node(node, "Reshape", [p[f".{side}"], flat], f"{base}.{side}.data")
            inputs = [data, node.inputs[1], p[scale], p.get(f".zero_{side}")]
            return self._node(node, "GatherBlockQuantized", _trim(inputs), f"{base}.{side}", _DOMAIN, **attributes)

        rows = plane("low", "scale")
        if form.bits == 8:
            rows = self._node(node, "Add", [plane("high", "scale_high"), rows], base + ".sum")
        if padded != stored.columns:
            ends = [self._constant(f"anyquant.int64.{n}", np.array([n], np.int64)) for n in (0, stored.columns, -1)]
            rows = self._node(node, "Slice", [rows, *ends], base + ".slice")
        old = node.outputs[0]
        rows.type, rows.shape, rows.name = old.type, old.shape, old.name
        old.replace_all_uses_with(rows, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        self.held.append((group, rows.name or "", False))


def _trim(inputs: list[oir.Value | None]) -> list[oir.Value | None]:
    return inputs[:-1] if inputs[-1] is None else inputs


def serialize(model: oir.Model, items: list[Item], metadata: Mapping[str, str]) -> bytes:
    """The bytes of model.onnx: ``items`` are external, at the offsets of :func:`place`."""
    offsets, _ = place(items)
    for item, offset in zip(items, offsets, strict=True):
        value = model.graph.initializers[item.name]
        value.const_value = oir.ExternalTensor(
            DATA_FILE, offset, item.nbytes, item.dtype, shape=oir.Shape(item.shape), name=item.name
        )
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    data: bytes = oir.to_proto(model).SerializeToString(deterministic=True)
    return data
