"""The report of an IR folder from beginning to end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyquant import ir
from anyquant.report.facts import SCHEMA, Facts, collect
from anyquant.reporting.as_json import to_text
from anyquant.reporting.words import number, size, with_error
from anyquant.reporting.writing import prepare, write_files
from anyquant.sweep.results import load_sweep

JSON_NAME, HTML_NAME = "report.json", "report.html"


@dataclass(frozen=True)
class ReportSettings:
    """What is reported.

    Attributes:
        model: the IR folder.
        output: folder for report.json and report.html.
        source: what it was made of (folder, hub id or .gguf file); without it there is no before.
        matrix: the one to show in detail; the one whose outputs lose most, unless given.
        sweep: a sweep.json of the same source.
        revision: of a hub source.
        trust_remote_code: for a source that brings its own code.
    """

    model: Path
    output: Path
    source: str | None = None
    matrix: str | None = None
    sweep: Path | None = None
    revision: str | None = None
    trust_remote_code: bool = False


def report(settings: ReportSettings, progress: ir.Progress | None = None) -> Facts:
    """Write report.json and report.html; what was there under these names is replaced.

    Args:
        settings: what to report.
        progress: called with (matrix, done, all) while matrices are read.

    Raises:
        UsageError: there is no such matrix, or a report of another kind would be replaced.
        InputError: the model, the source or the sweep cannot be used.
        MachineError: the report cannot be written.
    """
    from anyquant.report.html import to_html

    prepare(settings.output, JSON_NAME, SCHEMA)
    model = ir.open_ir(settings.model)
    sweep = load_sweep(settings.sweep) if settings.sweep else None
    source = None
    if settings.source is not None:
        from anyquant.checkpoint import open_checkpoint

        source = open_checkpoint(
            settings.source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    facts = collect(model, source, settings.matrix, sweep, progress)
    write_files(settings.output, {JSON_NAME: to_text(facts.to_json()), HTML_NAME: to_html(facts)})
    return facts


def report_text(facts: Facts, output: Path) -> str:
    """What the report says, in a few lines."""
    lost: dict[str, Any] = {"weights": facts.error, "outputs": facts.output_error}
    errors = ", ".join(f"of the {what} {with_error(error)}" for what, error in lost.items() if error)
    lines = [
        f"{facts.name}: {facts.model.quantized_bits:.4f} bits per weight in {len(facts.matrices):,} matrices, "
        f"{size(facts.nbytes)} in all",
        f"relative squared error {errors}; ± is one standard error over matrices",
    ]
    if facts.hardest:
        hard = facts.hardest[0]
        share = "" if hard.size is None else f", weights of {number(hard.size)} times the common size"
        lines.append(f"hardest: {facts.detail.word} {hard.index} of {hard.matrix}, {hard.bits} bits{share}")
    return "\n".join([*lines, *facts.notes, f"wrote {output / JSON_NAME} and {output / HTML_NAME}"])
