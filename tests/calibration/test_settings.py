"""What identifies a calibration, and what is refused before any work."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from anyquant.calibration import CalibrationSettings
from anyquant.errors import InputError, UsageError


def test_identity_of_self() -> None:
    settings = CalibrationSettings()
    settings.check()
    assert settings.kind == "self"
    assert settings.identity() == {
        "source": "self", "windows": 32, "window": 256, "seed": 0, "importance": "gradient", "row_groups": 0
    }  # fmt: skip


def test_a_text_is_identified_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b").write_text("one")
    first, second = (CalibrationSettings(str(tmp_path / name)).identity() for name in ("a.txt", "b"))
    assert first == second
    assert first["sha256"] == hashlib.sha256(b"one").hexdigest()
    (tmp_path / "b").write_text("two")
    assert CalibrationSettings(str(tmp_path / "b")).identity() != first
    assert json.loads(json.dumps(first)) == first


@pytest.mark.parametrize("source", ["owner/name", "wikitext", "owner/name-2.0:en_v1"])
def test_datasets(source: str) -> None:
    settings = CalibrationSettings(source)
    assert settings.kind == "dataset"
    assert settings.identity()["dataset"] == source


@pytest.mark.parametrize(
    "source", ["missing.txt", "some/where/text.txt", "../x", "a/b/c", "", "nul\0", "~/text", "x" * 5000 + "/y/z"]
)
def test_what_is_neither(source: str) -> None:
    with pytest.raises(InputError, match="is no file and does not look like the id of a dataset"):
        CalibrationSettings(source).identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": 0}, "windows is 0; it must be at least 1"),
        ({"window": 1}, "window is 1; it must be at least 2"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"importance": "hessian"}, "'hessian'; it is one of gradient, norms, activation, fisher"),
    ],
)
def test_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CalibrationSettings(**change).check()
