"""Texts from outside in plots, and plots as text."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from anyquant.reporting.figures import figure, label, svg


@pytest.mark.parametrize("text", ["q_proj", "_hidden", "$\\frac{", "a$b$", "\u6f22\u5b57 \U0001f600", "<b>&\"'"])
def test_any_text_can_be_drawn(text: str) -> None:
    """As title, and in the legend, which leaves out what begins with an underscore."""
    pytest.importorskip("matplotlib")
    made, axes = figure()
    axes.plot([1, 2], label=label(text))
    axes.set_title(label(text))
    legend = axes.legend()
    assert len(legend.get_texts()) == 1
    drawn = svg(made)
    ElementTree.fromstring(drawn)
    assert drawn.startswith("<svg viewBox=")


def test_plain_names_stay_as_they_are() -> None:
    assert label("mlp.gate_proj") == "mlp.gate_proj"
    assert label("$x$") == r"\$x\$"
    assert label("_x") == " _x"


def test_the_same_figure_gives_the_same_text() -> None:
    pytest.importorskip("matplotlib")
    texts = []
    for _ in range(2):
        made, axes = figure()
        axes.stairs([1, 3, 2], fill=True)
        texts.append(svg(made))
    assert texts[0] == texts[1]
