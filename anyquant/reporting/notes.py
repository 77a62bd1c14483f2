"""Notes that several reports make."""

from __future__ import annotations

from anyquant import ir
from anyquant.checkpoint import Checkpoint


def another_source(model: ir.Model, source: Checkpoint) -> list[str]:
    """A note where the source is not what an IR folder was made of; nothing where it is, or where that is unknown."""
    recorded = model.source.get("fingerprint")
    if not recorded or source.fingerprint() == recorded:
        return []
    return [
        f"The source {source.name} is not the one this was made of ({model.source.get('name', 'unknown')}): "
        "fingerprints differ."
    ]
