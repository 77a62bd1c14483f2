"""What ``plan``, ``quantize`` and ``export`` tell: data for programs, text for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

from anyquant import ir
from anyquant.console import mebibytes, table
from anyquant.estimates import STAGES, in_words, seconds
from anyquant.exporters.protocol import ExportPlan
from anyquant.inspection import check_export, form_name
from anyquant.losses import mean_error
from anyquant.methods import get_method
from anyquant.planning import Plan, forms_of
from anyquant.plugins import EXPORTERS, plugins


def plan_data(planned: Plan, *, exports: bool = True) -> dict[str, Any]:
    """All that a plan knows, as JSON."""
    model = planned.model
    data: dict[str, Any] = {
        "model": planned.checkpoint.name,
        "method": model.method,
        "settings": model.settings,
        "feasible": list(planned.feasible),
        "bits": model.quantized_bits,
        "bits_per_weight": model.bits_per_weight,
        "forms": dict(sorted(Counter(form_name(e.spec) for e in model.entries.values()).items())),
        "measured": planned.measured,
        "files": planned.files,
        "bytes": sum(planned.files.values()),
        "source_bytes": sum(info.nbytes for info in planned.checkpoint.tensors.values()),
        "peak_memory": planned.peak_memory,
        "remarks": list(planned.notes),
        "tensors": {
            name: {"form": form_name(e.spec), "bytes": e.spec.nbytes, "bits_per_weight": e.spec.bits_per_weight}
            for name, e in model.entries.items()
        },
    }
    if planned.loss is not None:
        data["loss"] = planned.loss
    if exports:
        data["exports"] = {name: _exports(planned.model, name) for name in plugins(EXPORTERS)}
        stages = [stage for stage in STAGES if stage != "errors" or planned.measured]
        data["seconds"] = seconds(planned.checkpoint, planned.job, forms_of(planned.checkpoint, planned.job), stages)
    return data


def _exports(model: ir.Model, exporter: str) -> dict[str, Any]:
    """What an exporter would write; where its own layout refuses a tensor, also the layouts that take all of them."""
    native = check_export(model, exporter)
    if not native.get("refusals"):
        return native
    others = [check_export(model, exporter, layout) for layout in ("f16", "f32")]
    return {**native, "layouts": [found for found in others if not ("error" in found or found["refusals"])]}


def _bits_line(data: dict[str, Any]) -> str:
    return (
        f"{data['method']}: {data['bits']:.4f} bits per weight of the quantized matrices, "
        f"{data['bits_per_weight']:.4f} of the model"
    )


def _shortfall(data: dict[str, Any]) -> list[str]:
    """A line where the result is smaller than it was to be, by more than a hundredth."""
    target = data["settings"]["target"]
    if "bits" in target and target["count"] == "all":
        found, asked, slack = data["bits"], target["bits"], 0.01
    elif "size" in target and target["size_of"] == "ir":
        found, asked, slack = data["bytes"], target["size"], target["size"] / 100
    else:
        return []
    if asked - found <= slack or found >= data["feasible"][1]:
        return []
    return [f"below the target by {1 - found / asked:.1%}: no unit can take more without exceeding it"]


def plan_text(data: dict[str, Any]) -> str:
    """The plan as a table of 80 columns."""
    rows: list[tuple[str, ...]] = [("source", f"{data['source_bytes']:,}", mebibytes(data["source_bytes"]), "", "")]
    rows.append(("ir", f"{data['bytes']:,}", mebibytes(data["bytes"]), mebibytes(data["peak_memory"]), "-"))
    remarks = []
    for name, export in data["exports"].items():
        if "error" in export:
            rows.append((name, "no", "", "", ""))
            remarks.append(f"{name}: {export['error']}")
            continue
        if export["refusals"]:
            rows.append((name, "no", "", "", ""))
            remarks.append(f"{name}: {len(export['refusals'])} tensors refused, the first {export['refusals'][0]}")
        else:
            rows.append(_export_row(name, export))
            remarks += [f"{name}: {text}" for text in export["notes"]]
        rows += [_export_row(f"{name} --layout {other['layout']}", other) for other in export.get("layouts", [])]
    forms = ", ".join(f"{count} x {form}" for form, count in data["forms"].items())
    unit = "bits" if data["settings"]["target"].get("bits") else "bytes"
    low, high = data["feasible"]
    return "\n".join(
        [
            _bits_line(data),
            *_shortfall(data),
            *data["remarks"],
            f"feasible: {low:,.4f} to {high:,.4f} {unit}"
            if unit == "bits"
            else f"feasible: {low:,} to {high:,} {unit}",
            f"tensors: {forms}",
            "",
            table(("to make", "bytes", "", "memory", "temporary disk"), rows),
            f"time to quantize: {in_words(data['seconds'])}, beside loading and writing",
            *remarks,
        ]
    )


def _export_row(name: str, export: dict[str, Any]) -> tuple[str, ...]:
    needs = (mebibytes(export["peak_memory"]), mebibytes(export["temporary_disk"]))
    return name, f"{export['bytes']:,}", mebibytes(export["bytes"]), *needs


def mean_losses(model: ir.Model) -> dict[str, float | None]:
    """Relative squared errors over the quantized matrices, weighted by their sizes; None where none is known."""
    entries = [entry for entry in model.entries.values() if entry.quantized]
    found = {key: mean_error(entries, key) for key in ("error", "output_error")}
    return {key: mean.value if mean else None for key, mean in found.items()}


def quantized_text(data: dict[str, Any]) -> str:
    """What was written, and what to do with it."""
    return "\n".join(
        [
            _bits_line(data),
            *_shortfall(data),
            *data["remarks"],
            f"relative squared error of the matrices: {data['error']:.3e}"
            + (f", of their outputs: {data['output_error']:.3e}" if data["output_error"] is not None else ""),
            f"wrote {data['output']}: {data['bytes']:,} bytes ({mebibytes(data['bytes'])}), tokenizer not counted",
            f"next: anyquant export gguf {data['output']} -o {data['output']}.gguf",
        ]
    )


def export_data(done: ExportPlan) -> dict[str, Any]:
    """What an export wrote, as JSON."""
    return {
        "layout": done.layout,
        "bytes": done.bytes,
        "files": done.files,
        "types": dict(Counter(done.types.values()).most_common()),
        "notes": list(done.notes),
    }


def export_text(data: dict[str, Any]) -> str:
    """What an export wrote, for people."""
    types = ", ".join(f"{count} x {kind}" for kind, count in data["types"].items())
    lines = [f"wrote {data['output']}: {data['bytes']:,} bytes ({mebibytes(data['bytes'])})", f"tensors: {types}"]
    return "\n".join([*lines, *data["notes"]])


def method_data(name: str) -> dict[str, Any]:
    """A method and its options.

    Raises:
        UsageError: there is no such method.
    """
    method = get_method(name)
    options = [
        {
            "name": option.name,
            "default": option.default,
            "paper": option.value("paper"),
            "allowed": option.allowed(),
            "help": option.help,
        }
        for option in method.options
    ]
    return {"name": method.name, "summary": method.summary, "options": options}


def method_text(data: dict[str, Any]) -> str:
    """:func:`method_data` for people."""
    lines = [f"{data['name']}: {data['summary']}", ""]
    for option in data["options"]:
        paper = "" if option["paper"] == option["default"] else f"; paper: {setting_text(option['paper'])}"
        lines.append(f"  {option['name']}={setting_text(option['default'])}  ({option['allowed']}{paper})")
        lines.append(f"      {option['help']}")
    return "\n".join([*lines, "", "Set them with --set KEY=VALUE; --profile paper takes the values of the paper."])


def setting_text(value: Any) -> str:
    """The value of an option as --set takes it."""
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value}"


def inspection_text(data: dict[str, Any]) -> str:
    """What is in a model, a line each; of an IR folder which rows are hard, too."""
    from anyquant.report.hard import hard_text

    lines = []
    for key, value in data.items():
        if key == "feasible_bits":
            value = "\n".ljust(20).join(_interval(method, bits) for method, bits in value.items())
        if key != "hard":
            lines.append(f"{key.replace('_', ' '):<18} {_words(value)}")
    return "\n".join([*lines, *(["", hard_text(data["hard"])] if "hard" in data else [])])


def _interval(method: str, bits: dict[str, float] | str) -> str:
    return f"{method:<7} {bits}" if isinstance(bits, str) else f"{method:<7} {bits['fewest']:.4g} to {bits['most']:.4g}"


def _words(value: Any, nested: bool = False) -> str:
    if isinstance(value, dict):
        text = ", ".join(f"{k}: {_words(v, nested=True)}" for k, v in value.items()) or "none"
        return f"({text})" if nested else text
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value)
