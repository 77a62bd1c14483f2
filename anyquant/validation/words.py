"""Findings of a validation as text, the same in the terminal and in HTML."""

from __future__ import annotations

from anyquant.reporting.words import DASH
from anyquant.validation.results import Comparison, ModelRow, TensorComparison, ValidationReport


def tensors_of(report: ValidationReport, name: str) -> TensorComparison | None:
    """The tensor comparison of a row."""
    return next((found for found in report.tensors if found.file == name), None)


def tensors_text(found: TensorComparison | None) -> str:
    """ "272/272 equal"."""
    return DASH if found is None else f"{found.equal}/{found.total} equal"


def verdict(report: ValidationReport, row: ModelRow) -> str:
    """ "pass", "FAIL", or a dash where nothing was required of the row."""
    gates = [gate for gate in report.gates if gate.subject == row.name]
    if not gates:
        return DASH
    return "pass" if all(gate.passed for gate in gates) else "FAIL"


def differing(found: Comparison) -> int:
    """Tokens whose first choice differs, near ties included."""
    return round((1 - found.top1.value) * found.top1.n)
