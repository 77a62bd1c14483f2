"""Nodes for matrices in 4-bit planes: MatMulNBits and GatherBlockQuantized, one for each plane."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from anyquant.exporters.onnx.editing import F32, GraphEditor
from anyquant.exporters.onnx.layout import Group
from anyquant.exporters.onnx.matmul_nbits import Form, array_shapes, scale_table

DOMAIN = "com.microsoft"
TABLE = "anyquant.exponent_scales"
SIXTEEN = "anyquant.sixteen"

Planes = dict[str, oir.Value]


class NBitsNodes:
    """Stores groups in planes and reads them."""

    def __init__(self, editor: GraphEditor, accuracy_level: int) -> None:
        """Write to a graph; ``accuracy_level`` is that of the MatMulNBits nodes."""
        self._editor = editor
        self._accuracy_level = accuracy_level

    def store(self, group: Group, columns: int, before: oir.Node) -> Planes:
        """Initializers of a group, its scales in FP32, and the zero points that are not the default."""
        form = _form(group)
        values = self._editor.store_groups(group, array_shapes(form, group.rows, columns))
        scale = values[".scale"]
        name = group.name + ".scale"
        if form.scale == "exponent":
            index = self._editor.node(before, "Cast", [scale], name + ".index", to=oir.DataType.INT32)
            table = self._editor.table(f"{TABLE}.{form.width}", scale_table(form.width))
            scale = self._editor.node(before, "Gather", [table, index], name + ".value")
        elif form.scale == "f16":
            scale = self._editor.node(before, "Cast", [scale], name + ".value", to=F32)
        values["scale"] = scale
        if form.bits == 8:
            sixteen = self._editor.table(SIXTEEN, np.array(16, np.float32))
            values["scale_high"] = self._editor.node(before, "Mul", [scale, sixteen], name + ".high")
            if not form.zero:
                blocks = -(-columns // form.block)
                values[".zero_low"] = self._editor.zeros(group.rows, -(-blocks // 2))
        return values

    def product(self, node: oir.Node, group: Group, columns: int, p: Planes, name: str) -> oir.Value:
        """The product of a MatMul's activations with a group."""
        form, activations = _form(group), node.inputs[0]
        shape = {"K": columns, "N": group.rows, "bits": 4, "block_size": form.block}
        if self._accuracy_level > 0:
            shape["accuracy_level"] = self._accuracy_level

        def plane(side: str, scale: str) -> oir.Value:
            inputs = [activations, p[f".{side}"], p[scale], p.get(f".zero_{side}")]
            return self._editor.node(node, "MatMulNBits", _trim(inputs), f"{name}.{side}", DOMAIN, **shape)

        product = plane("low", "scale")
        if form.bits == 8:
            product = self._editor.node(node, "Add", [plane("high", "scale_high"), product], name + ".sum")
        return product

    def rows(self, node: oir.Node, group: Group, columns: int, p: Planes) -> oir.Value:
        """The rows of a group that a Gather looks up."""
        form, base = _form(group), node.name or ""
        padded = -(-columns // form.block) * form.block
        flat = self._editor.constant(f"{group.name}.flat", np.array([group.rows, padded // 2], np.int64))
        attributes = {"bits": 4, "block_size": form.block, "gather_axis": 0, "quantize_axis": 1}

        def plane(side: str, scale: str) -> oir.Value:
            data = self._editor.node(node, "Reshape", [p[f".{side}"], flat], f"{base}.{side}.data")
            inputs = [data, node.inputs[1], p[scale], p.get(f".zero_{side}")]
            return self._editor.node(
                node, "GatherBlockQuantized", _trim(inputs), f"{base}.{side}", DOMAIN, **attributes
            )

        rows = plane("low", "scale")
        if form.bits == 8:
            rows = self._editor.node(node, "Add", [plane("high", "scale_high"), rows], base + ".sum")
        if padded != columns:
            ends = [self._editor.constant(f"anyquant.int64.{n}", np.array([n], np.int64)) for n in (0, columns, -1)]
            rows = self._editor.node(node, "Slice", [rows, *ends], base + ".slice")
        return rows


def _form(group: Group) -> Form:
    assert isinstance(group.form, Form)
    return group.form


def _trim(inputs: list[oir.Value | None]) -> list[oir.Value | None]:
    return inputs[:-1] if inputs[-1] is None else inputs
