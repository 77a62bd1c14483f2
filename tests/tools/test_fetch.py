from __future__ import annotations

import dataclasses
import hashlib
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

CONTENT = b"three hundred articles"


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The fetcher, with one small made-up wheel to fetch and its own cache folder."""
    module = sys.modules["anyquant_tools_fetch"]  # loaded by conftest.py
    wheel = tmp_path / "index" / "made_up-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("made_up/data/text.txt", CONTENT)
        # What pip looks at before it takes a wheel.
        archive.writestr("made_up-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
        archive.writestr(
            "made_up-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
    found = module.Wheel("made-up==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest())
    material = module.Material(found, "made_up/data/text.txt", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(module, "MATERIALS", {"text": material})
    monkeypatch.setenv("ANYQUANT_TEST_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return module


def change(fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, **fields: object) -> None:
    """Pin something else."""
    monkeypatch.setitem(fetch.MATERIALS, "text", dataclasses.replace(fetch.MATERIALS["text"], **fields))


def left_in_cache(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").iterdir()]


def test_a_file_is_fetched_once(fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert fetch.find("text") is None
    path = fetch.fetch()["text"]
    assert path.read_bytes() == CONTENT
    assert path == fetch.find("text") == tmp_path / "cache" / "text.txt"
    assert left_in_cache(tmp_path) == ["text.txt"]
    monkeypatch.setattr(fetch, "_download", None)  # a second download would fail
    assert fetch.fetch("text") == {"text": path}


def test_a_damaged_file_is_fetched_again(fetch: ModuleType) -> None:
    path = fetch.fetch()["text"]
    path.write_bytes(b"damaged")
    assert fetch.find("text") is None
    assert fetch.fetch()["text"].read_bytes() == CONTENT


@pytest.mark.parametrize("part", ["wheel", "file"])
def test_another_hash_is_refused(fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str) -> None:
    pinned = "0" * 64
    material = fetch.MATERIALS["text"]
    found = material.wheel.sha256 if part == "wheel" else material.sha256
    if part == "wheel":
        change(fetch, monkeypatch, wheel=dataclasses.replace(material.wheel, sha256=pinned))
    else:
        change(fetch, monkeypatch, sha256=pinned)
    with pytest.raises(fetch.FetchError) as caught:
        fetch.fetch()
    assert caught.value.exit_code == 3
    assert pinned in str(caught.value)
    assert found in str(caught.value)
    assert left_in_cache(tmp_path) == []


def test_a_failing_pip_is_told(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change(fetch, monkeypatch, wheel=fetch.Wheel("made-up==2.0", "0" * 64))
    monkeypatch.setattr(sys, "argv", ["fetch.py"])
    assert fetch.main() == 6
    told = capsys.readouterr()
    assert told.out == ""
    assert "made-up==2.0" in told.err


def test_a_folder_that_cannot_be_made_is_told(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANYQUANT_TEST_DATA", str(tmp_path / "file" / "cache"))
    with pytest.raises(fetch.FetchError, match="cannot write") as caught:
        fetch.fetch()
    assert caught.value.exit_code == 6


def test_the_path_is_printed_for_scripts(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["fetch.py", "--path", "text"])
    assert fetch.main() == 0
    assert capsys.readouterr().out == f"{tmp_path / 'cache' / 'text.txt'}\n"
