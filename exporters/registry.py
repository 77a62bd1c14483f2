"""The installed exporters."""

from __future__ import annotations

from typing import cast

from anyquant.exporters.protocol import Exporter
from anyquant.plugins import EXPORTERS, plugin


def get_exporter(name: str) -> Exporter:
    """The exporter of this name.

    Raises:
        UsageError: unknown or broken; names those that work.
    """
    return cast(Exporter, plugin(EXPORTERS, name))
