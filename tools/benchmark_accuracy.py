"""What quantization costs a model: anyquant's methods, baselines, the papers' settings and peers, on the same texts.

    python tools/benchmark_accuracy.py --work W --source dithered         hours; can be stopped and begun again
    python tools/benchmark_accuracy.py --work W --windows 4 --systems 'skim*,GPTQ 3*' --targets 3.3
    python tools/benchmark_accuracy.py --work W --report                  only write what is there
    python tools/benchmark_accuracy.py --work W --records docs/accuracy   go on where another machine stopped

Sources: dithered (SmolLM2-135M as a float model, which the targets are for), stock (as it comes, in Q4_1), encoder (a
sentence encoder), or another language model's folder. Everything that is measured stays in --work and is not measured
again; the report tells of all sources that were measured there with the same texts and windows.

The peer HQQ needs the package hqq: pip install -e '.[benchmark]', or a folder that has it in PYTHONPATH. AutoRound is
an option for those who have hours: it needs auto-round 0.16, and runs where --systems names it ('AutoRound 3*'). The
source's answers take 3 GB in --work, a model that is being measured .5 GB.

Exit codes: 0 all targets hold on --source; 1 one does not, or was not measured; others are anyquant's.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

from accuracy import embeddings
from accuracy.commands import Calibration
from accuracy.evaluation import Lost
from accuracy.material import CALIBRATIONS, DITHERED, ENCODER, STOCK, Material, material
from accuracy.peers import GGML, HQQ
from accuracy.records import read_records, write_records
from accuracy.running import Benchmark
from accuracy.store import ABOUT, SOURCE, Store
from accuracy.systems import CHALLENGERS, TARGETS, System, at_bits_of, chosen, matches, method, ours, peer
from accuracy.tables import Chapter, section, write
from accuracy.texts import WINDOW, WINDOWS
from accuracy.verdicts import Judge, Row

from anyquant.errors import AnyquantError, InputError
from anyquant.runtime import native
from anyquant.workfolder import held

CALIB_WINDOWS, CALIB_WINDOW = 64, 512
_ORDER = (DITHERED, STOCK, ENCODER)


def store_of(arguments: argparse.Namespace, source: str) -> Store:
    """Where the results of a source are."""
    encoder = source == ENCODER
    calib = arguments.calib
    if calib not in (*CALIBRATIONS, "self"):
        calib = Path(calib).stem
    text = "evaluation" if arguments.text is None else f"evaluation-{arguments.text.stem}"
    size = f"{windows_of(arguments, source)}" + ("" if encoder else f"x{arguments.window}")
    calibration = calib if encoder else f"{calib}-{arguments.calib_windows}x{arguments.calib_window}"
    folder = source if source in _ORDER else Path(source).resolve().name
    return Store(
        arguments.work / folder, f"{calibration}-{arguments.seed}", f"{text}-{size}-{arguments.seed}"
    )  # fmt: skip


def windows_of(arguments: argparse.Namespace, source: str) -> int:
    """Windows of the evaluation; of the encoder, sentences."""
    if arguments.windows is not None:
        return int(arguments.windows)
    return embeddings.EVALUATION_SENTENCES if source == ENCODER else WINDOWS


def ours_on(targets: Sequence[float], *, encoder: bool) -> list[System]:
    """Everything of anyquant that a source can be quantized by."""
    return [system for system in ours(targets) if not encoder or embeddings.takes(list(system.arguments))]


def systems_of(
    arguments: argparse.Namespace, peers: Iterable[str], optional: Iterable[str], *, encoder: bool
) -> list[System]:
    """Everything that is asked for, in the order in which it runs; optional peers where a pattern names them.

    Raises:
        UsageError: a pattern matches nothing.
    """
    own = ours_on(arguments.targets, encoder=encoder)
    asked = [peer(name) for name in optional if matches(peer(name), arguments.systems)]
    return chosen([*own, *map(peer, peers), *asked], arguments.systems)


def rows_of(store: Store) -> list[Row]:
    """All systems that were measured."""
    found = []
    for record in store.all_made():
        if store.is_measured(record):
            fields = {name: record[name] for name in ("name", "role", "label", "bits", "seconds", "peak")}
            lost = Lost.load(store.lost(record)).by_window()
            found.append(Row(**fields, fresh=record.get("fresh", True), lost=lost))
    return found


def judge_of(store: Store) -> Judge:
    """What the measurements of a source say.

    Raises:
        InputError: there are none.
    """
    source = store.evaluated / SOURCE
    if not source.is_file():
        raise InputError(f"{store.evaluated} holds no measurement. Leave out --report to measure.")
    return Judge(rows_of(store), Lost.load(source).by_window(), wanted=wanted_of(store))


def wanted_of(store: Store) -> dict[str, float | None]:
    """All rivals that there have to be, with their bits where they are known before they run."""
    about = store.about(store.calibrated)
    infeasible = {record["name"] for record in store.all_made() if "infeasible" in record}
    own = ours_on(TARGETS, encoder=store.source.name == ENCODER)
    baselines = [system for system in own if system.role == "baseline" and system.name not in infeasible]
    missing = [note for note in about.get("notes", []) if note.startswith((HQQ, GGML))]
    return {**about.get("peers", {}), **dict.fromkeys([*(system.name for system in baselines), *missing])}


def measure(arguments: argparse.Namespace, found: Material, store: Store) -> None:
    """Run all that is missing; at last what may beat each peer that is not beaten yet, at its bits."""
    calibration = Calibration(found.calibration, arguments.calib_windows, arguments.calib_window, arguments.seed)
    windows = windows_of(arguments, arguments.source)
    benchmark = Benchmark(found, store, calibration, windows, arguments.window, arguments.seed, _say)
    systems = systems_of(arguments, *benchmark.peers(), encoder=found.is_encoder)
    for system in systems if arguments.again else ():
        store.forget(system)
    benchmark.source()
    for number, system in enumerate(systems):
        _say(f"[{number + 1}/{len(systems)}] {system.name}")
        benchmark.system(system)
    for rival, label in product(judge_of(store).unbeaten(), CHALLENGERS):
        extra = method(label, at_bits_of(rival.bits))
        wanted = not arguments.systems or matches(extra, arguments.systems)
        # What was run for one rival may have beaten this one, too.
        if wanted and rival.name in [other.name for other in judge_of(store).unbeaten()]:
            _say(f"{extra.name}, for {rival.name}")
            benchmark.system(extra)


def command_of(arguments: argparse.Namespace, source: str) -> str:
    """The command that measures a source so."""
    words = ["python tools/benchmark_accuracy.py", f"--source {source}", "--work W"]
    for name, default in (
        ("calib", CALIBRATIONS[0]), ("calib_windows", CALIB_WINDOWS), ("calib_window", CALIB_WINDOW),
        ("text", None), ("windows", None), ("window", WINDOW), ("seed", 0),
    ):  # fmt: skip
        value = getattr(arguments, name)
        if value != default:
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


def chapters_of(arguments: argparse.Namespace) -> list[Chapter]:
    """All sources that were measured like this one."""
    others = sorted(path.name for path in arguments.work.iterdir() if path.is_dir()) if arguments.work.is_dir() else []
    names = [*_ORDER, *(name for name in others if name not in _ORDER)]
    found = []
    for name in names:
        store = store_of(arguments, name)
        if (store.evaluated / SOURCE).is_file() and (store.calibrated / ABOUT).is_file():
            calibrated, evaluated = (store.about(folder) for folder in (store.calibrated, store.evaluated))
            command, records = command_of(arguments, name), list(store.all_made())
            found.append(Chapter(name, command, judge_of(store), records, calibrated, evaluated))
    return found


def run(arguments: argparse.Namespace) -> int:
    """Measure, write, and tell whether all targets hold.

    Raises:
        AnyquantError: something cannot be used, or the machine does not suffice.
    """
    native.install()
    store = store_of(arguments, arguments.source)
    with nullcontext() if arguments.report and not arguments.records else held(arguments.work):
        for path in sorted(arguments.records.glob("*.json")) if arguments.records else ():
            read_records(path, store_of(arguments, path.stem))
        if not arguments.report:
            try:
                found = material(arguments.source, arguments.calib, arguments.text, arguments.work)
                measure(arguments, found, store)
            finally:
                if arguments.records and (store.evaluated / SOURCE).is_file():
                    write_records(arguments.records / f"{store.source.name}.json", store)
    judge = judge_of(store)
    if arguments.output:
        write(arguments.output, section(chapters_of(arguments)))
    verdicts = judge.verdicts()
    for verdict in verdicts:
        print(f"{'PASS' if verdict.passed else 'FAIL'}: {verdict.target}: {verdict.outcome}. {verdict.found}".rstrip())
    failed = [record["name"] for record in store.all_made() if "failed" in record]
    if failed:
        _say(f"failed: {'; '.join(failed)}")
    return 0 if all(verdict.passed for verdict in verdicts) and not failed else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(",") if word)


def _patterns(text: str) -> list[str]:
    return [pattern.strip() for pattern in text.split(",") if pattern.strip()]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Any = parser.add_argument
    add("--work", type=Path, required=True, help="folder in which everything stays")
    add("--source", default=DITHERED, help=f"{', '.join(_ORDER)}, or a language model's folder [{DITHERED}]")
    add("--systems", type=_patterns, default=[], help="patterns of names, such as 'skim @*,GPTQ 3*' [all]")
    add("--targets", type=_numbers, default=TARGETS, help="counted bits of our methods [2.3,2.5,3,3.3,3.5,4,4.5]")
    add("--again", action="store_true", help="forget what is there of these systems first")
    add("--calib", default=CALIBRATIONS[0], help="wikipedia, news, self, or a text [wikipedia]")
    add("--calib-windows", type=int, default=CALIB_WINDOWS, help=f"[{CALIB_WINDOWS}]")
    add("--calib-window", type=int, default=CALIB_WINDOW, help=f"tokens in each [{CALIB_WINDOW}]")
    add("--text", type=Path, help="to evaluate on [pages of Wikipedia that calibration does not see]")
    add("--windows", type=int, help=f"of the evaluation [{WINDOWS}; {embeddings.EVALUATION_SENTENCES} sentences]")
    add("--window", type=int, default=WINDOW, help=f"tokens in each [{WINDOW}]")
    add("--seed", type=int, default=0, help="of the choice of windows [0]")
    add("--records", type=Path, help="folder of a JSON for each source: what was measured elsewhere, and is here")
    add("--report", action="store_true", help="measure nothing")
    add("--output", type=Path, help="Markdown file whose section is written, such as docs/benchmarks.md")
    return parser.parse_args(list(arguments))


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; the exit code."""
    try:
        return run(parse(arguments))
    except AnyquantError as error:
        _say(f"benchmark_accuracy: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("benchmark_accuracy: interrupted; the same command goes on")
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what it started ends with it
    sys.exit(main(sys.argv[1:]))
