"""Methods and exporters are plug-ins: found through entry points, ours as well as anybody's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from anyquant.errors import UsageError

METHODS = "anyquant.methods"
EXPORTERS = "anyquant.exporters"


@dataclass(frozen=True)
class Plugin:
    """An installed plug-in; ``error`` says why it cannot be used ("" where it can)."""

    name: str
    package: str
    value: Any = None
    error: str = ""


def _load(point: EntryPoint) -> Plugin:
    package = point.dist.name if point.dist else point.value
    try:
        return Plugin(point.name, package, point.load()())
    except Exception as error:  # a broken plug-in must not take the others with it
        return Plugin(point.name, package, error=f"{type(error).__name__}: {error}")


@cache
def plugins(group: str) -> dict[str, Plugin]:
    """All plug-ins of a group by name, instantiated without arguments; a broken one carries its error."""
    return {point.name: _load(point) for point in sorted(entry_points(group=group), key=lambda p: p.name)}


def plugin(group: str, name: str) -> Any:
    """One plug-in.

    Raises:
        UsageError: unknown or broken; names those that work.
    """
    found = plugins(group).get(name)
    known = ", ".join(p.name for p in plugins(group).values() if not p.error) or "none"
    kind = group.rpartition(".")[2].removesuffix("s")
    if found is None:
        raise UsageError(f"there is no {kind} {name!r}. Installed: {known}.")
    if found.error:
        raise UsageError(f"the {kind} {name!r} of package {found.package} cannot be loaded: {found.error}")
    return found.value
