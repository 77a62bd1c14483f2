"""Quantization methods: each turns one matrix into one tensor of the intermediate representation."""

from __future__ import annotations

from typing import cast

from anyquant.methods.protocol import LevelArray, Levels, Method
from anyquant.plugins import METHODS, plugin

__all__ = ["LevelArray", "Levels", "Method", "get_method"]


def get_method(name: str) -> Method:
    """The installed method of this name.

    Raises:
        UsageError: unknown or broken; names those that work.
    """
    return cast(Method, plugin(METHODS, name))
