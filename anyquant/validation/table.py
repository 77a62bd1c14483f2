"""A report for a terminal of 80 columns."""

from __future__ import annotations

import io

from anyquant.reporting.words import DASH, number, size, with_error
from anyquant.validation.results import ValidationReport
from anyquant.validation.words import differing, tensors_of, verdict

WIDTH = 80


def format_table(report: ValidationReport, *, color: bool = False, width: int = WIDTH) -> str:
    """The report as text: rows, closeness of the runtimes to PyTorch, answers, number of gates passed, notes.

    Which gates failed is told by :meth:`ValidationReport.require`.

    Args:
        report: the findings.
        color: with ANSI colours.
        width: columns of the terminal.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    buffer = io.StringIO()
    console = Console(
        file=buffer, width=width, force_terminal=color, color_system="standard" if color else None, highlight=False
    )
    data = report.data
    console.print(
        f"[bold]{escape(str(report.model['name']))}[/]: {data['windows']} windows of {data['window']} tokens of "
        f"{escape(str(data['text']))}; ± is one standard error"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("", "size", "bits", "perplexity", "KL to source", "top-1 %", "tensors", "gate"):
        table.add_column(title, justify="left" if title in ("", "gate") else "right", no_wrap=True)
    for row in report.rows:
        quality = report.comparison("source", row.name)
        tensors = tensors_of(report, row.name)
        word = verdict(report, row)
        table.add_row(
            row.name.replace(", ", ",\n"),  # 80 columns have room for "source"
            size(row.nbytes),
            f"{row.bits_per_weight:.2f}",
            with_error(row.perplexity),
            with_error(quality.kl_mean) if quality else DASH,
            with_error(quality.top1, 100) if quality else DASH,
            f"{tensors.equal}/{tensors.total}" if tensors else DASH,
            {"pass": "[green]pass[/]", "FAIL": "[bold red]FAIL[/]"}.get(word, word),
        )
    console.print(table)
    for row in report.rows:
        found = report.comparison("IR", row.name)
        if found:
            what = "the IR in float32" if row.arithmetic == "quantized" else "PyTorch on the same weights"
            console.print(
                f"{row.name} against {what}: max |d logit| {number(found.max_abs_logit)}, "
                f"KL {number(found.kl_mean.value)}, {differing(found)} of {found.top1.n:,} first choices differ "
                f"({found.near_ties} near ties)"
            )
    if any(row.text for row in report.rows):
        console.print(f"\nGreedy answers to: {escape(report.prompt)}")
        for row in report.rows:
            console.print(f"[bold]{row.name}[/]: {escape(' '.join(row.text.split()))}")
        console.print()
    passed = len(report.gates) - len(report.failed)
    console.print(f"{passed} of {len(report.gates)} gates passed in {report.seconds:.0f} s")
    for note in report.notes:
        console.print(f"[dim]Note: {escape(note)}[/]")
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
