"""A sweep for people: a table for the terminal, plots and a page."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from anyquant.console import table as text_table
from anyquant.reporting.as_json import to_text
from anyquant.reporting.estimate import Estimate
from anyquant.reporting.figures import figure, label, svg
from anyquant.reporting.markup import card_row, definitions, figure_row, no_plots, page, section, table
from anyquant.reporting.words import DASH, if_known, number, size, with_error, words
from anyquant.reporting.writing import prepare, write_files
from anyquant.sweep.results import SCHEMA, Point, Sweep

JSON_NAME, HTML_NAME = "sweep.json", "sweep.html"
COLORS = {"model": "#2563eb", "matrix": "#d97706", "uniform": "#64748b"}
MARK = "#be123c"
_ALLOCATIONS = {
    "model": "bits spread over the model",
    "matrix": "bits spread inside each matrix",
    "uniform": "the same bits everywhere",
}


def prepare_sweep(folder: Path) -> None:
    """Find out before the sweep whether :func:`write_sweep` can write there.

    Raises:
        UsageError: a sweep.json of another kind would be replaced.
        MachineError: the folder cannot be written.
    """
    prepare(folder, JSON_NAME, SCHEMA)


def write_sweep(found: Sweep, folder: Path) -> None:
    """Write sweep.json and sweep.html.

    Raises:
        MachineError: the folder cannot be written.
    """
    write_files(folder, {JSON_NAME: to_text(found.to_json()), HTML_NAME: sweep_page(found)})


def target_text(point: Point, found: Sweep) -> str:
    """What was asked for: "3.25", "75,000,000 B"; with the allocation where the sweep has several."""
    bits, nbytes = point.target.get("bits"), point.target.get("size")
    asked = f"{bits:g}" if isinstance(bits, int | float) else f"{nbytes:,} B" if isinstance(nbytes, int) else "?"
    several = len({_allocation(other) for other in found.points}) > 1
    return f"{asked} {_allocation(point)}" if several else asked


def _allocation(point: Point) -> str:
    return str(point.target.get("allocation", "model"))


def _interval(found: Estimate | None) -> str:
    if found is None or found.low is None or found.high is None:
        return DASH
    return f"{number(found.low)}..{number(found.high)}"


def sweep_text(found: Sweep) -> str:
    """The sweep as a table of 80 columns, what could not be met below it."""
    head = ["target", "bits", "size", "loss", "KL", "95 %", "ppl", "top-1 %"]
    rows = []
    for point in found.points:
        known = [] if point.problem else [
            f"{point.bits:.3f}",
            size(point.nbytes or 0),
            DASH if point.loss is None else number(point.loss),
            number(point.kl.value) if point.kl else DASH,
            _interval(point.kl),
            number(point.perplexity.value) if point.perplexity else DASH,
            number(100 * point.top1.value) if point.top1 else DASH,
        ]  # fmt: skip
        rows.append([target_text(point, found), *(known or [DASH] * 7)])
    used = [column for column in range(len(head)) if any(row[column] != DASH for row in rows)]
    lines = [text_table([head[c] for c in used], [[row[c] for c in used] for row in rows])]
    if found.data:
        lines.append(f"{about(found)}; KL in nats per token, with its 95 % interval")
    perplexity = found.model.get("perplexity")
    if isinstance(perplexity, Estimate):
        lines.append(f"source: {size(found.model['bytes'])}, perplexity {with_error(perplexity)} (one standard error)")
    return "\n".join([*lines, *problems(found)])


def problems(found: Sweep) -> list[str]:
    """Which targets could not be met, and why."""
    return [f"{target_text(point, found)}: {point.problem}" for point in found.points if point.problem]


def about(found: Sweep) -> str:
    """What was measured on."""
    data = found.data
    return f"{data['windows']} windows of {data['window']} tokens of {data['text']}" if data else "nothing was measured"


def sweep_plots(found: Sweep, mark: int | None = None) -> dict[str, str]:
    """Title -> SVG element: KL and perplexity over bytes where they were measured, and the predicted loss.

    Args:
        found: the sweep.
        mark: bytes of a model that is to be shown among the points.
    """
    points = found.found
    drawn = {}
    if any(point.kl and np.isfinite(point.kl.value) for point in points):
        drawn["Size and distance to the source"] = _plot(points, "kl", "KL(source || model) in nats, 95 %", mark)
        source = found.model.get("perplexity")
        level = source.value if isinstance(source, Estimate) else None
        drawn["Size and perplexity"] = _plot(points, "perplexity", "perplexity, 95 %", mark, level)
    if any(point.loss for point in points):
        drawn["Size and predicted loss"] = _plot(points, "loss", _loss_title(found), mark)
    return drawn


def _loss_title(found: Sweep) -> str:
    return "expected rise of the loss in nats" if found.loss_unit == "nats" else "mean relative squared error"


def _plot(points: list[Point], key: str, title: str, mark: int | None, level: float | None = None) -> str:
    """Something over bytes, a line for each allocation, on a logarithmic axis."""
    drawn_on, axes = figure()
    allocations = list(dict.fromkeys(map(_allocation, points)))
    for allocation in allocations:
        own = [point for point in points if _allocation(point) == allocation]
        values = [(point, value) for point in own if (value := _estimate(point, key)) and 0 < value.value < np.inf]
        if not values:
            continue
        y = np.array([value.value for _, value in values])
        low, high = (
            np.array([edge if (edge := getattr(value, end)) is not None else value.value for _, value in values])
            for end in ("low", "high")
        )
        axes.errorbar(
            [(point.nbytes or 0) / 1e6 for point, _ in values],
            y,
            # The interval need not hold the value where windows are few.
            np.maximum([y - low, high - y], 0),
            fmt="o-",
            markersize=4,
            linewidth=1.2,
            capsize=3,
            color=COLORS.get(allocation, "#0f172a"),
            label=label(_ALLOCATIONS.get(allocation, allocation)),
        )
        for (point, _), top in zip(values, high, strict=True):
            axes.annotate(
                f"{point.bits:.3g}", ((point.nbytes or 0) / 1e6, top), (0, 4), textcoords="offset points",
                fontsize=7, color="#64748b", ha="center",
            )  # fmt: skip
    if level is not None:
        axes.axhline(level, color="#64748b", linewidth=1, linestyle="--", label="source")
    if mark is not None:
        axes.axvline(mark / 1e6, color=MARK, linewidth=1, linestyle=":", label="this model")
    axes.set(yscale="log", xlabel="bytes of the model (MB); bits per weight at the points", ylabel=title)
    if len(allocations) > 1 or level is not None or mark is not None:
        axes.legend(frameon=False, fontsize=8)
    return svg(drawn_on)


def _estimate(point: Point, key: str) -> Estimate | None:
    found = getattr(point, key)
    return Estimate(found, 1) if isinstance(found, int | float) else found


def sweep_table(found: Sweep) -> str:
    """The points as an HTML table, and what could not be met."""
    head = ["target", "bits per weight", "size", "predicted loss", "KL to source", "95 %", "perplexity", "change"]
    rows = []
    for point in found.points:
        known = [] if point.problem else [
            f"{point.bits:.4f}",
            f"{point.nbytes:,}",
            DASH if point.loss is None else number(point.loss),
            if_known(point.kl),
            _interval(point.kl),
            if_known(point.perplexity),
            if_known(point.perplexity_change),
            if_known(point.top1, 100),
        ]  # fmt: skip
        rows.append([escape(target_text(point, found)), *(known or [DASH] * 8)])
    note = (
        "<p class=small>KL(source || model) in nats per token. ± is one standard error, by bootstrap over windows; the "
        "change of the perplexity is paired. Size: exact bytes of the IR folder, tokenizer not counted. Predicted: the "
        f"{_loss_title(found)}, by the tables that bits are spread by.</p>"
    )
    missed = "".join(f"<p class=small>{escape(problem)}</p>" for problem in problems(found))
    return table([*head, "top-1 %"], rows, 1) + missed + note


def sweep_page(found: Sweep) -> str:
    """The whole page."""
    drawn = no_plots() or section("Size against loss", figure_row(sweep_plots(found)))
    notes = "".join(f"<p>{escape(note)}</p>" for note in found.notes)
    body = [
        _cards(found),
        drawn,
        section("Targets", sweep_table(found)),
        section("Notes", notes),
        section("How this was measured", definitions(_details(found))),
    ]
    name = str(found.model.get("name", ""))
    subtitle = escape(f"method {found.method} · {len(found.points)} targets · {about(found)}")
    return page(f"{name}: sweep", name, subtitle, "".join(body))


def _cards(found: Sweep) -> str:
    points = found.found
    cards = [("source", size(int(found.model.get("bytes", 0))), "bytes of its tensors")]
    perplexity = found.model.get("perplexity")
    if isinstance(perplexity, Estimate):
        cards.append(("perplexity of the source", number(perplexity.value, 4), with_error(perplexity)))
    for title, point in (("smallest", points[0]), ("largest", points[-1])) if points else ():
        detail = f"KL {with_error(point.kl)}" if point.kl else f"{size(point.nbytes or 0)}"
        cards.append((f"{title}: {point.bits:.2f} bits", size(point.nbytes or 0), detail))
    return card_row(cards)


def _details(found: Sweep) -> dict[str, str]:
    machine = found.environment
    return {
        "source": f"{found.model.get('name')}, fingerprint {found.model.get('fingerprint')}",
        "settings": words(found.settings),
        "calibration": words(found.calibration) if found.calibration else "none",
        "text": words(found.data) if found.data else "none",
        "processor": f"{machine.get('cpu')}, {machine.get('threads')} of {machine.get('cores')} cores",
        "packages": words(machine.get("packages") or {}, " "),
        "time": f"{found.seconds:.0f} s",
        "schema": found.schema,
    }
