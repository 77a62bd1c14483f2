"""The options of a method: what there is to set, what it is unless it is set, and what the paper has.

A method declares its options as data, so that one piece of code checks them, reads them from the command line
(``--set KEY=VALUE``) and lists them (``anyquant methods NAME``). Two profiles give values to what was not set:
``best``, what measured best, and ``paper``, what the method's paper says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anyquant.errors import UsageError

PROFILES = ("best", "paper")
_SAME = object()
_TYPES = {bool: "yes or no", int: "an integer", float: "a number", str: "a word"}


@dataclass(frozen=True)
class Option:
    """One setting of a method.

    Attributes:
        name: key in the settings that the IR records.
        default: what measured best; its type is the option's.
        help: half a sentence.
        choices: all values, where they are few.
        low: least value of a number.
        high: greatest value of a number.
        paper: value with the profile ``paper``, where that differs.
        idle_with: (name, value) of another option, with which this one changes nothing.
    """

    name: str
    default: bool | int | float | str
    help: str
    choices: tuple[bool | int | float | str, ...] = ()
    low: float | None = None
    high: float | None = None
    paper: Any = _SAME
    idle_with: tuple[str, Any] | None = None

    def value(self, profile: str) -> Any:
        """The value with a profile."""
        return self.default if profile == "best" or self.paper is _SAME else self.paper

    def check(self, method: str, value: Any) -> Any:
        """The value in the option's type.

        Raises:
            UsageError: another type, none of the choices, or out of range.
        """
        wanted = type(self.default)
        if wanted is float and type(value) is int:
            value = float(value)
        ok = type(value) is wanted and (not self.choices or value in self.choices)
        if not (ok and (self.low is None or value >= self.low) and (self.high is None or value <= self.high)):
            raise UsageError(f"the option {self.name} of the method {method} is {value!r}, must be {self.allowed()}.")
        return value

    def allowed(self) -> str:
        """Which values there are, in words."""
        if self.choices:
            *some, last = map(str, self.choices)
            between = "; " if any("," in choice for choice in (*some, last)) else ", "
            return f"{between.join(some)} or {last}" if some else last
        if self.low is not None and self.high is not None:
            return f"{self.low:g}..{self.high:g}"
        return _TYPES[type(self.default)] + (f" of at least {self.low:g}" if self.low is not None else "")

    def parse(self, method: str, text: str) -> Any:
        """The value that a text stands for.

        Raises:
            UsageError: it stands for none.
        """
        wanted = type(self.default)
        if wanted is str:
            return self.check(method, text)
        try:
            value = {"yes": True, "no": False}[text.lower()] if wanted is bool else wanted(text)
        except (KeyError, ValueError):
            raise UsageError(
                f"the option {self.name} of the method {method} is {text!r}, must be {self.allowed()}."
            ) from None
        return self.check(method, value)


def complete(method: str, options: Sequence[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a method: those given, and for the others what their profile has.

    Args:
        method: its name, for messages.
        options: what there is.
        given: name -> value; "profile", one of PROFILES, may be among them.

    Raises:
        UsageError: an option that the method does not have, a value that it cannot have, or one that would change
            nothing.
    """
    profile = given.get("profile", "best")
    if profile not in PROFILES:
        raise UsageError(f"--profile is {profile!r}, must be {' or '.join(PROFILES)}.")
    by_name = {option.name: option for option in options}
    unknown = sorted(set(given) - set(by_name) - {"profile"})
    if unknown:
        known = ", ".join(by_name) or "none"
        raise UsageError(f"the method {method} has no option {unknown[0]!r}; it has {known}.")
    settings = {name: option.check(method, given.get(name, option.value(profile))) for name, option in by_name.items()}
    for name, option in by_name.items():
        if name in given and option.idle_with and settings[name] != option.value(profile):
            other, value = option.idle_with
            if settings[other] == value:
                shown = ("no", "yes")[value] if isinstance(value, bool) else value
                raise UsageError(f"the option {name} of the method {method} changes nothing with {other}={shown}.")
    return {"profile": profile, **settings}


def parse(method: str, options: Sequence[Option], texts: Sequence[str]) -> dict[str, Any]:
    """Values of the texts KEY=VALUE.

    Raises:
        UsageError: no "=", an option that the method does not have, or one given twice with several values.
    """
    by_name = {option.name: option for option in options}
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in by_name:
            known = ", ".join(by_name) or "none"
            raise UsageError(f"--set {text}: write KEY=VALUE with an option of the method {method}: {known}.")
        parsed = by_name[name].parse(method, value)
        if found.setdefault(name, parsed) != parsed:
            raise UsageError(f"--set {name} is given twice, as {found[name]} and as {parsed}.")
    return found
