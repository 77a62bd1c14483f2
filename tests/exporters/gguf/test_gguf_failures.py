"""Exports that must not happen or cannot end: what is there stays, nothing half-made is left, sources are checked."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import AnyquantError, CorruptFileError, MachineError, UnknownArchitecture, UsageError
from anyquant.exporters.gguf import GGUFExporter, container, write
from anyquant.exporters.protocol import ExportOptions


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")])
def test_an_interrupted_export_leaves_nothing(model: ir.Model, tmp_path: Path, error: BaseException) -> None:
    def interrupt(name: str, done: int, count: int) -> None:
        if done == 3:
            raise error

    path = tmp_path / "out" / "x.gguf"
    with pytest.raises(type(error)):
        GGUFExporter().export(model, path, ExportOptions(), interrupt)
    assert not list(path.parent.iterdir())


def test_nothing_that_exists_is_replaced(model: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "older").write_bytes(b"older")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "older", tmp_path / "dangling", Path("/dev/null")):
        with pytest.raises(UsageError, match=r"exists\. Choose another -o"):
            GGUFExporter().export(model, path, ExportOptions("wrong too, but told later"))
    assert (tmp_path / "older").read_bytes() == b"older"

    def appear(name: str, done: int, count: int) -> None:
        (tmp_path / "new").write_bytes(b"of somebody else")

    with pytest.raises(UsageError, match="exists"):
        GGUFExporter().export(model, tmp_path / "new", ExportOptions(), appear)
    assert (tmp_path / "new").read_bytes() == b"of somebody else"
    assert not list(tmp_path.glob(".*"))


def test_a_temporary_file_of_somebody_else_is_left_alone(
    model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write.secrets, "token_hex", lambda count: "0")
    other = tmp_path / ".x.gguf.partial-0"
    other.write_bytes(b"other")
    with pytest.raises(MachineError, match="File exists"):
        GGUFExporter().export(model, tmp_path / "x.gguf", ExportOptions())
    assert other.read_bytes() == b"other"


def test_a_full_disk_is_the_machine_s_fault(model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write.os, "fsync", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(MachineError, match=r"No space left on device.*bytes are needed; nothing was left"):
        GGUFExporter().export(model, tmp_path / "out" / "x.gguf", ExportOptions())
    assert not list((tmp_path / "out").iterdir())


def test_a_disk_without_room_is_noticed_beforehand(
    model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = write.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MachineError, match="10 are free"):
        GGUFExporter().export(model, tmp_path / "x.gguf", ExportOptions())


def test_a_tensor_of_another_size_than_promised_stops_the_file(tmp_path: Path) -> None:
    parts = [np.zeros(8, np.uint8)]
    with pytest.raises(AnyquantError, match="t: became 8 bytes, promised were 9"):
        write.write_file(tmp_path / "x", b"", [("t", 9, parts)], 32, 32)
    with pytest.raises(AnyquantError, match="x: became 32 bytes, promised were 64"):
        write.write_file(tmp_path / "x", b"", [("t", 8, parts)], 32, 64)
    assert not list(tmp_path.iterdir())


def test_wrong_requests(model: ir.Model, tmp_path: Path) -> None:
    exporter = GGUFExporter()
    with pytest.raises(UsageError, match="unknown layout 'q4'"):
        exporter.check(model, ExportOptions("q4"))
    with pytest.raises(UsageError, match="is a plan"):
        exporter.export(replace(model, path=None, _readers={}), tmp_path / "x.gguf", ExportOptions())
    with pytest.raises(UsageError, match="is a folder"):
        exporter.export(model, tmp_path, ExportOptions())


def test_sources_without_metadata(model: ir.Model, raw_value: Callable[[object], bytes], tmp_path: Path) -> None:
    exporter = GGUFExporter()
    with pytest.raises(CorruptFileError, match=r"source\.gguf is missing"):
        exporter.check(replace(model, files={}), ExportOptions())
    plan = exporter.check(replace(model, path=None, _readers={}, files={}), ExportOptions())
    assert "count tensors only" in plan.notes[0]
    assert plan.bytes > 50 * 64 * 2
    hub = {"kind": "huggingface", "name": "a/b", "fingerprint": ""}
    assert (
        "count tensors only"
        in exporter.check(replace(model, path=None, _readers={}, files={}, source=hub), ExportOptions()).notes[0]
    )
    with pytest.raises(UnknownArchitecture, match=r"model_type is 'opt'.*known: llama"):
        exporter.check(replace(model, path=None, _readers={}, files={}, config={"model_type": "opt"}), ExportOptions())
    for content, message in [
        (b"", "not a GGUF file"),
        (container.header_bytes({}, []), "general.architecture is missing"),
        (container.header_bytes({"general.architecture": raw_value("rwkv")}, []), "is 'rwkv'"),
    ]:
        (tmp_path / "source.gguf").write_bytes(content)
        broken = replace(model, files={"source.gguf": tmp_path / "source.gguf"})
        with pytest.raises(AnyquantError, match=message):
            exporter.check(broken, ExportOptions())
