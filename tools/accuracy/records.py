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
from accuracy.store import ABOUT, SOURCE, Store, write_json
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
        lost = store.lost(record) if "digest" in record else None
        if lost is not None and lost.is_file():
            systems.append({**record, "windows": _numbers(Lost.load(lost))})
        elif "infeasible" in record or "failed" in record:
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
        for folder, about in ((store.calibrated, calibration), (store.evaluated, evaluation)):
            write_json(folder / ABOUT, {**about, **store.about(folder)})
        if not (store.evaluated / SOURCE).is_file():
            _lost(found["source"]).save(store.evaluated / SOURCE)
        known = {record["name"] for record in store.all_made()}
        for system in systems:
            if system["name"] not in known:
                windows = system.pop("windows", None)
                store.add(system)
                if windows is not None:
                    _lost(windows).save(store.lost(system))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise InputError(f"{path} holds no records of this benchmark: {error!r}") from error


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
