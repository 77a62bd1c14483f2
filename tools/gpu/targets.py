"""What the CUDA kernels are to reach, and whether measured rows reach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpu.contenders import FP16, NF4, OURS

SHARES = {"rows, 4 bits": 0.65, "rows, 3 bits": 0.55, "rows, 2 bits": 0.45}
"""Of the bandwidth of a copy, at batch 1."""
ERROR = 1e-3


@dataclass(frozen=True)
class Row:
    """A measured product.

    Attributes:
        shape: [out, in].
        batch: rows of activations.
        name: of the contender.
        nbytes: of its matrix.
        seconds: of a call, the median; none where it did not run.
        spread: between the quartiles, as a part of that.
        relative_error: against FP64, for ours.
        same_bits: whether a repeated call gave the same, for ours.
        problem: why it did not run.
    """

    shape: tuple[int, int]
    batch: int
    name: str
    nbytes: int
    seconds: float | None = None
    spread: float | None = None
    relative_error: float | None = None
    same_bits: bool | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Verdict:
    """A target: what was found, in words, and whether it holds; none where something that it needs was not measured."""

    target: str
    found: str
    holds: bool | None


class _Rows:
    def __init__(self, rows: Sequence[Row], shape: tuple[int, int]) -> None:
        self._seconds = {(row.batch, row.name): row.seconds for row in rows if row.shape == shape}
        self._nbytes = {(row.batch, row.name): row.nbytes for row in rows if row.shape == shape}

    def seconds(self, batch: int, name: str) -> float | None:
        return self._seconds.get((batch, name))

    def rate(self, batch: int, name: str) -> float | None:
        seconds = self.seconds(batch, name)
        return None if seconds is None else self._nbytes[batch, name] / seconds

    def ratio(self, over: tuple[int, str], under: tuple[int, str]) -> float | None:
        """Seconds of one by seconds of another."""
        first, second = self.seconds(*over), self.seconds(*under)
        return None if first is None or second is None else first / second


def verdicts(rows: Sequence[Row], bandwidth: float) -> list[Verdict]:
    """Whether each target holds, of all shapes.

    Args:
        rows: what was measured.
        bandwidth: bytes per second of a copy, read and written ones together.
    """
    found: list[Verdict] = []

    def judge(target: str, value: float | None, least: float, unit: str = "") -> None:
        holds = None if value is None else value >= least
        found.append(Verdict(target, "not measured" if value is None else f"{value:.2f}{unit}", holds))

    for shape in sorted({row.shape for row in rows}):
        where, of = f"{shape[0]} x {shape[1]}", _Rows(rows, shape)
        for name, least in SHARES.items():
            rate = of.rate(1, name)
            judge(f"{where}, {name}, batch 1: {least:.2f} of a copy's bandwidth", rate and rate / bandwidth, least)
        mixed = of.rate(1, "rows, 2 to 4 bits, .5 % outliers")
        plain = of.rate(1, "rows, 3 bits")
        share = None if mixed is None or plain is None else mixed / plain
        judge(f"{where}, mixed widths and outliers, batch 1: 0.85 of the bandwidth of 3 bits", share, 0.85)
        four = "rows, 4 bits"
        judge(f"{where}, 4 bits, batch 1 at least 1/1.5 as long as batch 8", of.ratio((1, four), (8, four)), 1 / 1.5)
        judge(f"{where}, 4 bits, batch 16: 1.5 times as fast as FP16", of.ratio((16, FP16), (16, four)), 1.5)
        judge(f"{where}, 4 bits, batch 2048: 0.9 times as fast as FP16", of.ratio((2048, FP16), (2048, four)), 0.9)
        judge(f"{where}, 4 bits, batch 1: faster than {NF4}", of.ratio((1, NF4), (1, four)), 1.0)
    ours = [row for row in rows if row.name in OURS]
    errors = [row.relative_error for row in ours if row.relative_error is not None]
    worst = max(errors, default=None)
    found.append(
        Verdict(
            f"relative error at most {ERROR:g}",
            "not measured" if worst is None else f"{worst:.1e}",
            None if worst is None else worst <= ERROR,
        )
    )
    same = [row.same_bits for row in ours if row.same_bits is not None]
    found.append(
        Verdict("the same bits from run to run", f"{sum(same)} of {len(same)}" if same else "not measured",
                all(same) if same else None)
    )  # fmt: skip
    return found


def table(rows: Sequence[Row], bandwidth: float) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [
        "| matrix | rows of activations | | MB | us | spread | times as fast as FP16 | of a copy's bandwidth | error |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        start = f"| {row.shape[0]} x {row.shape[1]} | {row.batch} | {row.name} | {row.nbytes / 1e6:.1f} |"
        if row.seconds is None:
            lines.append(f"{start} not run: {row.problem} | | | | |")
            continue
        dense = _Rows(rows, row.shape).seconds(row.batch, FP16)
        faster = "" if dense is None else f"{dense / row.seconds:.2f}"
        error = "" if row.relative_error is None else f"{row.relative_error:.1e}"
        lines.append(
            f"{start} {1e6 * row.seconds:.1f} | {100 * (row.spread or 0):.0f} % | {faster} | "
            f"{100 * row.nbytes / row.seconds / bandwidth:.0f} % | {error} |"
        )
    return lines


def verdict_table(found: Sequence[Verdict]) -> list[str]:
    """Lines of a table in Markdown."""
    words = {None: "not measured", True: "holds", False: "missed"}
    return ["| target | measured | |", "|---|---:|---|"] + [
        f"| {each.target} | {each.found} | {words[each.holds]} |" for each in found
    ]
