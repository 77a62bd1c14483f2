"""The HTML that reports share: one self-contained page, no script, no external resource.

Whoever calls these functions has escaped what comes from outside, titles excepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from anyquant.reporting import figures
from anyquant.reporting.style import CSS


def page(title: str, heading: str, subtitle: str, body: str, *, aside: str = "", css: str = "") -> str:
    """A whole document.

    Args:
        title: of the browser's tab, unescaped.
        heading: of the page, unescaped.
        subtitle: HTML below it.
        body: HTML.
        aside: HTML to the right of the heading.
        css: rules beside the common ones.
    """
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{css}</style></head><body><main>"
        f"<header><div><h1>{escape(heading)}</h1><p>{subtitle}</p></div>{aside}"
        f"</header>{body}</main></body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A white box with a title; nothing where there is no body."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: int = 99) -> str:
    """A table of escaped cells; columns from ``numeric`` on are aligned right."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if column >= numeric else ''}>{value}</{tag}>"
            for column, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table></div>"


def card_row(found: Iterable[tuple[str, str, str]]) -> str:
    """Boxes side by side of (title, value, detail), unescaped."""
    return "<div class=cards>" + "".join(
        f"<div class=card><h3>{escape(title)}</h3><strong>{escape(value)}</strong><p>{escape(detail)}</p></div>"
        for title, value, detail in found
    ) + "</div>"  # fmt: skip


def definitions(lines: Mapping[str, str]) -> str:
    """Words and what they mean, unescaped."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in lines.items()) + "</dl>"


def figure_row(drawn: Mapping[str, str]) -> str:
    """Figures side by side, title -> SVG."""
    inside = "".join(f"<figure><figcaption>{escape(t)}</figcaption>{svg}</figure>" for t, svg in drawn.items())
    return f"<div class=plots>{inside}</div>"


def no_plots() -> str:
    """The section that stands for the plots where they cannot be drawn; nothing where they can."""
    if figures.available():
        return ""
    return section("Plots", "<p>Not drawn: matplotlib is not installed (pip install 'anyquant[report]').</p>")
