"""Print the rows of several validations beside each other.

python tools/beside.py NAME=REPORT ...      REPORT: a folder that `anyquant validate --report` wrote
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from anyquant.console import table
from anyquant.reporting.estimate import Estimate
from anyquant.reporting.words import DASH, size, with_error


def rows_of(name: str, report: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line of the table for each model of a report; the source once, without the report's name."""
    quality = {c["candidate"]: c for c in report["comparisons"] if c["reference"] == "source"}
    lines: list[tuple[str, ...]] = []
    for row in report["rows"]:
        found = quality.get(row["name"])
        lines.append(
            (
                row["name"] if row["name"] == "source" else f"{name} {row['name']}",
                f"{report['model']['quantized_bits']:.2f}" if row["name"] != "source" else DASH,
                size(row["nbytes"]),
                with_error(Estimate(**row["perplexity"])),
                with_error(Estimate(**found["kl_mean"])) if found else DASH,
                with_error(Estimate(**found["top1"]), 100) if found else DASH,
            )
        )
    return lines


def main(arguments: list[str]) -> int:
    """Read the reports and print the table."""
    lines: dict[str, tuple[str, ...]] = {}
    for argument in arguments:
        name, _, folder = argument.partition("=")
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        for line in rows_of(name, report):
            lines.setdefault(line[0], line)
    print(table(("", "bits", "size", "perplexity", "KL to source", "top-1 %"), list(lines.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
