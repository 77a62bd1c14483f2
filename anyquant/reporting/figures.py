"""What all plots share: how figures look, and how they become SVG that can stand in a page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def plain(axes: Axes) -> None:
    """A light grid behind the data, no frame above and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)


def figure(width: float = 5.2, height: float = 3.3) -> tuple[Figure, Axes]:
    """A figure of one plot, in inches."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.add_subplot()
    plain(axes)
    return made, axes


def whole_numbers(axes: Axes) -> None:
    """No fractions on the x axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def label(text: str) -> str:
    """A text from outside that matplotlib shows as it is: no mathematics, no signs that its font lacks."""
    shown = text.encode("ascii", "replace").decode().replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def svg(made: Figure) -> str:
    """The figure without XML prologue, metadata and dates: the same numbers give the same text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "anyquant", "svg.fonttype": "path"}):
        made.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 xmlns="http://www.w3.org/2000/svg" '
                  r'xmlns:xlink="http://www.w3.org/1999/xlink">', text, count=1, flags=re.DOTALL)  # fmt: skip
