"""Whether a runner takes the plug-in for ggml, as `anyquant doctor --runner` says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from anyquant.errors import InputError
from anyquant.runtime import ggml_plugin, native
from anyquant.runtime.ggml_plugin import Trial, try_runner

if TYPE_CHECKING:
    from tests.conftest import Result

pytestmark = pytest.mark.skipif(native.path_of(ggml_plugin.LIBRARY) is None, reason=native.missing(ggml_plugin.LIBRARY))


@pytest.fixture
def runner() -> Path:
    """The libraries of the package libggml-python."""
    pytest.importorskip("libggml")
    import libggml

    return next(Path(folder) for folder in libggml.__path__)


def test_a_ggml_takes_it(runner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert try_runner(runner) == Trial("", whole=True)
    monkeypatch.setenv("ANYQUANT_GGML", "rows")
    assert try_runner(runner) == Trial("")


def test_libraries_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "libggml.so").write_bytes(b"\x7fELF and nothing more")
    assert "no library there exports ggml_get_type_traits_cpu" in try_runner(tmp_path).why_not
    (tmp_path / "libggml.so").write_bytes(b"\x7fELF ggml_get_type_traits_cpu")
    assert "there is no ggml whose tables can be found" in try_runner(tmp_path).why_not
    with pytest.raises(InputError, match="does not exist"):
        try_runner(tmp_path / "missing")


def test_what_doctor_says(runner: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> str:
        return " ".join(str(invoke("doctor", "--runner", runner).out).split())

    assert f"{runner.name}: takes it no problems" in said()
    data = invoke("doctor", "--json", "--runner", runner).data
    assert data["runner"] == {"path": str(runner), "why_not": "", "whole": True}  # type: ignore[index]
    monkeypatch.setenv("ANYQUANT_GGML", "rows")
    assert f"{runner.name}: takes it; products row by row, which is slower" in said()
