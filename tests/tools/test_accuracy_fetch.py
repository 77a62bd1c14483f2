"""What the benchmark of accuracy needs is fetched on request alone."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The fetcher with an empty cache, and with nothing that downloads: the names of wanted files are noted."""
    module = sys.modules["anyquant_tools_fetch"]  # loaded by conftest.py
    monkeypatch.setenv("ANYQUANT_TEST_DATA", str(tmp_path))

    def note(wheel: object, materials: list[object]) -> None:
        with (tmp_path / "wanted").open("a") as file:
            file.writelines(f"{material.name}\n" for material in materials)  # type: ignore[attr-defined]

    monkeypatch.setattr(module, "_fetch_from", note)
    monkeypatch.setattr(module, "fetch_clients", lambda: tmp_path)
    return module


def wanted(fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["fetch.py", *arguments])
    assert fetch.main() == 0
    return (tmp_path / "wanted").read_text().splitlines()


@pytest.mark.parametrize(
    ("arguments", "others", "encoder"), [([], True, 0), (["--path", "encoder"], False, 1), (["--benchmark"], True, 1)]
)
def test_the_encoder_is_fetched_on_request(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], others: bool, encoder: int
) -> None:
    names = wanted(fetch, monkeypatch, tmp_path, *arguments)
    always = [material.name for material in fetch.MATERIALS.values() if not material.on_request]
    assert len(always) >= 3
    assert sorted(names) == sorted([*always * others, *["all-MiniLM-L6-v2.zip"] * encoder])
