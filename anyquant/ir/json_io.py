"""JSON from files that anyone may have written: bounded, without duplicate keys, and safe to write again."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from anyquant.errors import CorruptFileError, InputError

_MAX_BYTES = 64 << 20  # 200,000 tensors; what JSON expands to in memory is many times as large
_MAX_DEPTH = 64


@lru_cache(1 << 16)  # a search for a size asks for the same names hundreds of times
def quoted(text: str) -> str:
    """A string as JSON, in ASCII."""
    return json.dumps(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.80} occurs twice in one object")
        found[key] = value
    return found


def check_tree(value: Any, *, finite: bool) -> None:
    """Check that a parsed value can be written and read again: depth, strings, numbers.

    Args:
        value: what the parser gave.
        finite: whether Infinity and NaN, which are Python's extension to JSON, are refused.

    Raises:
        ValueError: says what is wrong.
    """
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.keys()
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                item.encode()  # half a surrogate pair is a ValueError
            elif finite and isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"{item} is not a JSON number")
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")


def read_json(path: Path, *, finite: bool = False) -> dict[str, Any]:
    """A JSON object from a regular file of bounded size.

    Raises:
        InputError: the file is missing or cannot be read.
        CorruptFileError: it is not a JSON object, or one that cannot be written again.
    """
    try:
        if not path.exists():
            raise InputError(f"{path.name} is missing in {path.parent}")
        if not path.is_file():
            raise CorruptFileError(f"{path.name} in {path.parent} is not a regular file")
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise CorruptFileError(
                f"{path.name} in {path.parent} has {size:,} bytes; no model needs more than {_MAX_BYTES:,}"
            )
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path.name} in {path.parent}: {error.strerror or error}") from None
    try:
        value = json.loads(text, object_pairs_hook=_object)
        check_tree(value, finite=finite)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path.name} in {path.parent} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path.name} in {path.parent} holds a {type(value).__name__}, not a JSON object")
    return value
