"""What is in a model, from its headers alone: for ``anyquant inspect`` and for the tables of ``plan``."""

from __future__ import annotations

from collections import Counter
from typing import Any

from anyquant import ir
from anyquant.checkpoint import Checkpoint
from anyquant.errors import AnyquantError
from anyquant.forms import chosen_matrices
from anyquant.job import Job, Target
from anyquant.planning import export_plan, feasible_bits, plan
from anyquant.plugins import EXPORTERS, METHODS, plugins


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Architecture, tensors by dtype, matrices, ties, feasible bits of each method, verdict of each exporter."""
    tensors = checkpoint.tensors.values()
    matrices = chosen_matrices(checkpoint, quantize_embeddings=False)
    numel = {info.name: _numel(info.shape) for info in tensors}
    columns = Counter(checkpoint.tensors[name].shape[1] for name in matrices)
    return {
        "name": checkpoint.name,
        "kind": checkpoint.kind,
        "architecture": (checkpoint.config.get("architectures") or [checkpoint.config.get("model_type")])[0],
        "bytes": sum(info.nbytes for info in tensors),
        "parameters": sum(numel.values()),
        "tensors": len(checkpoint.tensors),
        "dtypes": dict(Counter(info.dtype for info in tensors).most_common()),
        "aliases": dict(checkpoint.aliases),
        "matrices": len(matrices),
        "matrix_parameters": sum(numel[name] for name in matrices),
        "row_lengths": {str(length): count for length, count in sorted(columns.items())},
        "feasible_bits": {name: _feasible(checkpoint, name) for name in plugins(METHODS)},
        "exporters": _verdicts(_smallest(checkpoint)),
    }


def _numel(shape: tuple[int, ...]) -> int:
    return ir.DenseSpec(shape, "F32").numel


def _feasible(checkpoint: Checkpoint, method: str) -> dict[str, float] | str:
    """Fewest and most bits per weight, or why the method cannot be used."""
    try:
        low, high = feasible_bits(checkpoint, Job(method, Target(bits=1.0)))
    except AnyquantError as error:
        return str(error)
    return {"fewest": low, "most": high}


def _smallest(checkpoint: Checkpoint) -> ir.Model:
    """The plan that says most of what an exporter takes: every matrix in its fewest bits."""
    low, _ = feasible_bits(checkpoint, Job("block", Target(bits=1.0)))
    return plan(checkpoint, Job("block", Target(bits=low))).model


def _verdicts(model: ir.Model) -> dict[str, str]:
    """Of each exporter: "yes", or why it does not take the model."""
    verdicts = {}
    for name in plugins(EXPORTERS):
        export = check_export(model, name)
        refusal = export.get("error") or next(iter(export["refusals"]), "")
        verdicts[name] = f"no: {refusal}" if refusal else "yes"
    return verdicts


def check_export(model: ir.Model, exporter: str, layout: str = "native") -> dict[str, Any]:
    """What an exporter would write for a model or a plan: bytes, files, types, notes, refusals; or its error."""
    try:
        found = export_plan(model, exporter, layout)
    except AnyquantError as error:
        return {"error": str(error)}
    return {
        "layout": layout,
        "bytes": found.bytes,
        "files": found.files,
        "types": dict(Counter(found.types.values()).most_common()),
        "notes": list(found.notes),
        "refusals": [f"{r.tensor}: {r.reason} ({r.remedy})" for r in found.refusals],
        "temporary_disk": found.temporary_disk,
        "peak_memory": found.peak_memory,
    }


def inspect_ir(model: ir.Model) -> dict[str, Any]:
    """What an IR folder holds, from its headers and the numbers of bits of its rows."""
    from anyquant.report.hard import hard_rows  # brings much that ``plan`` has no use for

    kinds = Counter(form_name(entry.spec) for entry in model.entries.values())
    return {
        "name": model.path.name if model.path else "",
        "kind": "anyquant",
        "method": model.method,
        "settings": model.settings,
        "source": model.source,
        "bytes": sum(ir.file_sizes(model).values()),
        "parameters": sum(entry.spec.numel for entry in model.entries.values()),
        "tensors": len(model.entries),
        "forms": dict(kinds.most_common()),
        "aliases": model.aliases,
        "bits_per_weight": model.bits_per_weight,
        "quantized_bits": model.quantized_bits,
        "hard": hard_rows(model),
        "exporters": _verdicts(model),
    }


def form_name(spec: ir.Spec) -> str:
    """The short name of a form: bfp4/32, Q8_0, F32, codebook."""
    if isinstance(spec, ir.BlockSpec):
        return f"{spec.format}{spec.width}/{spec.block}"
    if isinstance(spec, ir.GGMLSpec):
        return spec.type
    if isinstance(spec, ir.DenseSpec):
        return spec.dtype
    return spec.kind
