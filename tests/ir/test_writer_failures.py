"""Failures while a folder is written: nothing half-made stays, whatever goes wrong and where."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import AnyquantError, CorruptFileError, MachineError
from anyquant.ir import writer

Writer = Callable[..., ir.Model]


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files included."""
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def failing(zoo: dict[str, ir.Tensor], at: str, with_what: Callable[[], tuple[ir.Tensor, float | None]]) -> Any:
    def quantize(name: str) -> tuple[ir.Tensor, float | None]:
        return with_what() if name == at else (zoo[name], None)

    return quantize


def throw(error: BaseException) -> Callable[[], Any]:
    def thrower() -> Any:
        raise error

    return thrower


@pytest.mark.parametrize("at", ["block.bfp", "affine", "double"])
@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), MemoryError(), FileNotFoundError("source")])
def test_failure_leaves_nothing(
    at: str, shard_bytes: int, error: BaseException, zoo: dict[str, ir.Tensor], plan: ir.Model, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(type(error)) as caught:
        ir.write_ir(tmp_path / "out", plan, failing(zoo, at, throw(error)), shard_bytes=shard_bytes)
    assert caught.value is error  # not wrapped: that the source is missing is no fault of the disk
    assert tree(tmp_path) == {"out": None}


@pytest.mark.parametrize("where", ["side files", "progress"])
def test_failing_callbacks(where: str, write_zoo: Writer, tmp_path: Path) -> None:
    error = PermissionError(13, "no")
    arguments = (
        {"write_side_files": lambda _: throw(error)()}
        if where == "side files"
        else {"progress": lambda *_: throw(error)()}
    )
    with pytest.raises(PermissionError):
        write_zoo(tmp_path / "out", **arguments)
    assert tree(tmp_path) == {}


def test_another_tensor_than_promised(zoo: dict[str, ir.Tensor], plan: ir.Model, tmp_path: Path) -> None:
    with pytest.raises(AnyquantError, match=r"affine: became GGMLSpec\(.*promised was AffineSpec") as caught:
        ir.write_ir(tmp_path / "x", plan, failing(zoo, "affine", lambda: (zoo["ggml"], None)))
    assert caught.value.exit_code == 1
    assert tree(tmp_path) == {}


def test_tensor_out_of_range(zoo: dict[str, ir.Tensor], plan: ir.Model, tmp_path: Path) -> None:
    arrays = dict(zoo["affine"].arrays)
    arrays[".scale"] = np.full_like(arrays[".scale"], np.nan)
    with pytest.raises(CorruptFileError, match=r"affine\.scale"):
        ir.write_ir(tmp_path / "x", plan, failing(zoo, "affine", lambda: (ir.Tensor(zoo["affine"].spec, arrays), None)))
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("error", [-0.5, float("nan"), float("inf")])
def test_error_that_is_none(error: float, zoo: dict[str, ir.Tensor], plan: ir.Model, tmp_path: Path) -> None:
    with pytest.raises(AnyquantError, match="affine: error"):
        ir.write_ir(tmp_path / "x", plan, failing(zoo, "affine", lambda: (zoo["affine"], ir.Loss(error))))
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["anyquant.json", "config.json"])
def test_texts_that_cannot_be_written(
    name: str, write_zoo: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == name:
            raise OSError(28, "No space left on device")
        return original(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MachineError, match=f"cannot write {name} .*No space left"):
        write_zoo(tmp_path / "x")
    assert tree(tmp_path) == {}


def test_rename_that_fails(write_zoo: Writer, tmp_path: Path) -> None:
    def occupy(*_: Any) -> None:
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / "somebody else's").write_text("precious")

    with pytest.raises(MachineError, match="Directory not empty"):
        write_zoo(tmp_path / "x", progress=occupy)
    assert tree(tmp_path) == {"x": None, "x/somebody else's": b"precious"}


def test_all_is_on_the_disk_before_the_rename(
    write_zoo: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    renamed_after: list[int] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        renamed_after.append(len(synced))
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    write_zoo(tmp_path / "x", write_side_files=lambda side: (side / "tokenizer.json").write_text("{}") and None)
    before = {Path(p) for p in synced[: renamed_after[0]]}
    assert {p.name for p in before if not p.name.startswith(".")} == set(os.listdir(tmp_path / "x"))
    assert [p for p in before if p.parent == tmp_path]  # the folder itself
    assert synced[renamed_after[0] :] == [str(tmp_path)]


def test_file_systems_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(number: int) -> Callable[[int], None]:
        def raising(_: int) -> None:
            raise OSError(number, "x")

        return raising

    monkeypatch.setattr(os, "fsync", fsync(22))
    writer.sync(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync(5))
    with pytest.raises(OSError, match="x"):
        writer.sync(tmp_path)


CHILD = """
import resource, signal, sys, time
import numpy as np
from anyquant import ir
from anyquant.errors import MachineError

mode, path = sys.argv[1:]
spec = ir.DenseSpec((1024, 1024), "F32")
plan = ir.Model(None, {}, "m", {}, {}, {f"w{i}": ir.Entry(spec) for i in range(4)}, {})

def quantize(name):
    if mode == "interrupt" and name == "w2":
        print("ready", flush=True)
        time.sleep(60)
    return ir.Tensor(spec, {".dense": np.ones((1024, 1024), np.float32)}), None

if mode == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20,) * 2)
try:
    ir.write_ir(path, plan, quantize)
except MachineError as error:
    print(error)
    sys.exit(error.exit_code)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def child(repository: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True, cwd=repository
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_file_that_outgrows_its_limit(child: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """A real failed write, in the middle of the third tensor."""
    output, _ = (process := child("full", str(tmp_path / "x"))).communicate(timeout=60)
    assert process.returncode == 6
    assert "cannot write anyquant.safetensors: File too large. It needs 16,777," in output
    assert tree(tmp_path) == {}


def test_interrupt(child: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = child("interrupt", str(tmp_path / "x"))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert tree(tmp_path) == {}


def test_kill_leaves_nothing_that_looks_finished(child: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = child("interrupt", str(tmp_path / "x"))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait(timeout=60)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".x.partial-")
    with pytest.raises(AnyquantError, match=r"anyquant\.json is missing"):
        ir.open_ir(left)
    shutil.rmtree(left)
