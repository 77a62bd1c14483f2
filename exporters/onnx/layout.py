"""How each bound initializer is stored: decided from specs, per layout, before any value is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from anyquant import ir
from anyquant.exporters.onnx.binding import Binding, Part
from anyquant.exporters.onnx.codebook import CodebookForm
from anyquant.exporters.onnx.matmul_nbits import Form, form_of
from anyquant.exporters.protocol import ExportOptions, Refusal

_DENSE = {"F16": "FLOAT16", "BF16": "BFLOAT16"}
_FOLDING = 30  # bytes per weight that ONNX Runtime holds while it folds, at widths up to 8; measured
LABELS = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}


@dataclass(frozen=True)
class Group:
    """Neighbouring rows of a bound matrix that are stored alike.

    Attributes:
        name: stem of the names of what is stored.
        parts: rows of IR tensors, in order.
        form: how integers or codebooks are stored, or None for floats; a group of the latter has one part.
        dtype: ONNX float type if ``form`` is None.
    """

    name: str
    parts: tuple[Part, ...]
    form: Form | CodebookForm | None
    dtype: str = "FLOAT"

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def label(self) -> str:
        """For the user."""
        return self.form.label if self.form else LABELS[self.dtype]


@dataclass(frozen=True)
class Stored:
    """How one bound matrix is stored: as one group, or as several whose products are concatenated."""

    binding: Binding
    columns: int
    groups: tuple[Group, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the initializer stays as the graph source made it."""
        return len(self.groups) == 1 and self.groups[0].form is None and self.groups[0].dtype == "FLOAT"


def arrange(model: ir.Model, binding: Binding, options: ExportOptions, *, mixed: bool) -> Stored:
    """Decide for one matrix.

    Args:
        model: the IR.
        binding: what the initializer holds; two-dimensional.
        options: layout.
        mixed: whether the graph allows parts to be stored differently; it looks rows up otherwise.
    """
    columns = model.entries[binding.parts[0].tensor].spec.shape[1]
    groups: list[Group] = []
    for part in binding.parts:
        form, dtype = _kind(model.entries[part.tensor], options)
        if isinstance(form, CodebookForm):
            # Named after the tensor, which is stored once, whatever parts of it the graph reads where.
            groups.append(Group(part.tensor, (part,), form))
        elif groups and (groups[-1].form, groups[-1].dtype) == (form, dtype):
            groups[-1] = replace(groups[-1], parts=(*groups[-1].parts, part))
        else:
            groups.append(Group(f"{binding.initializer}.{len(groups)}", (part,), form, dtype))
    if len(groups) == 1 and not isinstance(groups[0].form, CodebookForm):
        groups = [replace(groups[0], name=binding.initializer)]
    if not mixed and (len(groups) > 1 or not _has_rows(groups[0])):
        groups = [Group(binding.initializer, binding.parts, None)]
    return Stored(binding, columns, tuple(groups))


def _has_rows(group: Group) -> bool:
    """Whether the rows of a group can be looked up: with a codebook per column they would have to be cut from all."""
    if not isinstance(group.form, CodebookForm):
        return True
    return group.form.spec.axis == 0 and group.rows == group.form.spec.shape[0]


def plain(model: ir.Model, binding: Binding) -> Stored:
    """The matrix as FP32, where the graph uses it in a way that only floats allow."""
    columns = model.entries[binding.parts[0].tensor].spec.shape[1]
    return Stored(binding, columns, (Group(binding.initializer, binding.parts, None),))


def _kind(entry: ir.Entry, options: ExportOptions) -> tuple[Form | CodebookForm | None, str]:
    spec = entry.spec
    if options.layout == "f32":
        return None, "FLOAT"
    if options.layout == "f16" and entry.quantized:
        return None, "FLOAT16"
    if isinstance(spec, ir.DenseSpec):
        return None, _DENSE.get(spec.dtype, "FLOAT")
    if isinstance(spec, ir.CodebookSpec):
        return CodebookForm(spec), "FLOAT"
    return form_of(spec), "FLOAT"


def refusals(model: ir.Model, options: ExportOptions) -> list[Refusal]:
    """Quantized matrices that FP16 would round; reads their values if there are any."""
    if options.layout != "f16" or options.allow_rounding or not model.has_values:
        return []
    found: list[Refusal] = []
    for name, entry in model.entries.items():
        if not entry.quantized:
            continue
        tensor = model.tensor(name)
        rounded = 0
        for rows in ir.row_chunks(tensor.spec.shape):
            values = ir.dequantize(tensor, rows)
            with np.errstate(over="ignore"):
                rounded += int((values.astype(np.float16).astype(np.float32) != values).sum())
        if rounded:
            found.append(
                Refusal(
                    name,
                    f"{rounded:,} of {tensor.spec.numel:,} values are not exact in FP16",
                    "use --layout native or f32, or accept the rounding with --allow-rounding",
                )
            )
    return found


def notes_on(model: ir.Model, stored: Mapping[str, Stored], options: ExportOptions) -> list[str]:
    """One sentence per fact that a user should know beforehand."""
    notes: list[str] = []
    tensors = {p.tensor: g for s in stored.values() for g in s.groups for p in g.parts}
    if options.layout == "native":
        kinds = {_family(model.entries[n].spec) for n, g in tensors.items() if g.form is None} - {"dense"}
        if kinds:
            notes.append(f"Matrices of these kinds have no exact form here and are stored as FP32: {_and(kinds)}.")
    if options.layout == "f16" and not model.has_values:
        notes.append("That every value is exact in FP16 is assumed until there are values to look at.")
    forms = [group.form for group in tensors.values()]
    if any(isinstance(form, Form) and form.bits == 8 for form in forms):
        notes.append(
            "Matrices of more than 4 bits are stored as two exact 4-bit planes, whose products ONNX Runtime adds."
        )
    if options.accuracy_level > 0 and any(isinstance(form, Form) for form in forms):
        notes.append(
            f"accuracy_level {options.accuracy_level} lets ONNX Runtime round activations (4: to 8 bits, an error of "
            "0.5 to 0.7 % of a product, more with longer blocks); the weights stay exact."
        )
    specs = [form.spec for form in forms if isinstance(form, CodebookForm)]
    if specs:
        notes.append(_on_codebooks(specs, options.fallback))
    return notes


def _on_codebooks(specs: list[ir.CodebookSpec], fallback: str) -> str:
    """What the chosen body of CodebookMatMul costs where no kernel is registered."""
    weights = sum(spec.numel for spec in specs)
    if fallback == "stream":
        return (
            f"The {len(specs)} codebook matrices stay packed in memory and are decoded in every run: a token takes "
            "tens of times as long as in FP32."
        )
    moment = _FOLDING + 4 * any(spec.input_scale for spec in specs) + 4 * any(spec.outliers for spec in specs)
    return (
        f"ONNX Runtime decodes the {len(specs)} codebook matrices when it loads the model: they then take "
        f"{4 * weights:,} bytes, and for a moment about {moment * weights:,}. --fallback stream keeps them packed."
    )


def _family(spec: ir.Spec) -> str:
    if isinstance(spec, ir.GGMLSpec):
        return spec.type
    if isinstance(spec, ir.CodebookSpec):
        return f"codebook per {'column' if spec.axis else 'row'}"
    return spec.format if isinstance(spec, ir.BlockSpec) else spec.kind


def _and(words: set[str]) -> str:
    return ", ".join(sorted(words))
