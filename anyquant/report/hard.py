"""Which rows and matrices of an IR folder are hard: those that got the most bits, and those that lose most."""

from __future__ import annotations

from typing import Any

from anyquant import ir
from anyquant.console import table
from anyquant.report.matrices import WIDTHS, Matrix, by_kind, hardest, matrices, unit_of

LISTED = 10
_KINDS, _SHOWN = 8, 3


def hard_rows(model: ir.Model) -> dict[str, Any]:
    """What is hard, as JSON. Read are the manifest and the numbers of bits of the rows.

    Returns:
        ``units``: what the numbers of bits belong to ("rows", "columns", "matrices"); ``kinds``: of each kind of
        matrix its mean bits and how many units have 0, 1, ... 8; and the first of ``widest``, ``most_bits``,
        ``largest_error`` and ``largest_output_error``.

    Raises:
        CorruptFileError: a row has more than 8 bits.
    """
    found = matrices(model)
    return {
        "units": unit_of(found) if found else "matrices",
        "kinds": {
            kind.name: {
                "matrices": len(kind.matrices),
                "bits": kind.bits,
                "mean_width": kind.width.value,
                "widths": kind.widths.tolist(),
            }
            for kind in by_kind(found)
        },
        "widest": [
            {"matrix": matrix.name, "label": matrix.label, "index": row, "bits": int(matrix.bits[row])}
            for matrix, row in hardest(found, LISTED)
        ],
        "most_bits": _first(found, {m.name: m.entry.spec.bits_per_weight for m in found}),
        "largest_error": _first(found, {m.name: m.error for m in found}),
        "largest_output_error": _first(found, {m.name: m.output_error for m in found}),
    }


def _first(found: list[Matrix], values: dict[str, float | None]) -> list[dict[str, Any]]:
    """The matrices with the largest values; those without one are left out."""
    known = [(values[m.name], m) for m in found]
    ranked = sorted(((v, m) for v, m in known if v is not None), key=lambda pair: -pair[0])
    return [{"matrix": m.name, "label": m.label, "value": v} for v, m in ranked[:LISTED]]


def hard_text(hard: dict[str, Any]) -> str:
    """The same in about 15 lines."""
    kinds = hard["kinds"]
    if not kinds:
        return "nothing is quantized"
    used = [width for width in WIDTHS if any(kind["widths"][width] for kind in kinds.values())]
    rows = []
    for name, kind in list(kinds.items())[:_KINDS]:
        total = sum(kind["widths"])
        shares = [f"{100 * kind['widths'][width] / total:.1f}" if kind["widths"][width] else "" for width in used]
        rows.append([name, *shares, f"{kind['mean_width']:.2f}"])
    if len(kinds) > _KINDS:
        rows.append([f"and {len(kinds) - _KINDS} kinds more", *[""] * (len(used) + 1)])
    lines = [table([f"% of {hard['units']}", *(f"{width} bit" for width in used), "mean"], rows)]
    widest = [f"{row['label']} {hard['units'][:-1]} {row['index']} ({row['bits']})" for row in hard["widest"][:_SHOWN]]
    for title, listed in (
        ("most bits", widest or [f"{m['label']} ({m['value']:.2f})" for m in hard["most_bits"][:_SHOWN]]),
        ("largest error of weights", [f"{m['label']} ({m['value']:.2g})" for m in hard["largest_error"][:_SHOWN]]),
        ("of outputs", [f"{m['label']} ({m['value']:.2g})" for m in hard["largest_output_error"][:_SHOWN]]),
    ):
        if listed:
            lines.append(f"{title}: {', '.join(listed)}")
    return "\n".join(lines)
