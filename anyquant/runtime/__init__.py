"""Running an IR folder in torch."""

from __future__ import annotations

from anyquant.runtime.model import load

__all__ = ["load"]
