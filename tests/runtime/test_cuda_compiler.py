"""Compiled kernels on disk, and what is said where there is no GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from anyquant.errors import AnyquantError, MachineError, MissingDependency
from anyquant.runtime.cuda import compiler, launcher

SOURCE = "finish.cu"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("cuda.core", reason="the extra anyquant[cuda] is not installed")
    monkeypatch.setenv("ANYQUANT_CACHE", str(tmp_path))
    return tmp_path / "cubins"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of each time that the compiler runs."""
    done: list[str] = []
    compile_it = compiler._compile

    def noted(folder: Path, source: str, *others: Any) -> bytes:
        done.append(source)
        return compile_it(folder, source, *others)

    monkeypatch.setattr(compiler, "_compile", noted)
    return done


def test_is_compiled_once(cache: Path, compilations: list[str]) -> None:
    first = compiler.compiled(SOURCE, {}, "sm_80")
    assert compiler.compiled(SOURCE, {}, "sm_80") == first
    assert len(compilations) == len(list(cache.iterdir())) == 1
    others = [
        compiler.compiled(SOURCE, {}, "sm_90"),
        compiler.compiled("expand.cu", {"AQ_AXIS": 0, "AQ_WIDTHS": 4}, "sm_80"),
        compiler.compiled("expand.cu", {"AQ_AXIS": 0, "AQ_WIDTHS": 8}, "sm_80"),
    ]
    assert len({first, *others}) == len(list(cache.iterdir())) == len(compilations) == 4


@pytest.mark.parametrize("damage", [b"", b"short", bytes(4096)])
def test_a_damaged_file_is_compiled_again(cache: Path, compilations: list[str], damage: bytes) -> None:
    good = compiler.compiled(SOURCE, {}, "sm_80")
    [kept] = cache.iterdir()
    kept.write_bytes(damage)
    assert compiler.compiled(SOURCE, {}, "sm_80") == good
    assert compiler.compiled(SOURCE, {}, "sm_80") == good
    assert len(compilations) == 2


def test_a_flipped_bit_is_noticed(cache: Path, compilations: list[str]) -> None:
    good = compiler.compiled(SOURCE, {}, "sm_80")
    [kept] = cache.iterdir()
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    assert compiler.compiled(SOURCE, {}, "sm_80") == good
    assert len(compilations) == 2


def test_where_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANYQUANT_CACHE", str(tmp_path / "file"))
    assert compiler.compiled(SOURCE, {}, "sm_80").startswith(b"\x7fELF")


def test_another_source_is_another_file(
    cache: Path, compilations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = compiler.source_folder()
    compiler.compiled(SOURCE, {}, "sm_80")
    changed = tmp_path / "sources"
    changed.mkdir()
    for file in sources.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    (changed / "packed.cuh").write_text((sources / "packed.cuh").read_text() + "\n// changed\n")
    monkeypatch.setattr(compiler, "source_folder", lambda: changed)
    compiler.compiled(SOURCE, {}, "sm_80")
    assert len(compilations) == 2


def test_what_does_not_compile(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AnyquantError, match=r"gemv.cu with {} does not compile for sm_80(.|\n)*AQ_AXIS"):
        compiler.compiled("gemv.cu", {}, "sm_80")
    with pytest.raises(MachineError, match="does not compile for sm_20"):
        compiler.compiled(SOURCE, {}, "sm_20")


def test_without_cuda_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYQUANT_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(MissingDependency, match=r"pip install 'anyquant\[cuda\]'"):
        compiler.compiled(SOURCE, {}, "sm_80")


@pytest.mark.parametrize(
    ("of_torch", "message"),
    [
        ({"version": None}, "built without CUDA"),
        ({"version": "13.0", "available": False}, "finds no NVIDIA GPU"),
        ({"version": "13.0", "available": True, "count": 1}, "there is no GPU 1: torch sees 1"),
        ({"version": "13.0", "available": True, "count": 2, "capability": (7, 5)}, "compute capability 7.5"),
    ],
)
def test_gpus_that_cannot_be_used(of_torch: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, of_torch)
    with pytest.raises(MachineError, match=message) as caught:
        launcher.require_gpu(torch.device("cuda:1"))
    assert caught.value.exit_code == 6


def test_the_architecture_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"version": "13.0", "available": True, "count": 2, "capability": (9, 0)})
    assert launcher.require_gpu(torch.device("cuda:1")) == "sm_90"


def pretend(monkeypatch: pytest.MonkeyPatch, of_torch: dict[str, Any]) -> None:
    """That torch sees such GPUs."""
    monkeypatch.setattr(torch.version, "cuda", of_torch["version"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: of_torch.get("available", False))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: of_torch.get("count", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of_torch["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")


def test_a_cuda_core_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "require_gpu", lambda device: "sm_90")
    monkeypatch.setitem(sys.modules, "cuda.core", ModuleType("cuda.core"))  # its names were elsewhere before
    with pytest.raises(MissingDependency, match=r"pip install 'anyquant\[cuda\]'"):
        launcher.Launcher(torch.device("cuda"))
