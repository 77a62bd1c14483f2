"""What was measured on a source, as one small file: without models and answers, with the mean of every window.

Intervals, differences and verdicts come from the means of windows alone, so that tables can be written from such a
file, and a benchmark that was begun on one machine goes on with another. Its numbers have six digits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accuracy.evaluation import Lost
from accuracy.store import ABOUT, SOURCE, Record, Store, write_json
from anyquant.errors import InputError, MachineError, UsageError
from anyquant.ir import read_json

_PARTS = ("losses", "kl", "agrees")


def write_records(path: Path, store: Store) -> None:
    """Write all that a store knows.

    Raises:
        MachineError: the file cannot be written.
    """
    systems = []
    for record in store.all_made():
        if store.is_measured(record):
            systems.append({**record, "windows": _numbers(Lost.load(store.lost(record)))})
        elif "digest" not in record:  # infeasible, or failed
            systems.append(record)
    text = json.dumps(
        {
            "of": [store.calibration, store.evaluation],
            "calibration": store.about(store.calibrated),
            "evaluation": store.about(store.evaluated),
            "source": _numbers(Lost.load(store.evaluated / SOURCE)),
        },
        indent=1,
        ensure_ascii=False,
    ).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(system, ensure_ascii=False)}" for system in systems)  # a line each, for diffs
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.partial")
        temporary.write_text(f'{text},\n "systems": [\n{lines}\n ]\n}}\n', encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror or error}") from error


def read_records(path: Path, store: Store) -> None:
    """Add what a file knows and a store does not.

    Raises:
        InputError: the file is none of these.
        UsageError: it is of another source, calibration or evaluation.
    """
    found = read_json(path)
    try:
        calibration, evaluation, systems = found["calibration"], found["evaluation"], found["systems"]
        if found["of"] != [store.calibration, store.evaluation]:
            raise UsageError(
                f"{path} is of {' and '.join(found['of'])}, not of {store.calibration} and {store.evaluation}. Choose "
                "another --records."
            )
        store.claim(calibration["of"], evaluation["of"])
        _add_about(store, calibration, evaluation)
        if not (store.evaluated / SOURCE).is_file():
            _lost(found["source"]).save(store.evaluated / SOURCE)
        known = {record["name"] for record in store.all_made() if "infeasible" in record or store.is_measured(record)}
        for system in systems:
            if system["name"] not in known:
                windows = system.pop("windows", None)
                if windows is not None:
                    _lost(windows).save(store.lost(system))
                store.add(system)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds no records of this benchmark: {error!r}") from error


def _add_about(store: Store, calibration: Record, evaluation: Record) -> None:
    """Put together what is noted here and there; calibrations of elsewhere are marked, their folders are not here."""
    here = store.about(store.calibrated)
    taken = {name: {**each, "elsewhere": True} for name, each in calibration.get("calibrations", {}).items()}
    write_json(
        store.calibrated / ABOUT,
        {**calibration, **here, "calibrations": {**taken, **here.get("calibrations", {})}},
    )
    here = store.about(store.evaluated)
    machines = evaluation.get("machines", [])
    machines += [machine for machine in here.get("machines", []) if machine not in machines]
    write_json(store.evaluated / ABOUT, {**evaluation, **here, "machines": machines})


def _numbers(lost: Lost) -> dict[str, list[float | None]]:
    means = lost.by_window()
    return {part: [_short(value) for value in getattr(means, part).ravel().tolist()] for part in _PARTS}


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _lost(numbers: dict[str, Any]) -> Lost:
    losses, kl, agrees = (_column(numbers[part], len(numbers["kl"])) for part in _PARTS)
    return Lost(losses, kl, agrees)


def _column(values: list[float | None], windows: int) -> NDArray[np.float64]:
    """[windows, 1]; [windows, 0] where nothing is known of them."""
    array = np.array([np.inf if value is None else value for value in values], np.float64)
    return array.reshape(windows, -1)
