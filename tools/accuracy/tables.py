"""The section of docs/benchmarks.md that the benchmark of accuracy writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accuracy.material import WORDS
from accuracy.store import Record
from accuracy.verdicts import Judge, Row
from anyquant.errors import InputError, MachineError
from anyquant.reporting.words import DASH, number, with_error

BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
_ROLES = {"method": "", "baseline": "baseline", "claim": "paper", "peer": "peer"}


@dataclass(frozen=True)
class Chapter:
    """All that was measured on one source.

    Attributes:
        source: its name.
        command: that measures it.
        judge: has the systems.
        records: of all systems, also of those that could not be made.
        calibrated: what is known of the calibration.
        evaluated: what is known of the evaluation.
    """

    source: str
    command: str
    judge: Judge
    records: Sequence[Record]
    calibrated: Record
    evaluated: Record


def section(chapters: Sequence[Chapter]) -> str:
    """The whole section, between its markers."""
    parts = [
        BEGIN,
        "## Accuracy",
        "Written by `tools/benchmark_accuracy.py`. Bits are stored bits per weight of the quantized matrices, all "
        "overhead counted; embeddings, norms and the output head stay as they are. KL is the mean over tokens of "
        "KL(source || quantized) in nats, top-1 the part of tokens whose likeliest successor is the source's. "
        "\u00b1 is a standard error and [ ] a 95 % interval, by bootstrap over windows; differences and ratios are "
        "paired, and a tie is an interval that contains zero. The method that a target is judged by is picked and "
        "compared on the same windows. "
        "Seconds are beyond the calibration: from scratch, or (in parentheses) with tables of errors that an earlier "
        "target left. Memory is the peak of all processes, calibration again aside. Calibration and evaluation texts "
        "share no line of prose.",
    ]
    for chapter in chapters:
        parts += _chapter(chapter)
    return "\n\n".join([*parts, END]) + "\n"


def write(path: Path, text: str) -> None:
    """Put the section into a file, in the place of an earlier one or at the end.

    Raises:
        InputError: the file has one of the markers alone.
        MachineError: it cannot be written.
    """
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
        begins, ends = before.count(BEGIN), before.count(END)
        if (begins, ends) == (1, 1) and before.index(BEGIN) < before.index(END):
            head, _, rest = before.partition(BEGIN)
            after = rest.partition(END)[2].lstrip("\n")
            whole = head + text + (f"\n{after}" if after else "")
        elif begins or ends:
            raise InputError(f"{path} has {begins} x {BEGIN} and {ends} x {END}, not one pair. Repair it first.")
        else:
            whole = f"{before.rstrip()}\n\n{text}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(whole, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror or error}") from error


def _chapter(chapter: Chapter) -> list[str]:
    judge, parts = chapter.judge, [f"### {WORDS.get(chapter.source, chapter.source)}", f"    {chapter.command}"]
    parts += [_circumstances(chapter), _states(chapter.records)]
    if notes := chapter.calibrated.get("notes"):
        parts.append(f"Of the peers: {'; '.join(notes)}.")
    rows = sorted(judge.rows, key=lambda row: (row.bits, row.name))
    if judge.has_text:
        head = ["system", "", "bits", "perplexity", "KL", "top-1 %", "s", "MB"]
        source = ["source", "", DASH, with_error(judge.perplexity()), "0", "100", DASH, DASH]
        lines = [source, *(_text_line(judge, row) for row in rows)]
    else:
        head = ["system", "", "bits", "1 - cosine", "s", "MB"]
        lines = [
            [row.name, _ROLES[row.role], f"{row.bits:.3f}", with_error(judge.kl(row)), _seconds(row), _mb(row.peak)]
            for row in rows
        ]
    parts.append(_table(head, lines))
    parts += _calibrations(chapter.calibrated)
    parts += _missing(chapter.records)
    verdicts = judge.verdicts()
    parts.append(f"Targets, {sum(each.passed for each in verdicts)} of {len(verdicts)} met:")
    parts.append(_table(["target", "measured", ""], [[v.target, v.found, v.outcome] for v in verdicts if v.found], 3))
    if unknown := [verdict.target for verdict in verdicts if not verdict.found]:
        parts.append(f"Not measured here: {'; '.join(unknown)}.")
    return parts


def _circumstances(chapter: Chapter) -> str:
    about, of, calibration = chapter.evaluated, chapter.evaluated["of"], chapter.calibrated["of"]
    where = f"Measured on {'; and on '.join(map(_machine, about.get('machines', [])))}."
    if not chapter.judge.has_text:
        return (
            f"Evaluated on {of['windows']:,} sentences of {about.get('text', '?')}, calibrated on sentences of "
            f"{chapter.calibrated.get('text', '?')}. {where}"
        )
    window = f"{of['windows']} windows of {of['window']} tokens ({of['windows'] * of['window']:,} in all)"
    text = "text that the model samples" if calibration["text"] == "self" else chapter.calibrated.get("text", "?")
    return (
        f"Evaluated on {window} of {about.get('text', '?')}; calibrated on "
        f"{calibration['windows']} windows of {calibration['window']} tokens of {text}. "
        f"The source's log-probabilities are kept in FP16, which is a KL of "
        f"{number(about.get('rounding_kl', 0.0))}. {where}"
    )


def _states(records: Sequence[Record]) -> str:
    """Which states of the code the rows are of, and which processors their seconds."""

    def counts(key: str) -> str:
        found = Counter(f"{record.get(key, 'not noted')}" for record in records if "digest" in record)
        return ", ".join(f"{name} ({count})" for name, count in found.most_common())

    return f"Rows by the state of the code that made them: {counts('code')}; by their processor: {counts('cpu')}."


def _machine(machine: Record) -> str:
    packages = machine.get("packages", {})
    versions = ", ".join(f"{name} {packages[name]}" for name in ("anyquant", "torch", "numpy") if name in packages)
    return (
        f"{machine.get('cpu', 'unknown')}, {machine.get('cores', '?')} cores, {machine.get('system', '')}, "
        f"Python {machine.get('python', '?')}, {versions}"
    )


def _text_line(judge: Judge, row: Row) -> list[str]:
    return [
        row.name, _ROLES[row.role], f"{row.bits:.3f}", with_error(judge.perplexity(row)), with_error(judge.kl(row)),
        with_error(judge.top1(row), 100), _seconds(row), _mb(row.peak),
    ]  # fmt: skip


def _seconds(row: Row) -> str:
    return f"{row.seconds:.0f}" if row.fresh else f"({row.seconds:.0f})"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f}"


def _calibrations(about: Record) -> list[str]:
    found = about.get("calibrations", {})
    if not found:
        return []
    lines = sorted(
        [
            f"{each['importance']}{', groups of rows' if each.get('row_groups') else ''}", f"{each['tokens']:,}",
            f"{each['seconds']:.0f}", _mb(each["peak"]),
        ]
        for each in found.values()
    )  # fmt: skip
    return ["Calibrations, each taken once:", _table(["recorded", "tokens", "s", "MB"], lines, 1)]


def _missing(records: Sequence[Record]) -> list[str]:
    infeasible = [
        f"{record['name']} ({record['feasible'][0]:.3f} to {record['feasible'][1]:.3f})"
        for record in records
        if "infeasible" in record
    ]
    failed = [f"- {record['name']}: {record['failed']}" for record in records if "failed" in record]
    parts = []
    if infeasible:
        parts.append(f"Infeasible, with the bits that are feasible: {'; '.join(infeasible)}.")
    if failed:
        parts.append("\n".join(["Failed:", "", *failed]))
    return parts


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], text: int = 2) -> str:
    """A table in Markdown; columns from ``text`` on are aligned right."""

    def cells(values: Sequence[str]) -> str:
        return f"| {' | '.join(value.replace('|', chr(92) + '|') for value in values)} |"

    ruler = ["---" if column < text else "---:" for column in range(len(head))]
    return "\n".join([cells(head), cells(ruler), *map(cells, lines)])
