"""The findings of a sweep, as plain data and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from anyquant import ir
from anyquant.errors import AnyquantError, CorruptFileError
from anyquant.reporting.as_json import plain
from anyquant.reporting.estimate import Estimate
from anyquant.validation.bootstrap import Bootstrap

SCHEMA = "anyquant.sweep/1"


@dataclass(frozen=True)
class Point:
    """One job of a sweep.

    Attributes:
        target: what was asked for, as the IR records it.
        problem: why it cannot be met; "" where it can, and only then is the rest there.
        bits: counted bits per weight of the quantized matrices.
        bits_per_weight: stored bits per weight of the whole model.
        nbytes: exact bytes of the IR folder, side files not counted.
        loss: what the method's tables predict; see :class:`anyquant.planning.Plan`.
        kl: mean of KL(source || quantized) per token, nats; None where no text was given.
        perplexity: of the text.
        perplexity_change: against the source, paired over windows.
        top1: share of tokens with the source's first choice.
        kl_per_window: mean KL of each window, for paired comparisons.
        seconds: for quantizing and measuring.
    """

    target: dict[str, Any]
    problem: str = ""
    bits: float | None = None
    bits_per_weight: float | None = None
    nbytes: int | None = None
    loss: float | None = None
    kl: Estimate | None = None
    perplexity: Estimate | None = None
    perplexity_change: Estimate | None = None
    top1: Estimate | None = None
    kl_per_window: tuple[float, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """Everything a sweep found.

    Attributes:
        model: name, kind and fingerprint of the source, its bytes, and its perplexity where a text was given.
        method: name of the method.
        settings: of the method.
        loss_unit: of the points' losses: "nats" per token, or "relative", a mean relative squared error.
        calibration: settings and fingerprint; None where the method needs none.
        data: text, tokens, windows, seed, resamples; None without a text.
        environment: versions, processor.
        points: one for each job, in their order.
        notes: what a reader should know.
        seconds: of the whole sweep.
        schema: version of this structure.
    """

    model: dict[str, Any]
    method: str
    settings: dict[str, Any]
    loss_unit: str
    calibration: dict[str, Any] | None
    data: dict[str, Any] | None
    environment: dict[str, Any]
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    schema: str = field(default=SCHEMA)

    @property
    def found(self) -> list[Point]:
        """The points whose target can be met, fewest bytes first."""
        return sorted((p for p in self.points if not p.problem), key=lambda p: p.nbytes or 0)

    def difference(self, candidate: Point, reference: Point) -> Estimate:
        """Mean KL of one point minus that of another, nats, paired over windows.

        Raises:
            AnyquantError: nothing was measured.
        """
        if self.data is None or not (candidate.kl_per_window and reference.kl_per_window):
            raise AnyquantError("points can be compared where a text was given, and both targets can be met")
        # Windows are equally long, so that the mean over windows is the mean over tokens.
        a, b = ([np.array([kl]) for kl in point.kl_per_window] for point in (candidate, reference))
        boot = Bootstrap(len(a), self.data["resamples"], self.data["seed"])
        return boot.difference(a, b, lambda mean: mean)

    def to_json(self) -> dict[str, Any]:
        """The sweep as one JSON object; numbers that are not finite become null."""
        body: dict[str, Any] = plain(self)
        return {"schema": body.pop("schema"), **body}


_Number = (int, float)
_FIELDS: dict[str, Any] = {
    "target": dict,
    "problem": str,
    "bits": _Number,
    "bits_per_weight": _Number,
    "nbytes": int,
    "loss": _Number,
    "kl_per_window": list,
    "seconds": _Number,
}


def load_sweep(path: Path) -> Sweep:
    """Read the JSON of a sweep.

    Raises:
        InputError: the file is missing or cannot be read.
        CorruptFileError: it is not what ``anyquant sweep`` writes.
    """
    value = ir.read_json(path, finite=True)
    if value.get("schema") != SCHEMA:
        raise CorruptFileError(
            f"{path} is not a sweep that this anyquant reads: its schema is {value.get('schema')!r:.60}, not "
            f"{SCHEMA!r}. 'anyquant sweep MODEL --targets 3,4 --report DIR' writes DIR/sweep.json."
        )
    points = _take(value, "points", list, path)
    model, data = _take(value, "model", dict, path), _take(value, "data", dict, path, optional=True)
    for key, kind in (("name", str), ("fingerprint", str), ("bytes", int)):
        _take(model, key, kind, path)
    for key, kind in (("text", str), ("windows", int), ("window", int), ("resamples", int), ("seed", int)):
        if data is not None:
            _take(data, key, kind, path)
    perplexity = _take(model, "perplexity", dict, path, optional=True)
    return Sweep(
        model={**model, "perplexity": perplexity and _estimate(perplexity, path)},
        method=_take(value, "method", str, path),
        settings=_take(value, "settings", dict, path),
        loss_unit=_take(value, "loss_unit", str, path),
        calibration=_take(value, "calibration", dict, path, optional=True),
        data=data,
        environment=_take(value, "environment", dict, path),
        points=tuple(_point(point, path) for point in points),
        notes=tuple(str(note) for note in _take(value, "notes", list, path)),
        seconds=float(_take(value, "seconds", _Number, path)),
    )


def _take(value: dict[str, Any], key: str, kind: Any, path: Path, *, optional: bool = False) -> Any:
    found = value.get(key)
    if (found is None and optional) or (isinstance(found, kind) and not isinstance(found, bool)):
        return found
    raise CorruptFileError(f"{path}: {key} is {found!r:.80}")


def _point(value: Any, path: Path) -> Point:
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path}: a point is {value!r:.80}")
    read: dict[str, Any] = {}
    missing = bool(value.get("problem"))
    for item in fields(Point):
        name = item.name
        if name in _FIELDS:
            optional = missing or name in ("loss",)
            read[name] = _take(value, name, _FIELDS[name], path, optional=optional)
        elif value.get(name) is not None:
            read[name] = _estimate(_take(value, name, dict, path), path)
    kl = read["kl_per_window"] or []
    if not all(value is None or isinstance(value, _Number) for value in kl):
        raise CorruptFileError(f"{path}: kl_per_window holds what is no number")
    read["kl_per_window"] = tuple(math.nan if value is None else float(value) for value in kl)
    return Point(**read)


def _estimate(value: dict[str, Any], path: Path) -> Estimate | None:
    """An estimate; None where the value was not finite."""
    if value.get("value") is None:
        return None
    parts = {key: _take(value, key, _Number, path, optional=True) for key in ("error", "low", "high")}
    return Estimate(float(_take(value, "value", _Number, path)), int(_take(value, "n", int, path)), **parts)
