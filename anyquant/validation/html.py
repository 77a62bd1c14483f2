"""A report as one self-contained HTML page: no script, no external resource, everything escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from anyquant.reporting.markup import card_row, definitions, figure_row, no_plots, page, section, table
from anyquant.reporting.words import DASH, number, size, with_error
from anyquant.validation import plots
from anyquant.validation.results import Comparison, Gate, ModelRow, TensorComparison, ValidationReport
from anyquant.validation.words import differing, tensors_of, tensors_text, verdict

_LISTED = 10


def to_html(report: ValidationReport) -> str:
    """The page."""
    passed = not report.failed
    name = str(report.model["name"])
    count = f"{len(report.gates) - len(report.failed)} of {len(report.gates)} gates passed"
    badge = f'<span class="badge {"good" if passed else "bad"}">{"PASSED" if passed else "FAILED"}</span>'
    sections = [
        _cards(report),
        section("Models", _models(report)),
        section("The same weights in every runtime", _runtimes(report)),
        _plots(report),
        section("Gates", _gates(report.gates)),
        section("Tensors that differ", _tensor_differences(report.tensors)),
        section(f"Greedy text after “{report.prompt}”", _texts(report)),
        section("First choices that differ", _top_differences(report.comparisons)),
        section("Notes", "".join(f"<p>{escape(note)}</p>" for note in report.notes)),
        section("How this was measured", _environment(report)),
    ]
    aside = f"<div class=verdict>{badge}<p>{count}</p></div>"
    return page(f"{name}: validation", name, _subtitle(report), "".join(sections), aside=aside)


def _subtitle(report: ValidationReport) -> str:
    model, data = report.model, report.data
    parts = [
        f"method {model['method']}",
        f"{model['quantized_bits']:.2f} bits per quantized weight" if model["quantized_bits"] else "",
        f"from {model['source']}" if model.get("source") else "",
        f"measured on {data['windows']} windows of {data['window']} tokens of {data['text']}",
    ]
    return escape(" · ".join(part for part in parts if part))


def _mark(word: str) -> str:
    return f'<span class="mark {"good" if word == "pass" else "bad"}">{word}</span>' if word != DASH else DASH


def _cards(report: ValidationReport) -> str:
    tensors = [f for f in report.tensors if not f.rounding]
    equal, total = sum(t.equal for t in tensors), sum(t.total for t in tensors)
    cards = [("tensors equal bit for bit", f"{equal}/{total}", "IR and every exported file")]
    rows = {row.name: row for row in report.rows}
    quality = report.comparison("source", "IR")
    if quality:
        cards.append(("KL to the source", number(quality.kl_mean.value), _interval(quality.kl_mean, "nats per token")))
        cards.append(("top-1 agreement", f"{100 * quality.top1.value:.1f} %", _plus_minus(quality.top1, 100, "%")))
        before, after = rows["source"], rows["IR"]
        cards.append(
            (
                "perplexity",
                number(after.perplexity.value, 4),
                f"source {number(before.perplexity.value, 4)}, change {with_error(quality.perplexity_change)}",
            )
        )
    elif "IR" in rows:
        ir = rows["IR"].perplexity
        cards.append(("perplexity", number(ir.value, 4), _plus_minus(ir, 1, "")))
    for row in report.rows:
        if row.arithmetic == "quantized":
            quality = report.comparison("source", row.name) or report.comparison("IR", row.name)
            change = f"against {quality.reference}: change {with_error(quality.perplexity_change)}" if quality else ""
            cards.append((f"perplexity, {row.name}", number(row.perplexity.value, 4), change))
        elif row.name not in ("source", "IR"):
            cards.append((f"{row.name} file", size(row.nbytes), f"{row.bits_per_weight:.2f} bits per weight"))
    return card_row(cards)


def _interval(estimate: Any, unit: str) -> str:
    if estimate.low is None:
        return unit
    return f"{unit}, 95 %: {number(estimate.low)} to {number(estimate.high)}"


def _plus_minus(estimate: Any, scale: float, unit: str) -> str:
    return "one window: no error" if estimate.error is None else f"± {number(estimate.error * scale, 2)} {unit}"


def _models(report: ValidationReport) -> str:
    def row_of(row: ModelRow) -> list[str]:
        quality = report.comparison("source", row.name)
        return [
            f'<b style="color:{plots.COLORS.get(row.name, "#0f172a")}">{escape(row.name)}</b>',
            escape(row.runtime),
            _mark(verdict(report, row)),
            size(row.nbytes),
            f"{row.bits_per_weight:.2f}",
            with_error(row.perplexity),
            with_error(quality.kl_mean) if quality else DASH,
            with_error(quality.kl_median) if quality else DASH,
            with_error(quality.kl_p99) if quality else DASH,
            number(quality.kl_max.value) if quality else DASH,
            with_error(quality.top1, 100) + " %" if quality else DASH,
            escape(tensors_text(tensors_of(report, row.name))),
            f"{row.seconds_per_window:.2f} s",
            size(row.peak_memory) if row.peak_memory else DASH,
        ]

    head = ["", "runtime", "gates", "size", "bits per weight", "perplexity", "KL to source: mean", "median", "99 %"]
    head += ["max", "top-1", "tensors", "per window", "peak memory"]
    return table(head, [row_of(row) for row in report.rows], 3) + (
        "<p class=small>KL(source || model) in nats per token. ± is one standard error, by paired bootstrap over "
        "windows. Bits per weight: all bytes over all weights, quantized or not.</p>"
    )


def _runtimes(report: ValidationReport) -> str:
    rows = []
    for row in report.rows:
        found = report.comparison("IR", row.name)
        if found:
            rows.append(
                [
                    escape(row.name),
                    escape(f"{'FP32' if row.arithmetic == 'fp32' else row.arithmetic}: {row.arithmetic_reason}"),
                    number(found.max_abs_logit),
                    f"{found.logit_scale:.1f}",
                    with_error(found.kl_mean),
                    number(found.kl_max.value),
                    f"{differing(found)} of {found.top1.n:,}",
                    str(found.near_ties),
                ]
            )
    head = ["", "arithmetic", "max |d logit|", "largest |logit|", "KL: mean", "max", "top-1 differs", "near ties"]
    return table(head, rows, 2) if rows else ""


def _plots(report: ValidationReport) -> str:
    return no_plots() or f"<section>{figure_row(plots.plots(report))}</section>"


def _gates(gates: tuple[Gate, ...]) -> str:
    rows = [[_mark("pass" if g.passed else "FAIL"), escape(g.subject), escape(g.name), escape(g.detail)] for g in gates]
    return table(["", "file", "gate", "found"], rows)


def _tensor_differences(tensors: tuple[TensorComparison, ...]) -> str:
    rows = []
    for found in tensors:
        for d in found.differences[:_LISTED]:
            where = "" if d.index is None else f"{list(d.index)}: {d.expected!r} became {d.found!r}"
            rows.append([escape(found.file), escape(d.tensor), escape(d.problem), escape(where)])
        if len(found.differences) > _LISTED:
            rows.append([escape(found.file), f"and {len(found.differences) - _LISTED} more", "", ""])
    return table(["file", "tensor", "problem", "first index and values"], rows) if rows else ""


def _texts(report: ValidationReport) -> str:
    rows = [row for row in report.rows if row.token_ids]
    if not rows:
        return ""
    reference = next((row.token_ids for row in rows if row.name == "IR"), rows[0].token_ids)

    def same(row: ModelRow) -> str:
        if row.name == "IR":
            return ""
        shared = next(
            (i for i, (a, b) in enumerate(zip(row.token_ids, reference, strict=False)) if a != b), len(reference)
        )
        return "all tokens as IR" if shared == len(reference) else f"first {shared} tokens as IR"

    return "".join(
        f"<div class=text><h3>{escape(row.name)} <span>{same(row)}</span></h3><pre>{escape(row.text)}</pre></div>"
        for row in rows
    )


def _top_differences(comparisons: tuple[Comparison, ...]) -> str:
    rows = [
        [
            escape(f"{c.candidate} against {'the source' if c.reference == 'source' else c.reference}"),
            f"window {d.window}, token {d.position}",
            f"{d.reference} → {d.candidate}",
            number(d.gap),
            "near tie" if d.near_tie else "",
        ]
        for c in comparisons
        if c.reference == "IR"
        for d in c.differences[:_LISTED]
    ]
    return table(["", "where", "token ids", "gap of the reference's logits", ""], rows) if rows else ""


def _environment(report: ValidationReport) -> str:
    about = report.environment
    data = report.data
    lines = {
        "processor": f"{about['cpu']}, {about['threads']} of {about['cores']} cores",
        "system": f"{about['system']}, Python {about['python']}",
        "packages": ", ".join(f"{name} {number_}" for name, number_ in about["packages"].items()),
        "text": f"{data['text']}: {data['tokens']:,} tokens, {data['windows']} of {data['windows_available']} windows "
        f"of {data['window']} tokens, seed {data['seed']}, {data['resamples']} resamples"
        + ("" if data["leading_token"] is None else f"; token {data['leading_token']} leads each window"),
        "near tie": f"the reference's logits of the two tokens differ by less than {data['tie_tolerance']}",
        "time": f"{report.seconds:.0f} s in all; opening "
        + ", ".join(f"{row.name} {row.load_seconds:.1f} s" for row in report.rows),
        "schema": report.schema,
    }
    return definitions(lines)
