"""Whether spreading bits over rows pays: mixed against uniform widths of equal size, and KL over the size.

    python tools/benchmark_allocation.py                        the real model and text that tools/fetch.py fetches
    python tools/benchmark_allocation.py --windows 4 --targets 2.5,3,4 --widths 3

For each of --widths, every row of the model gets that many bits; then as many bytes are spread over the rows of the
whole model, and over those of each matrix. Differences of the mean KL to the source are paired over windows, with
95 % intervals by bootstrap. Then the KL over --targets has to fall from each to the next.

Exit codes: 0 everything passed; 1 something did not; others are anyquant's.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import fetch  # the script beside this one

from anyquant.calibration import CalibrationSettings
from anyquant.calibration.settings import IMPORTANCE
from anyquant.checkpoint import Checkpoint, open_checkpoint
from anyquant.console import table
from anyquant.errors import AnyquantError
from anyquant.job import Job, Target
from anyquant.planning import forms_of
from anyquant.reporting.as_json import plain
from anyquant.reporting.estimate import Estimate
from anyquant.reporting.words import number, with_error
from anyquant.runtime import native
from anyquant.sweep import Point, Sweep, TextSettings, sweep
from anyquant.workfolder import work_folder

TARGETS = "2.3,2.5,3,3.25,3.5,4,4.5,5,6,8"
WIDTHS = "2,3,4,5"
MIXED = ("model", "matrix")


@dataclass(frozen=True)
class Check:
    """A point against another that it should beat.

    Attributes:
        name: of the comparison.
        better: should have the smaller KL.
        worse: should have the larger one.
        difference: of the mean KL, better minus worse, paired over windows.
        passed: whether it beats the other; with all of the interval below 0 where ``strict``.
        strict: whether the interval decides, or the value alone.
    """

    name: str
    better: Point
    worse: Point
    difference: Estimate
    passed: bool
    strict: bool


def compare(name: str, found: Sweep, better: Point, worse: Point, *, strict: bool) -> Check:
    """One comparison."""
    difference = found.difference(better, worse)
    decides = difference.high if strict else difference.value
    return Check(name, better, worse, difference, decides is not None and decides < 0, strict)


def jobs_of(checkpoint: Checkpoint, base: Job, widths: list[int], targets: list[float]) -> list[Job]:
    """The uniform job of every width, each followed by the mixed ones of its size; then one job for each target."""

    def job(bits: float, allocation: str) -> Job:
        return Job(
            base.method,
            Target(bits=bits),
            base.options,
            allocation=allocation,
            calibration=base.calibration,
            workers=base.workers,
        )

    forms = forms_of(checkpoint, base)

    def size(width: int) -> float:
        """All bits per weight where the codes have this many."""
        nearest = min(forms.alike(), key=lambda chosen: abs(forms.bits(chosen, "index") - width))
        return forms.bits(nearest, "all")

    # Where a matrix has one number of bits as a whole, there is nothing to spread in it.
    mixed = MIXED[:1] if forms.whole else MIXED
    jobs = [job(size(width), allocation) for width in widths for allocation in ("uniform", *mixed)]
    return jobs + [job(bits, "model") for bits in targets]


def checks_of(found: Sweep, widths: list[int], targets: list[float]) -> list[Check]:
    """All comparisons of a sweep over :func:`jobs_of`."""
    checks = []
    points = list(found.points)
    each = (len(points) - len(targets)) // max(1, len(widths))
    for width in widths:
        uniform, *mixed = points[:each]
        del points[:each]
        checks += [
            compare(f"{width} bits: {point.target['allocation']}", found, point, uniform, strict=True)
            for point in mixed
        ]
    for (less, small), (more, large) in pairwise(zip(targets, points, strict=True)):
        checks.append(compare(f"{more:g} bits below {less:g}", found, large, small, strict=False))
    return checks


def report(found: Sweep, checks: list[Check]) -> str:
    """All comparisons as a table."""
    rows = []
    for check in checks:
        difference = check.difference
        interval = "" if difference.low is None else f"{number(difference.low)}..{number(difference.high or 0.0)}"
        kl = [number(point.kl.value) if point.kl else "" for point in (check.better, check.worse)]
        sizes = [f"{point.bits:.4f}" for point in (check.better, check.worse)]
        rows.append([check.name, *sizes, *kl, number(difference.value), interval, "PASS" if check.passed else "FAIL"])
    head = ["", "bits", "than", "KL", "than", "difference", "95 %", ""]
    data = found.data or {}
    strict, falls = ([c.passed for c in checks if c.strict is kind] for kind in (True, False))
    perplexity = found.model["perplexity"]
    return "\n".join(
        [
            f"{found.model['name']}: {data['windows']} windows of {data['window']} tokens of {data['text']}; "
            f"perplexity of the source {with_error(perplexity)}",
            table(head, rows),
            f"{'PASS' if all(strict) else 'FAIL'}: mixed widths beat uniform ones of the same bytes (paired, 95 %): "
            f"{sum(strict)} of {len(strict)}",
            f"{'PASS' if all(falls) else 'FAIL'}: KL falls monotonically: {sum(falls)} of {len(falls)} steps",
            f"{found.seconds:.0f} s",
        ]
    )


def to_json(found: Sweep, checks: list[Check]) -> dict[str, Any]:
    """The sweep, and what was concluded from it."""
    places = {id(point): place for place, point in enumerate(found.points)}
    concluded = [
        {
            "name": check.name,
            "better": places[id(check.better)],
            "worse": places[id(check.worse)],
            "difference": plain(check.difference),
            "strict": check.strict,
            "passed": check.passed,
        }
        for check in checks
    ]
    return {"passed": all(check.passed for check in checks), "checks": concluded, "sweep": found.to_json()}


def main(arguments: list[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub id or .gguf file [the real model of the tests]")
    parser.add_argument("--text", type=Path, help="UTF-8 text to measure on [the real text of the tests]")
    parser.add_argument("--method", default="skim", help="[skim]")
    parser.add_argument("--widths", default=WIDTHS, help=f"uniform widths [{WIDTHS}]")
    parser.add_argument("--targets", default=TARGETS, help=f"bits per weight of the falling KL [{TARGETS}]")
    parser.add_argument("--windows", type=int, default=8, help="of --text [8]")
    parser.add_argument("--window", type=int, default=512, help="tokens in each [512]")
    parser.add_argument("--calib", default="self", help="text of the calibration, or self [self]")
    parser.add_argument("--calib-windows", type=int, default=32)
    parser.add_argument("--calib-window", type=int, default=256)
    parser.add_argument("--importance", default="gradient", choices=IMPORTANCE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="threads [2]")
    parser.add_argument("--work-dir", type=Path, help="keep statistics and tables there")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    chosen = parser.parse_args(arguments)
    native.install()
    model, text = chosen.model or str(fetch.fetch("gguf")["gguf"]), chosen.text or fetch.fetch("text")["text"]
    widths = [int(width) for width in chosen.widths.split(",") if width]
    targets = [float(bits) for bits in chosen.targets.split(",") if bits]
    calibration = CalibrationSettings(
        chosen.calib, chosen.calib_windows, chosen.calib_window, chosen.seed, chosen.importance
    )
    measured = TextSettings(text, chosen.windows, chosen.window, chosen.seed)
    try:
        base = Job(chosen.method, Target(bits=1.0), calibration=calibration, workers=chosen.workers)
        checkpoint = open_checkpoint(model)
        with ExitStack() as stack:
            work = None
            if chosen.work_dir:
                kept = work_folder(chosen.work_dir, base.identity(checkpoint), resume=False, keep=True)
                work = stack.enter_context(kept)
            jobs = jobs_of(checkpoint, base, widths, targets)
            found = sweep(checkpoint, jobs, work, measured, note=lambda text: print(text, file=sys.stderr))
        checks = checks_of(found, widths, targets)
    except AnyquantError as error:
        print(f"benchmark_allocation: {error}", file=sys.stderr)
        return error.exit_code
    if chosen.output:
        chosen.output.write_text(json.dumps(to_json(found, checks), indent=1) + "\n", encoding="utf-8")
    print(report(found, checks))
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
