"""Putting the files of a report where they belong."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

from anyquant.errors import MachineError, UsageError


def prepare(folder: Path, json_name: str, schema: str) -> None:
    """Find out before all work whether a report can be written; nothing is made or left behind.

    Args:
        folder: of the report; need not be there.
        json_name: of its JSON file.
        schema: of its JSON file, "kind/version". One of the same kind may be replaced.

    Raises:
        UsageError: a file of this name, but of another kind, would be replaced.
        MachineError: the folder cannot be written.
    """
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        found = _schema(folder / json_name)
    except OSError as error:
        raise _cannot(folder, error) from None
    if found is not None and found.partition("/")[0] != schema.partition("/")[0]:
        raise UsageError(
            f"{folder / json_name} would be replaced, but is something else: its schema is {found!r:.60}, not "
            f"{schema!r}. Choose another folder, or remove the file."
        )


def _schema(path: Path) -> str | None:
    """What a JSON file says that it is, "" where it says nothing; None where there is no file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return ""
    return str(value.get("schema", "")) if isinstance(value, dict) else ""


def _cannot(folder: Path, error: OSError) -> MachineError:
    return MachineError(f"cannot write the report to {folder}: {error.strerror or error}")


def write_files(folder: Path, contents: Mapping[str, str]) -> None:
    """Write texts into a folder, each under a temporary name first; what was there under these names is replaced.

    Args:
        folder: made if it is not there.
        contents: file name -> text.

    Raises:
        MachineError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            temporary = folder / f".{name}.partial-{secrets.token_hex(8)}"
            try:
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(folder / name)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot(folder, error) from None
