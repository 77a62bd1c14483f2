"""The plots of a quantization as inline SVG. They need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from anyquant.report.detail import Detail, Unit, by_width
from anyquant.report.matrices import WIDTHS, Kind, Matrix, by_kind, by_layer, unit_of
from anyquant.reporting.estimate import Estimate
from anyquant.reporting.figures import figure, label, svg, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# 0 to 8 bits: grey, then from light to dark.
WIDTH_COLORS = ("#cbd5e1", "#fde725", "#a0da39", "#4ac16d", "#1fa187", "#277f8e", "#365c8d", "#46327e", "#440154")
KIND_COLORS = (
    "#2563eb", "#d97706", "#059669", "#be123c", "#7c3aed", "#0891b2", "#0f172a", "#db2777", "#84cc16", "#92400e",
)  # fmt: skip
MOST_KINDS = 10
_BEFORE, _AFTER = "#94a3b8", "#2563eb"
TICKS = 300  # values of a row that can still be told apart


def layered(found: Sequence[Matrix]) -> list[Kind]:
    """The kinds that can be drawn over layers: the largest of those that have some."""
    kinds = [kind for kind in by_kind(found) if by_layer(kind)]
    largest = sorted(kinds, key=lambda kind: -kind.numel)[:MOST_KINDS]
    return [kind for kind in kinds if kind in largest]


def rows_by_layer(found: Sequence[Matrix]) -> str:
    """Of each kind of matrix the shares of rows with 0 to 8 bits, over the layers; empty where nothing is shared."""
    kinds = layered(found)
    if not any(part.widths.sum() > 1 for kind in kinds for part in by_layer(kind).values()):
        return ""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    made = Figure(figsize=(11.4 if columns > 2 else 5.7 * columns, 0.5 + 1.9 * lines), layout="constrained")
    grid = made.subplots(lines, columns, sharey=True, squeeze=False)
    used = np.zeros(len(WIDTHS), np.int64)
    for axes, kind in zip(grid.flat, kinds, strict=False):
        used += kind.widths
        _stack(axes, by_layer(kind))
        axes.set_title(label(kind.name), fontsize=9)
    for axes in grid.flat[len(kinds) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel(f"% of {unit_of(found)}", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("layer", fontsize=8)
    patches = [Patch(color=WIDTH_COLORS[w], label=f"{w} bit{'s' * (w != 1)}") for w in WIDTHS if used[w]]
    made.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8)
    return svg(made)


def _stack(axes: Axes, layers: Mapping[int, Kind]) -> None:
    first, last = min(layers), max(layers)
    edges = np.arange(first, last + 2) - 0.5
    share = np.zeros((len(WIDTHS), last + 1 - first))
    for layer, kind in layers.items():
        share[:, layer - first] = 100 * kind.widths / kind.widths.sum()
    top = np.cumsum(share, axis=0)
    for width in WIDTHS:
        if share[width].any():
            axes.stairs(top[width], edges, baseline=top[width] - share[width], fill=True, color=WIDTH_COLORS[width])
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 100))
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    whole_numbers(axes)


def bits_heat(found: Sequence[Matrix]) -> str:
    """Stored bits per weight, kinds over layers; empty where no matrix belongs to a layer."""
    kinds = layered(found)
    if not kinds:
        return ""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

    cells = [by_layer(kind) for kind in kinds]
    first, last = min(min(c) for c in cells), max(max(c) for c in cells)
    values = np.full((len(kinds), last + 1 - first), np.nan)
    for row, layers in enumerate(cells):
        for layer, kind in layers.items():
            values[row, layer - first] = kind.bits
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    levels = MaxNLocator(14).tick_values(low, max(high, low + 0.01))
    colors = colormaps["viridis_r"]
    made, axes = figure(5.6, 0.9 + 0.28 * len(kinds))
    axes.grid(False)
    mesh = axes.pcolormesh(
        np.arange(first, last + 2) - 0.5,
        np.arange(len(kinds) + 1),
        np.ma.masked_invalid(values),
        cmap=colors,
        norm=BoundaryNorm(levels, colors.N),
        edgecolors="white",
        linewidth=0.4,
    )
    axes.set_yticks(np.arange(len(kinds)) + 0.5, [label(kind.name) for kind in kinds], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("layer")
    whole_numbers(axes)
    made.colorbar(mesh, ax=axes).ax.tick_params(labelsize=7)
    return svg(made)


def error_by_layer(found: Sequence[Matrix], key: str) -> str:
    """An error of each kind over the layers, on a logarithmic axis; empty where none is known.

    Args:
        found: matrices.
        key: "error" or "output_error".
    """
    made, axes = figure(5.6, 3.7)
    drawn = False
    for place, kind in enumerate(layered(found)):
        known = {layer: getattr(part, key) for layer, part in by_layer(kind).items()}
        points = {layer: value for layer, value in known.items() if isinstance(value, Estimate) and value.value > 0}
        if not points:
            continue
        drawn = True
        axes.errorbar(
            list(points),
            [value.value for value in points.values()],
            [value.error or 0.0 for value in points.values()],
            fmt="o-",
            markersize=3,
            linewidth=0.8,
            alpha=0.85,
            color=KIND_COLORS[place % len(KIND_COLORS)],
            label=label(kind.name),
        )
    if not drawn:
        return ""
    axes.set(yscale="log", xlabel="layer", ylabel="relative squared error")
    whole_numbers(axes)
    made.legend(loc="outside lower center", frameon=False, fontsize=7, ncols=5)
    return svg(made)


def distribution(found: Detail) -> str:
    """The weights of a matrix before and after."""
    made, axes = figure()
    if found.before is not None:
        axes.stairs(found.before, found.edges, fill=True, color=_BEFORE, alpha=0.55, label="before")
    axes.stairs(found.after, found.edges, color=_AFTER, linewidth=1.1, label="after")
    axes.set(yscale="log", xlabel="weight", ylabel="weights in a bin")
    axes.set_ylim(bottom=0.7)
    axes.legend(frameon=False, fontsize=8)
    return svg(made)


def unit_values(unit: Unit) -> str:
    """A row's weights, and the values that they became; of many values as many as can be told apart."""
    made, axes = figure()
    count = len(unit.values)
    after = f"{count:,} values after"
    shown = np.linspace(0, count - 1, min(count, TICKS)).round().astype(np.int64)
    values = unit.values[shown]
    if unit.before is not None:
        axes.stairs(unit.before, unit.edges, fill=True, color=_BEFORE, alpha=0.55, label="weights before")
        top = float(unit.before.max())
        axes.vlines(values, -0.06 * top, -0.01 * top, color=_AFTER, linewidth=0.9, label=after)
        axes.vlines(values, 0, top, color=_AFTER, linewidth=0.4, alpha=0.45)
        axes.set_ylabel("weights in a bin")
    else:
        axes.vlines(values, 0, unit.counts[shown], color=_AFTER, linewidth=1.1, label=after)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("weights with this value")
    axes.set_xlabel("weight")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return svg(made)


def size_by_width(found: Detail) -> str:
    """How large the weights are in rows of each width; empty where all have one width or the source is unknown."""
    groups = by_width(found)
    if len(groups) < 2:
        return ""
    made, axes = figure()
    for group in groups:
        x, (least, low, middle, high, most) = group["bits"], group["rms"]
        color = WIDTH_COLORS[x]
        axes.vlines(x, least, most, color=_BEFORE, linewidth=1)
        axes.vlines(x, low, high, color=color, linewidth=9)
        axes.plot(x, middle, "o", color="white", markeredgecolor="#0f172a", markersize=4)
        axes.annotate(f"{group['units']:,}", (x, most), (0, 3), textcoords="offset points", fontsize=7, ha="center")
    axes.set(xlabel="bits", ylabel=f"root mean square of a {found.word}'s weights")
    whole_numbers(axes)
    return svg(made)
