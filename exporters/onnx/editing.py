"""Adding to a graph and storing what was added: nodes, initializers, their places in the data file, the bytes.

Initializers of a finished graph are external, at offsets given by :func:`place`; the data are written afterwards, from
the same list.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir

from anyquant.exporters.onnx.layout import Group

ALIGNMENT = 64
DATA_FILE = "model.onnx.data"
F32 = oir.DataType.FLOAT
_TYPES = {
    np.dtype(np.uint8): oir.DataType.UINT8,
    np.dtype(np.uint16): oir.DataType.UINT16,
    np.dtype(np.uint32): oir.DataType.UINT32,
    np.dtype(np.int64): oir.DataType.INT64,
    np.dtype(np.float16): oir.DataType.FLOAT16,
    np.dtype(np.float32): F32,
}


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


def tensor_shape(tensor: oir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a stored tensor, which has no symbols."""
    return tuple(int(n) for n in tensor.shape.numpy())


class GraphEditor:
    """Adds nodes and initializers to one graph."""

    def __init__(self, graph: oir.Graph) -> None:
        """Start on a graph as the builder made it; it is edited in place."""
        self.graph = graph
        self._new: dict[str, Item] = {}
        self._shared: dict[str, oir.Value] = {}

    def store(self, item: Item) -> oir.Value:
        """Add an external initializer."""
        tensor = oir.ExternalTensor(DATA_FILE, 0, item.nbytes, item.dtype, shape=oir.Shape(item.shape), name=item.name)
        value = self._register(item.name, item.shape, item.dtype, tensor)
        self._new[item.name] = item
        return value

    def store_groups(
        self, group: Group, shapes: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
    ) -> dict[str, oir.Value]:
        """Add the external initializers of a group: suffix -> value."""
        return {
            suffix: self.store(Item(group.name + suffix, _TYPES[dtype], shape, group, suffix))
            for suffix, (dtype, shape) in shapes.items()
        }

    def table(self, name: str, array: np.ndarray) -> oir.Value:
        """A constant that nodes share, in the data file."""
        if name not in self._shared:
            self._shared[name] = self.store(Item(name, _TYPES[array.dtype], array.shape, constant=array))
        return self._shared[name]

    def constant(self, name: str, array: np.ndarray) -> oir.Value:
        """A small constant that nodes share, in the proto: ONNX Runtime reads shapes before it opens the data file."""
        if name not in self._shared:
            tensor = oir.Tensor(array, name=name)
            self._shared[name] = self._register(name, array.shape, _TYPES[array.dtype], tensor)
        return self._shared[name]

    def zeros(self, rows: int, columns: int) -> oir.Value:
        """uint8 zeros that are made at load instead of being stored."""
        name = f"anyquant.zeros.{rows}x{columns}"
        if name not in self._shared:
            shape = self.constant(name + ".shape", np.array((rows, columns), np.int64))
            zero = oir.tensor(np.zeros(1, np.uint8))
            # At the very start, so that it precedes every reader.
            self._shared[name] = self.node(next(iter(self.graph)), "ConstantOfShape", [shape], name, value=zero)
        return self._shared[name]

    def node(
        self,
        before: oir.Node,
        op: str,
        inputs: Sequence[oir.Value | None],
        name: str,
        domain: str = "",
        **attributes: Any,
    ) -> oir.Value:
        """Add a node of one output, which gets the node's name."""
        node = oir.node(op, inputs, attributes, domain=domain, name=name)
        node.outputs[0].name = name
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def supersede(self, node: oir.Node, value: oir.Value) -> None:
        """Let a value take the place, name and type of a node's output, and remove the node."""
        old = node.outputs[0]
        value.type, value.shape, value.name = old.type, old.shape, old.name
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def items(self) -> list[Item]:
        """Every external initializer of the edited graph in order: the builder's, then the new ones."""
        items = []
        for name, value in self.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            if isinstance(tensor, oir.Tensor):  # a small one of ours, inside the proto
                continue
            items.append(self._new.get(name) or Item(name, oir.DataType(tensor.dtype), tensor_shape(tensor)))
        return items

    def _register(
        self, name: str, shape: tuple[int, ...], dtype: oir.DataType, tensor: oir.TensorProtocol
    ) -> oir.Value:
        value = oir.Value(name=name, shape=oir.Shape(shape), type=oir.TensorType(dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def serialize(
    model: oir.Model, items: list[Item], metadata: Mapping[str, str], functions: Sequence[onnx.FunctionProto]
) -> bytes:
    """The bytes of model.onnx: ``items`` are external, at the offsets of :func:`place`."""
    offsets, _ = place(items)
    for item, offset in zip(items, offsets, strict=True):
        value = model.graph.initializers[item.name]
        value.const_value = oir.ExternalTensor(
            DATA_FILE, offset, item.nbytes, item.dtype, shape=oir.Shape(item.shape), name=item.name
        )
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    proto = oir.to_proto(model)
    proto.functions.extend(functions)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data
