"""Writing a report: JSON for programs, HTML for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anyquant.errors import ValidationFailed
from anyquant.reporting.as_json import plain, to_text
from anyquant.reporting.writing import write_files
from anyquant.validation.results import ValidationReport

JSON_NAME, HTML_NAME = "report.json", "report.html"


def to_json(report: ValidationReport) -> dict[str, Any]:
    """The report as one JSON object, with the gates' verdict and the command line's exit code on top."""
    body: dict[str, Any] = plain(report)
    verdict = {"passed": not report.failed, "exit_code": ValidationFailed.exit_code if report.failed else 0}
    return {"schema": body.pop("schema"), **verdict, **body, "failed": plain(report.failed)}


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
