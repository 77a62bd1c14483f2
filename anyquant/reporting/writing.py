"""Putting the files of a report where they belong."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from anyquant.errors import MachineError


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
        raise MachineError(f"cannot write the report to {folder}: {error.strerror or error}") from None
