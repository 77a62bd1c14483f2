"""Writing a report: JSON for programs, HTML for people."""

from __future__ import annotations

import dataclasses
import json
import math
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from anyquant.errors import ValidationFailed
from anyquant.report.writing import write_files
from anyquant.validation.results import ValidationReport

JSON_NAME, HTML_NAME = "report.json", "report.html"


def plain(value: Any) -> Any:
    """Dataclasses, tuples and NumPy numbers as what JSON knows; NaN and infinity become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.metadata.get("json", True)]
        return {name: plain(getattr(value, name)) for name in fields}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else None
    return str(value)


def to_json(report: ValidationReport) -> dict[str, Any]:
    """The report as one JSON object, with the gates' verdict and the command line's exit code on top."""
    body: dict[str, Any] = plain(report)
    verdict = {"passed": not report.failed, "exit_code": ValidationFailed.exit_code if report.failed else 0}
    return {"schema": body.pop("schema"), **verdict, **body, "failed": plain(report.failed)}


def to_text(value: dict[str, Any]) -> str:
    """A JSON object as the text of a file."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_report(report: ValidationReport, folder: Path) -> tuple[Path, Path]:
    """Write report.json and report.html; each under a temporary name first.

    Returns:
        Their paths.

    Raises:
        MachineError: the folder cannot be written.
    """
    from anyquant.validation.html import to_html

    contents = {
        JSON_NAME: to_text(to_json(report)),
        HTML_NAME: to_html(report),
    }
    write_files(folder, contents)
    return folder / JSON_NAME, folder / HTML_NAME
