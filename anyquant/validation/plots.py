"""The report's plots as inline SVG."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import numpy as np

from anyquant.validation.gates import MAX_KL_FP32, MAX_KL_ROUNDED
from anyquant.validation.results import Comparison, ValidationReport
from anyquant.validation.words import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"source": "#64748b", "IR": "#2563eb", "GGUF": "#d97706", "ONNX": "#059669"}
_STYLES = {"IR": ("-", 4.5, 0.35), "GGUF": ("-", 1.6, 1.0), "ONNX": ("--", 1.6, 1.0)}
_FLOOR = 1e-15
"""A KL of zero, as it is drawn on a logarithmic axis."""


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def plots(report: ValidationReport) -> dict[str, str]:
    """Title -> SVG element; empty plots are left out. Needs matplotlib."""
    to_source = [c for c in report.comparisons if c.reference == "source"]
    to_torch = [c for c in report.comparisons if c.reference == "IR"]
    found = {}
    if to_source:
        found["Distance to the source, token by token"] = _distribution(to_source, "KL(source || model) in nats")
    if to_torch:
        kinds = {row.name: row.arithmetic for row in report.rows}
        limits = {MAX_KL_FP32 if kinds.get(c.candidate) == "fp32" else MAX_KL_ROUNDED for c in to_torch}
        found["Distance to PyTorch on the same weights"] = _distribution(
            to_torch, "KL(PyTorch || runtime) in nats", limits
        )
    found["Size and perplexity"] = _sizes(report)
    return {title: svg for title, svg in found.items() if svg}


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure without XML prologue, metadata and dates: the same numbers give the same text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "anyquant", "svg.fonttype": "path"}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 xmlns="http://www.w3.org/2000/svg" '
                  r'xmlns:xlink="http://www.w3.org/1999/xlink">', text, count=1, flags=re.DOTALL)  # fmt: skip


def _distribution(comparisons: list[Comparison], label: str, limits: set[float] | None = None) -> str:
    """Share of tokens whose KL exceeds x."""
    figure, axes = _figure()
    drawn = False
    for comparison in comparisons:
        values = np.asarray(comparison.kl_per_token, dtype=np.float64)
        values = np.sort(np.maximum(values[np.isfinite(values)], _FLOOR))
        if not len(values):
            continue
        drawn = True
        style, width, alpha = _STYLES.get(comparison.candidate, ("-", 1.6, 1.0))
        share = 1 - np.arange(len(values)) / len(values)
        axes.step(
            values,
            share,
            where="post",
            label=f"{comparison.candidate} (mean {comparison.kl_mean.value:.2g})",
            color=COLORS.get(comparison.candidate, "#0f172a"),
            linestyle=style,
            linewidth=width,
            alpha=alpha,
        )
    for limit in sorted(limits or ()):
        axes.axvline(limit, color="#dc2626", linewidth=1, linestyle=":")
        axes.text(limit, 0.8, f"gate {limit:g} ", color="#dc2626", fontsize=8, va="top", ha="right", rotation=90)
    if not drawn:
        return ""
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="share of tokens above")
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    return _svg(figure)


def _sizes(report: ValidationReport) -> str:
    """Perplexity with its 95 % interval over bytes."""
    rows = [row for row in report.rows if np.isfinite(row.perplexity.value) and row.nbytes > 0]
    if not rows:
        return ""
    figure, axes = _figure()
    for row in rows:
        value = row.perplexity
        error: np.ndarray | None = None
        if value.low is not None and value.high is not None:
            # The interval need not hold the value where windows are few.
            error = np.maximum([[value.value - value.low], [value.high - value.value]], 0)
        axes.errorbar(
            row.nbytes / 1e6,
            value.value,
            error,
            fmt="o",
            markersize=8,
            capsize=4,
            color=COLORS.get(row.name, "#0f172a"),
            label=f"{row.name}, {size(row.nbytes)}",
        )
    axes.set(xlabel="bytes on disk (MB)", ylabel="perplexity, 95 % interval")
    axes.set_xlim(0, max(row.nbytes for row in rows) / 1e6 * 1.12)
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure)
