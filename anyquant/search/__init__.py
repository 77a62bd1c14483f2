"""Bits of matrices found by trials: a search that knows no models, and the trials of one."""

from __future__ import annotations

from anyquant.search.trials import require_searchable, search

__all__ = ["require_searchable", "search"]
