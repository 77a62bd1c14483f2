"""The report of a quantization as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from anyquant.report import plots
from anyquant.report.detail import by_width
from anyquant.report.facts import SCHEMA, Facts
from anyquant.report.matrices import WIDTHS, Matrix, parts, unit_of
from anyquant.report.sweeps import sweep_plots, sweep_table
from anyquant.reporting import figures
from anyquant.reporting.estimate import Estimate
from anyquant.reporting.markup import card_row, definitions, figure_row, no_plots, page, section, table
from anyquant.reporting.words import DASH, if_known, number, size, with_error, words

_LISTED = 10
_KINDS = 24
_COLORS = ("#2563eb", "#7c3aed", "#059669", "#d97706", "#be123c", "#94a3b8", "#475569")
_CSS = """
.wide figure{flex-basis:100%;max-width:none}
.pairs figure{flex-basis:440px}
.bar{display:flex;height:16px;border-radius:8px;overflow:hidden;margin:2px 0 12px}
.bar span{display:block}
td i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:8px}
.two{display:flex;flex-wrap:wrap;gap:0 32px}.two>div{flex:1 1 420px;min-width:0}
h3{margin:14px 0 4px;font-size:14px}
"""


def to_html(facts: Facts) -> str:
    """The page."""
    sections = [
        _cards(facts),
        section("What the bytes are", _bytes(facts)),
        no_plots(),
        section(f"Bits of the {unit_of(facts.matrices)}", _bits(facts)),
        section("What was lost, layer by layer", _errors(facts)),
        section("What is hard", _hard(facts)),
        section(facts.detail.matrix.name, _detail(facts)),
        section("Size against loss", _sizes(facts)),
        section("Notes", "".join(f"<p>{escape(note)}</p>" for note in facts.notes)),
        section("How this was made", definitions(_details(facts))),
    ]
    return page(f"{facts.name}: quantization", facts.name, _subtitle(facts), "".join(sections), css=_CSS)


def _subtitle(facts: Facts) -> str:
    model = facts.model
    said = [f"method {model.method}", f"{model.quantized_bits:.2f} bits per quantized weight"]
    said += [f"from {model.source['name']}"] if model.source.get("name") else []
    said += [f"{len(facts.matrices):,} matrices of {len(facts.kinds)} kinds"]
    return escape(" · ".join(said))


def _cards(facts: Facts) -> str:
    model, found = facts.model, parts(facts.model)
    quantized = sum(m.entry.spec.numel for m in facts.matrices)
    whole = sum(entry.spec.numel for entry in model.entries.values())
    cards = [
        ("bits per weight", f"{model.quantized_bits:.4f}", "of the quantized matrices, all overhead counted"),
        ("of the whole model", f"{model.bits_per_weight:.2f}", f"{100 * quantized / whole:.1f} % of it is quantized"),
        ("size", size(facts.nbytes), f"source {size(facts.source_bytes)}" if facts.source_bytes else "the IR folder"),
        ("codes", f"{8 * found.get('codes', 0) / quantized:.3f}", "bits per weight, the rest is overhead"),
        ("error of the weights", number(facts.error.value) if facts.error else DASH, _relative(facts.error)),
    ]
    outputs = facts.output_error
    if outputs:
        cards.append(("error of the outputs", number(outputs.value), _relative(outputs)))
    return card_row(cards)


def _relative(found: Estimate | None) -> str:
    if found is None or found.error is None:
        return "relative, squared"
    return f"± {number(found.error, 2)} over matrices; relative, squared"


def _bytes(facts: Facts) -> str:
    found = parts(facts.model)
    numel = sum(m.entry.spec.numel for m in facts.matrices)
    whole = {"tensors not quantized", "headers and manifest"}
    colors = {part: _COLORS[place % len(_COLORS)] for place, part in enumerate(found)}
    bar = "".join(
        f'<span style="width:{100 * nbytes / facts.nbytes:.3f}%;background:{colors[part]}"></span>'
        for part, nbytes in found.items()
    )
    rows = [
        [
            f'<i style="background:{colors[part]}"></i>{escape(part)}',
            f"{nbytes:,}",
            f"{100 * nbytes / facts.nbytes:.2f} %",
            DASH if part in whole else f"{8 * nbytes / numel:.4f}",
        ]
        for part, nbytes in found.items()
    ]
    rows.append(["<b>all</b>", f"<b>{facts.nbytes:,}</b>", "100 %", ""])
    return f"<div class=bar>{bar}</div>" + table(["", "bytes", "share", "bits per quantized weight"], rows, 1)


def _bits(facts: Facts) -> str:
    drawn = ""
    if figures.available():
        stacked, heat = plots.rows_by_layer(facts.matrices), plots.bits_heat(facts.matrices)
        title = f"Share of {unit_of(facts.matrices)} with each number of bits"
        drawn += f"<div class=wide>{figure_row({title: stacked})}</div>" if stacked else ""
        drawn += figure_row({"Bits per weight, all overhead counted": heat}) if heat else ""
    return drawn + _kinds(facts)


def _kinds(facts: Facts) -> str:
    kinds = facts.kinds
    used = [width for width in WIDTHS if any(kind.widths[width] for kind in kinds)]
    head = ["kind", "matrices", "weights", "bits per weight", "mean width"]
    head += [f"{width} b, %" for width in used] + ["error of the weights", "of the outputs"]
    rows = [
        [
            escape(kind.name),
            f"{len(kind.matrices):,}",
            f"{kind.numel:,}",
            f"{kind.bits:.4f}",
            with_error(kind.width),
            *(_percent(kind.widths[width], kind.widths.sum()) for width in used),
            with_error(kind.error),
            if_known(kind.output_error),
        ]
        for kind in kinds[:_KINDS]
    ]
    more = f"<p class=small>and {len(kinds) - _KINDS} kinds more</p>" if len(kinds) > _KINDS else ""
    return table(head, rows, 1) + more + (
        f"<p class=small>Mean width: bits of a code; ± is one standard error over {unit_of(facts.matrices)}, that of "
        "the errors is over matrices. Bits per weight count codebooks, bit maps, scales and outliers too.</p>"
    )  # fmt: skip


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if part else ""


def _errors(facts: Facts) -> str:
    if not figures.available():
        return ""
    drawn = {
        "Error of the outputs, on the calibration text": plots.error_by_layer(facts.matrices, "output_error"),
        "Error of the weights": plots.error_by_layer(facts.matrices, "error"),
    }
    drawn = {title: found for title, found in drawn.items() if found}
    several = any(len(kind.matrices) > len({m.layer for m in kind.matrices}) for kind in facts.kinds)
    note = "<p class=small>Experts of a layer are one point, ± one standard error over them.</p>" if several else ""
    return figure_row(drawn) + note if drawn else ""


def _hard(facts: Facts) -> str:
    found: Sequence[Matrix] = facts.matrices
    by_output = [m for m in found if m.output_error is not None]
    columns = [_listed("Largest error of the outputs", by_output, "output_error")] if by_output else []
    columns.append(_listed("Largest error of the weights", list(found), "error"))
    body = "<div class=two>" + "".join(f"<div>{column}</div>" for column in columns) + "</div>"
    if not facts.hardest:
        return body
    word = facts.detail.word
    rows = [
        [
            escape(row.matrix),
            f"{row.index:,}",
            str(row.bits),
            DASH if row.size is None else f"{row.size:.2f} x",
            DASH if row.share is None else f"{100 * row.share:.3f} %",
        ]
        for row in facts.hardest
    ]
    head = ["matrix", word, "bits", "weights' size over the matrix'", "share of the matrix' error"]
    note = "<p class=small>Size: root mean square. A hard row is left with a small share because it has many bits.</p>"
    return f"<h3>{word.capitalize()}s with the most bits</h3>{table(head, rows, 1)}{note}{body}"


def _listed(title: str, found: list[Matrix], key: str) -> str:
    ranked = sorted(found, key=lambda m: -getattr(m, key))[:_LISTED]
    rows = [[escape(m.name), f"{m.entry.spec.bits_per_weight:.3f}", number(getattr(m, key))] for m in ranked]
    return f"<h3>{escape(title)}</h3>" + table(["matrix", "bits per weight", "error"], rows, 1)


def _detail(facts: Facts) -> str:
    found = facts.detail
    matrix = found.matrix
    spec = matrix.entry.spec
    said = [
        f"{spec.shape[0]:,} x {spec.shape[1]:,} weights",
        f"{spec.bits_per_weight:.4f} bits per weight",
        f"error of the weights {number(matrix.error)}",
    ]
    if matrix.output_error is not None:
        said.append(f"of the outputs {number(matrix.output_error)}")
    body = f"<p>{escape(', '.join(said))}</p>"
    if figures.available():
        drawn = {"Weights before and after" if found.before is not None else "Weights after": plots.distribution(found)}
        for unit in found.units:
            share = "" if unit.share is None else f", {100 * unit.share:.3g} % of the error"
            drawn[f"{found.word.capitalize()} {unit.index}: {unit.bits} bits{share}"] = plots.unit_values(unit)
        drawn[f"Size of the weights in {found.word}s of each width"] = plots.size_by_width(found)
        body += f"<div class=pairs>{figure_row({title: svg for title, svg in drawn.items() if svg})}</div>"
    groups = by_width(found)
    if groups:
        rows = [
            [
                f"{group['bits']} bits",
                f"{group['units']:,}",
                f"{100 * group['share']:.1f} %",
                f"{100 * group['power']:.1f} %",
                f"{100 * group['error']:.1f} %",
                number(group["rms"][2]),
            ]
            for group in groups
        ]
        head = ["", f"{found.word}s", f"of all {found.word}s", "of the squared weights", "of the squared error"]
        body += table([*head, "median of their root mean squares"], rows, 1)
        body += "<p class=small>In the plot: the middle half, 5 to 95 %, the median, and how many there are.</p>"
    return body


def _sizes(facts: Facts) -> str:
    if facts.sweep is None:
        return ""
    drawn = figure_row(sweep_plots(facts.sweep, facts.nbytes)) if figures.available() else ""
    return drawn + sweep_table(facts.sweep)


def _details(facts: Facts) -> dict[str, str]:
    model, about = facts.model, facts.environment
    return {
        "source": words(model.source),
        "settings": words(model.settings),
        "calibration": words(model.calibration) if model.calibration else "none",
        "weights": f"SHA-256 over names and digests of all tensors: {facts.weights}",
        "made by": f"anyquant {model.anyquant_version}",
        "reported by": f"{words(about['packages'], ' ')}, Python {about['python']}, {about['system']}",
        "schema": SCHEMA,
    }
