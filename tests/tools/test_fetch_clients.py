"""Installing onnxruntime-node, with a stand-in for npm."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Npm = Callable[[str], Path]


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The fetcher, with nothing to fetch but clients, its own cache folder, and no npm on the path."""
    module = sys.modules["anyquant_tools_fetch"]  # loaded by conftest.py
    monkeypatch.setattr(module, "MATERIALS", {})
    monkeypatch.setattr(sys, "argv", ["fetch.py"])
    monkeypatch.setenv("ANYQUANT_TEST_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return module


@pytest.fixture
def npm(tmp_path: Path) -> Npm:
    """npm(shell commands) puts a program of that name on the path; it notes its arguments in the file calls."""

    def make(commands: str) -> Path:
        program = tmp_path / "bin" / "npm"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!{shutil.which("sh", path="/bin:/usr/bin")}\necho "$@" >>{tmp_path}/calls\n{commands}\n')
        program.chmod(0o755)
        return tmp_path / "calls"

    return make


INSTALL = "PATH=/bin:/usr/bin; mkdir -p node_modules/onnxruntime-node"


def test_installed_once_and_again_when_the_lock_file_changes(
    fetch: ModuleType, npm: Npm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = npm(INSTALL)
    assert fetch.find_clients() is None
    assert fetch.main() == 0
    modules = fetch.find_clients()
    assert modules == tmp_path / "cache" / "clients" / "node_modules"
    assert (modules / "onnxruntime-node").is_dir()
    assert calls.read_text() == "ci --ignore-scripts --no-audit --no-fund\n"
    assert fetch.fetch_clients() == modules
    assert len(calls.read_text().splitlines()) == 1
    (modules.parent / "package-lock.json").write_text("{}")
    assert fetch.find_clients() is None
    monkeypatch.setattr(sys, "argv", ["fetch.py", "--clients"])
    assert fetch.main() == 0
    assert fetch.find_clients() == modules
    assert len(calls.read_text().splitlines()) == 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["clients"]


def test_without_npm_the_rest_is_fetched_all_the_same(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch.main() == 0
    assert "npm is not installed" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["fetch.py", "--clients"])
    assert fetch.main() == 5
    assert "npm is not installed" in capsys.readouterr().err


def test_a_failing_npm_is_told_and_leaves_nothing(
    fetch: ModuleType, npm: Npm, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    npm("echo no such version >&2; exit 1")
    for arguments, code in (([], 0), (["--clients"], 6)):  # without onnxruntime-node all but its tests can run
        monkeypatch.setattr("sys.argv", ["fetch.py", *arguments])
        assert fetch.main() == code
        assert "no such version" in capsys.readouterr().err
        assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_made_is_told(
    fetch: ModuleType, npm: Npm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm(INSTALL)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANYQUANT_TEST_DATA", str(tmp_path / "file"))
    with pytest.raises(fetch.FetchError, match="cannot write") as caught:
        fetch.fetch_clients()
    assert caught.value.exit_code == 6


def test_the_lock_file_pins_exactly_and_names_no_registry(repository: Path) -> None:
    folder = repository / "tools" / "clients"
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    lock = json.loads((folder / "package-lock.json").read_text())
    assert wanted == {"onnxruntime-node": "1.30.0"}
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert packages["node_modules/onnxruntime-node"]["version"] == "1.30.0"
    assert all(entry["integrity"].startswith("sha512-") for entry in packages.values())
    hosts = {entry["resolved"].split("/")[2] for entry in packages.values() if "resolved" in entry}
    assert hosts <= {"registry.npmjs.org"}
