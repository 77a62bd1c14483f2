"""anyquant.json: its size is known before its values; every field is checked when it is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyquant import ir
from anyquant.errors import AnyquantError, CorruptFileError, InputError
from anyquant.ir.manifest import manifest_json, manifest_size, parse_manifest

SHA = "a" * 64
DELETE = "to be deleted"


def finished(plan: ir.Model, error: float | None = 0.25) -> ir.Model:
    entries = {n: replace(e, sha256=SHA, error=error, output_error=error) for n, e in plan.entries.items()}
    return replace(plan, entries=entries)


def edited(plan: ir.Model, path: tuple[str, ...], value: Any) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(manifest_json(finished(plan)))
    at = parsed
    for key in path[:-1]:
        at = at[key]
    if value is DELETE:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return parsed


def test_round_trip(plan: ir.Model) -> None:
    text = manifest_json(finished(plan))
    assert text.isascii()
    found = parse_manifest(json.loads(text))
    assert list(found.entries) == list(plan.entries)
    for name, entry in found.entries.items():
        planned = plan.entries[name]
        lost = 0.25 if planned.quantized else None
        assert entry == replace(planned, sha256=SHA, error=lost, output_error=lost)
    for field in ("anyquant_version", "method", "settings", "source", "calibration", "aliases"):
        assert getattr(found, field) == getattr(plan, field)


def test_one_line_for_each_tensor(plan: ir.Model) -> None:
    lines = manifest_json(finished(plan)).split("\n")
    for name in plan.entries:
        (line,) = [line for line in lines if line.startswith(f"  {json.dumps(name)}: {{")]
        assert json.loads("{" + line.rstrip(",") + "}")[name]["sha256"] == SHA


@given(st.floats(min_value=0, max_value=8e99))
def test_size_does_not_depend_on_the_error(plan: ir.Model, error: float) -> None:
    text = manifest_json(finished(plan, error))
    assert len(text.encode()) == manifest_size(plan)
    found = parse_manifest(json.loads(text)).entries["affine"].error
    assert found == pytest.approx(error, rel=1e-6, abs=1e-99)


EDGES = [None, 0, -0.0, 5e-324, 1e-100, 9.9999999e-100, 1e-99, 1, 1e10, 8.9e99, np.float32(0.1), np.float64(1e-200)]


@pytest.mark.parametrize("error", EDGES)
def test_size_at_the_edges(plan: ir.Model, error: float | None) -> None:
    text = manifest_json(finished(plan, error))
    assert len(text) == manifest_size(plan)
    parse_manifest(json.loads(text))


@pytest.mark.parametrize("error", [-1e-9, float("nan"), float("inf"), -float("inf"), 1e100])
def test_errors_that_are_none(plan: ir.Model, error: float) -> None:
    with pytest.raises(AnyquantError, match=r"block\.bfp: error .* is not a number in") as caught:
        manifest_json(finished(plan, error))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, np.int64(1), b"x", {"a": object()}])
def test_settings_that_are_not_json(plan: ir.Model, value: Any) -> None:
    with pytest.raises(AnyquantError, match="cannot be written as JSON"):
        manifest_size(replace(plan, settings={"x": value}))


ENTRY = ("tensors", "affine")
STRINGS: list[Any] = [None, True, 1, 1.5, [], {}]
OBJECTS: list[Any] = [None, True, 1, 1.5, [], "x"]
WRONG: list[tuple[tuple[str, ...], Any]] = [
    *((("format_version",), v) for v in [*STRINGS, DELETE, "", "x", "1.", "1.x", "-1", " 1", "1\n", "1" * 50, "१"]),
    *((("anyquant_version",), v) for v in STRINGS),
    *((("method",), v) for v in [*STRINGS, DELETE, "a\x1b[31m", ""]),
    *((("settings",), v) for v in [*OBJECTS, DELETE]),
    *((("source",), v) for v in [*OBJECTS, DELETE]),
    *((("source", key), v) for key in ("kind", "name", "fingerprint") for v in STRINGS),
    *((("calibration",), v) for v in OBJECTS if v is not None),
    *((("aliases",), v) for v in [*OBJECTS, DELETE]),
    *((("aliases", "tied"), v) for v in [*STRINGS, "nowhere", "tied", ""]),
    (("aliases", "affine"), "ggml"),  # shadows a tensor
    (("aliases", "second"), "tied"),  # an alias of an alias
    (("aliases", ""), "ggml"),
    (("aliases", "a\nb"), "ggml"),
    *((("tensors",), v) for v in [*OBJECTS, DELETE, {}]),
    *((("tensors", name), {}) for name in ("", "a\nb", "\x1b[2J", "a\u202eb", "x" * 513, "new")),
    *((ENTRY, v) for v in OBJECTS),
    *(((*ENTRY, "kind"), v) for v in [*STRINGS, DELETE, "sparse"]),
    *(((*ENTRY, "shape"), v) for v in [None, True, 3, "x", {}, [3], [3, "x"], DELETE]),
    *(((*ENTRY, "bits"), v) for v in [None, True, 4.0, "4", [], DELETE]),
    *(((*ENTRY, "sha256"), v) for v in [*STRINGS, DELETE, "", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n"]),
    *(((*ENTRY, "output_error"), v) for v in [True, "1", -1, 1e101]),
    *(((*ENTRY, "error"), v) for v in [True, "1", [], {}, -1, -1e-9, 1e101, 10**400, float("nan"), float("inf")]),
    *(((*ENTRY, "quantized"), v) for v in [None, 1, "true", [], DELETE]),
    *(((*ENTRY, "source_transposed"), v) for v in [None, 0, "false", [], DELETE]),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda v: repr(v)[:40].replace("\n", ""))
def test_wrong_fields_are_refused(plan: ir.Model, path: tuple[str, ...], value: Any) -> None:
    with pytest.raises(CorruptFileError) as caught:
        parse_manifest(edited(plan, path, value))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("future",), {"a": [1]}),
        ((*ENTRY, "future"), [1]),
        ((*ENTRY, "bits_per_weight"), "not read"),
        ((*ENTRY, "error"), None),
        ((*ENTRY, "error"), DELETE),
        ((*ENTRY, "error"), 0),
        (("source", "future"), 1),
        (("source", "name"), DELETE),
        (("calibration",), None),
        (("calibration",), DELETE),
        (("anyquant_version",), DELETE),
        (("format_version",), "1"),
        (("format_version",), "1.7"),
    ],
)
def test_optional_and_unknown_fields(plan: ir.Model, path: tuple[str, ...], value: Any) -> None:
    assert list(parse_manifest(edited(plan, path, value)).entries) == list(plan.entries)


@pytest.mark.parametrize("version", ["0.9", "2", "2.0", "10.0", "11"])
def test_another_major_version(plan: ir.Model, version: str) -> None:
    # Nothing but the version is looked at: the rest may mean anything.
    with pytest.raises(InputError, match=rf"{version}.*Upgrade") as caught:
        parse_manifest({"format_version": version})
    assert caught.value.exit_code == 3


def test_manifest_of_a_file_with_a_doubled_tensor(folder: Path) -> None:
    text = (folder / "anyquant.json").read_text()
    (line,) = [line for line in text.split("\n") if line.startswith('  "affine"')]
    (folder / "anyquant.json").write_text(text.replace(line, line + "\n" + line))
    with pytest.raises(CorruptFileError, match="'affine' occurs twice"):
        ir.open_ir(folder)
