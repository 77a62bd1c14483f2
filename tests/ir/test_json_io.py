"""JSON that is large, deep, doubled or not writable again is refused."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from anyquant.errors import CorruptFileError, InputError
from anyquant.ir import json_io
from anyquant.ir.json_io import read_json


def test_plain(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"ü": [1, {"x": null}], "inf": Infinity}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"ü": [1, {"x": None}], "inf": float("inf")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b"[]", "holds a list"),
        (b"3", "holds a int"),
        (b"null", "holds a NoneType"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' occurs twice"),
        (b'{"x": [{"a": {}, "a": {}}]}', "'a' occurs twice"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\udfff": 1}', "surrogates not allowed"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "more than 64 deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_refused(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_json(tmp_path / "a.json")
    assert "a.json" in str(caught.value)


def test_a_doubled_key_among_many_is_found_at_once(tmp_path: Path) -> None:
    keys = [*range(40_000), 39_999]
    (tmp_path / "a.json").write_text("{" + ", ".join(f'"{key}": 0' for key in keys) + "}")
    start = time.process_time()
    with pytest.raises(CorruptFileError, match="'39999' occurs twice"):
        read_json(tmp_path / "a.json")
    assert time.process_time() - start < 3  # comparing every key with every other takes ten times as long


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": [-Infinity]}', '{"a": 1e999}'])
def test_finite(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    read_json(tmp_path / "a.json")
    with pytest.raises(CorruptFileError, match="not a JSON number"):
        read_json(tmp_path / "a.json", finite=True)


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"b\.json is missing"):
        read_json(tmp_path / "b.json")
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")  # opening it would wait forever
    (tmp_path / "loop.json").symlink_to("loop.json")
    for name in ("folder.json", "pipe.json"):
        with pytest.raises(CorruptFileError, match="not a regular file"):
            read_json(tmp_path / name)
    with pytest.raises(InputError, match=r"loop\.json"):
        read_json(tmp_path / "loop.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    (tmp_path / "real.json").write_text("{}")
    assert read_json(tmp_path / "link.json") == {}  # the caches of the hub are made of links


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("{}")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"cannot read a\.json .*Permission denied"):
        read_json(tmp_path / "a.json")


def test_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_io, "_MAX_BYTES", 100)
    (tmp_path / "a.json").write_text("{}" + " " * 98)
    assert read_json(tmp_path / "a.json") == {}
    (tmp_path / "a.json").write_text("{}" + " " * 99)
    with pytest.raises(CorruptFileError, match="has 101 bytes; no model needs more than 100"):
        read_json(tmp_path / "a.json")
