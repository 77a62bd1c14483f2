"""Whether a report can be written is known before the work."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from anyquant.errors import MachineError, UsageError
from anyquant.reporting.writing import prepare, write_files


@pytest.mark.parametrize("inside", ["", "new", "new/deep/report"])
def test_nothing_is_left_behind(tmp_path: Path, inside: str) -> None:
    prepare(tmp_path / inside, "report.json", "anyquant.report/1")
    assert list(tmp_path.iterdir()) == []


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(Path("new/report"), "report.json", "anyquant.report/1")
    assert list(tmp_path.iterdir()) == []


def test_the_same_kind_may_be_replaced(tmp_path: Path) -> None:
    for schema in ("anyquant.report/1", "anyquant.report/9"):
        write_files(tmp_path, {"report.json": json.dumps({"schema": schema})})
        prepare(tmp_path, "report.json", "anyquant.report/1")


@pytest.mark.parametrize(
    "text",
    [
        '{"schema": "anyquant.validation/1"}',
        '{"schema": 3}',
        '{"other": 1}',
        "[]",
        "not JSON",
        "",
        "[" * 99_999,
        "\xff",
    ],
)
def test_another_kind_is_not_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text, encoding="latin1")
    with pytest.raises(UsageError, match=r"report\.json would be replaced.*not 'anyquant\.report/1'"):
        prepare(tmp_path, "report.json", "anyquant.report/1")
    assert (tmp_path / "report.json").read_text(encoding="latin1") == text


@pytest.mark.parametrize("inside", ["file", "file/new", "file/new/report", "link", "link/new"])
def test_what_is_no_folder_is_a_clear_error(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(MachineError, match=f"cannot write the report to .*{inside}"):
        prepare(tmp_path / inside, "report.json", "anyquant.report/1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(MachineError, match="Is a directory"):
        prepare(tmp_path, "report.json", "anyquant.report/1")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(MachineError, match="Permission denied"):
        prepare(tmp_path / "new", "report.json", "anyquant.report/1")


def test_a_disk_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(dir: Path) -> Any:
        asked.append(dir)
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(MachineError, match="Read-only file system"):
        prepare(tmp_path / "a" / "b", "report.json", "anyquant.report/1")
    assert asked == [tmp_path]
