"""Options of methods: defaults by profile, types, ranges, and what the command line writes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from anyquant.errors import UsageError
from anyquant.methods import get_method
from anyquant.methods.options import Option, complete, parse
from anyquant.plugins import METHODS, plugins

OPTIONS = (
    Option("width", 4, "of something", low=1, high=8, paper=3),
    Option("share", 0.5, "of something", low=0.0),
    Option("rule", "gain", "by which", choices=("gain", "norm"), paper="norm"),
    Option("refit", True, "whether"),
    Option("palette", "auto", "which"),
)


def test_profiles_fill_in_what_was_not_given() -> None:
    best = {"profile": "best", "width": 4, "share": 0.5, "rule": "gain", "refit": True, "palette": "auto"}
    assert complete("m", OPTIONS, {}) == best
    assert complete("m", OPTIONS, {"profile": "paper"}) == best | {"profile": "paper", "width": 3, "rule": "norm"}
    given = complete("m", OPTIONS, {"profile": "paper", "width": 8, "share": 2})
    assert given == best | {"profile": "paper", "width": 8, "rule": "norm", "share": 2.0}
    assert isinstance(given["share"], float)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"profile": "mine"}, "'mine', must be best or paper"),
        ({"with": 1}, "no option 'with'; it has width, share, rule, refit, palette"),
        ({"width": 9}, "width of the method m is 9, must be 1..8"),
        ({"width": 4.0}, "is 4.0, must be 1..8"),
        ({"width": True}, "is True, must be 1..8"),
        ({"width": "4"}, "is '4', must be 1..8"),
        ({"share": -0.1}, "is -0.1, must be a number of at least 0"),
        ({"share": float("nan")}, "is nan"),
        ({"rule": "loss"}, "'loss', must be gain or norm"),
        ({"refit": 1}, "is 1, must be yes or no"),
        ({"palette": 2}, "is 2, must be a word"),
    ],
)
def test_bad_values_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        complete("m", OPTIONS, given)
    assert words in str(caught.value)


IDLE = (
    Option("rule", "gain", "by which", choices=("gain", "norm"), paper="norm"),
    Option("exchange", 0.0, "how much", low=0.0, idle_with=("rule", "gain")),
    Option("feedback", True, "whether"),
    Option("damping", 0.01, "how much", low=0.0, idle_with=("feedback", False)),
)


def test_what_would_change_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="option exchange of the method m changes nothing with rule=gain"):
        complete("m", IDLE, {"exchange": 5.0})
    with pytest.raises(UsageError, match="option damping of the method m changes nothing with feedback=no"):
        complete("m", IDLE, {"feedback": False, "damping": 0.1})
    assert complete("m", IDLE, {"exchange": 5.0, "profile": "paper"})["exchange"] == 5.0
    assert complete("m", IDLE, {"exchange": 5.0, "rule": "norm"})["exchange"] == 5.0
    recorded = complete("m", IDLE, {"feedback": False})
    assert complete("m", IDLE, recorded) == recorded  # what is as it would be without, is no request


def test_texts_are_read_by_type() -> None:
    texts = ["width=3", "share=1", "rule=norm", "refit=no", "palette=2,4", "width=3"]
    assert parse("m", OPTIONS, texts) == {"width": 3, "share": 1.0, "rule": "norm", "refit": False, "palette": "2,4"}
    assert parse("m", OPTIONS, []) == {}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["width"], "--set width: write KEY=VALUE"),
        (["depth=3"], "an option of the method m: width, share"),
        (["width=three"], "is 'three', must be 1..8"),
        (["width=3.5"], "is '3.5', must be 1..8"),
        (["refit=1"], "is '1', must be yes or no"),
        (["width=3", "width=4"], "--set width is given twice, as 3 and as 4"),
        (["rule=loss"], "must be gain or norm"),
    ],
)
def test_bad_texts_are_refused(texts: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse("m", OPTIONS, texts)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", sorted(plugins(METHODS)))
@pytest.mark.parametrize("profile", ["best", "paper"])
@pytest.mark.parametrize("bits", [None, 2.3, 4.0])
def test_every_method_takes_its_own_settings_again(name: str, profile: str, bits: float | None) -> None:
    """What the IR records is JSON, and leads to the same settings."""
    method = get_method(name)
    settings = method.settings({"profile": profile}, bits)
    assert json.loads(json.dumps(settings)) == settings
    assert method.settings(settings, bits) == settings
    assert set(settings) == {"profile", *(option.name for option in method.options)}
