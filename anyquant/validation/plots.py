"""The report's plots as inline SVG."""

from __future__ import annotations

import numpy as np

from anyquant.reporting.figures import figure, svg
from anyquant.reporting.words import size
from anyquant.validation.gates import MAX_KL_FP32, MAX_KL_ROUNDED
from anyquant.validation.results import Comparison, ValidationReport

COLORS = {"source": "#64748b", "IR": "#2563eb", "GGUF": "#d97706", "ONNX": "#059669"}
_STYLES = {"IR": ("-", 4.5, 0.35), "GGUF": ("-", 1.6, 1.0), "ONNX": ("--", 1.6, 1.0)}
_FLOOR = 1e-15
"""A KL of zero, as it is drawn on a logarithmic axis."""


def plots(report: ValidationReport) -> dict[str, str]:
    """Title -> SVG element; empty plots are left out. Needs matplotlib."""
    to_source = [c for c in report.comparisons if c.reference == "source"]
    to_torch = [c for c in report.comparisons if c.reference == "IR"]
    found = {}
    if to_source:
        found["Distance to the source, token by token"] = _distribution(to_source, "KL(source || model) in nats")
    if to_torch:
        kinds = {row.name: row.arithmetic for row in report.rows}
        gated = [kinds.get(c.candidate) for c in to_torch if kinds.get(c.candidate) != "quantized"]
        limits = {MAX_KL_FP32 if kind == "fp32" else MAX_KL_ROUNDED for kind in gated}
        found["Distance to PyTorch on the same weights"] = _distribution(
            to_torch, "KL(PyTorch || runtime) in nats", limits
        )
    found["Size and perplexity"] = _sizes(report)
    return {title: drawn for title, drawn in found.items() if drawn}


def _distribution(comparisons: list[Comparison], label: str, limits: set[float] | None = None) -> str:
    """Share of tokens whose KL exceeds x."""
    drawn_on, axes = figure()
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
    return svg(drawn_on)


def _sizes(report: ValidationReport) -> str:
    """Perplexity with its 95 % interval over bytes."""
    rows = [row for row in report.rows if np.isfinite(row.perplexity.value) and row.nbytes > 0]
    if not rows:
        return ""
    drawn_on, axes = figure()
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
    return svg(drawn_on)
