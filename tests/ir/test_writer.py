"""Writing: nothing is touched that exists, nothing half-made stays, nothing is written that could not be read."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import AnyquantError, MachineError, UsageError

Writer = Callable[..., ir.Model]


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files included."""
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


# --- where to


@pytest.mark.parametrize("what", ["file", "full folder", "hidden file in it", "link", "dangling link", "link to empty"])
def test_existing_is_refused_untouched(what: str, write_zoo: Writer, tmp_path: Path) -> None:
    path = tmp_path / "out"
    if what == "file":
        path.write_text("precious")
    elif what in ("full folder", "hidden file in it"):
        path.mkdir()
        (path / (".x" if "hidden" in what else "x")).write_text("precious")
    else:
        target = tmp_path / "target"
        if what != "dangling link":
            target.mkdir()
        if what == "link":
            (target / "x").write_text("precious")
        path.symlink_to(target)
    before = tree(tmp_path)

    def never(_: Path) -> None:
        raise AssertionError("nothing is to be written")

    with pytest.raises(UsageError, match=r"out (exists and is not empty|is a symbolic link)") as caught:
        write_zoo(path, write_side_files=never)
    assert caught.value.exit_code == 2
    assert tree(tmp_path) == before


def test_current_folder_is_refused(write_zoo: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be replaced by another one of the same name, and the shell be left in the old one."""
    monkeypatch.chdir(tmp_path)
    for path in (".", tmp_path, ""):
        with pytest.raises(UsageError, match=r"current folder.*model"):
            write_zoo(path)
    with pytest.raises(UsageError, match=r"mount point|not empty"):
        write_zoo("/proc")
    monkeypatch.setattr(Path, "is_mount", lambda _: True)
    (tmp_path / "volume").mkdir()
    with pytest.raises(UsageError, match=r"mount point.*volume/model"):
        write_zoo("volume")


def test_empty_folder_and_new_parents(write_zoo: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("empty", "a/b/c", "../" + tmp_path.name + "/d"):
        model = write_zoo(path)
        assert model.path == (tmp_path / path).resolve()
    assert sorted(os.listdir(tmp_path)) == ["a", "d", "empty"]


def test_folder_that_cannot_be_made(write_zoo: Writer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot make a folder"):
        write_zoo(tmp_path / "file" / "out")


# --- the order of things


def test_calls(zoo: dict[str, ir.Tensor], plan: ir.Model, tmp_path: Path) -> None:
    calls: list[Any] = []

    def quantize(name: str) -> tuple[ir.Tensor, float | None]:
        calls.append(name)
        return zoo[name], None

    def side_files(folder: Path) -> None:
        calls.append("side files")
        (folder / "tokenizer.json").write_text("{}")

    def progress(name: str, done: int, total: int) -> None:
        calls.append((name, done, total))

    model = ir.write_ir(tmp_path / "x", plan, quantize, side_files, progress=progress, shard_bytes=100)
    expected: list[Any] = ["side files"]
    for i, name in enumerate(zoo, 1):
        expected += [name, (name, i, len(zoo))]
    assert calls == expected
    assert model.files == {"tokenizer.json": tmp_path / "x" / "tokenizer.json"}


def test_same_bytes_twice(write_zoo: Writer, tmp_path: Path) -> None:
    for shard_bytes in (100, 1 << 30):
        write_zoo(tmp_path / f"a{shard_bytes}", shard_bytes=shard_bytes)
        write_zoo(tmp_path / f"b{shard_bytes}", shard_bytes=shard_bytes)
        assert tree(tmp_path / f"a{shard_bytes}") == tree(tmp_path / f"b{shard_bytes}")


def test_copy_of_an_opened_model(write_zoo: Writer, tmp_path: Path) -> None:
    """An opened model is a plan as well: refinement reads one folder and writes another."""
    first = write_zoo(tmp_path / "a")

    def copy(name: str) -> tuple[ir.Tensor, ir.Loss | None]:
        entry = first.entries[name]
        return first.tensor(name), None if entry.error is None else ir.Loss(entry.error, entry.output_error)

    ir.write_ir(tmp_path / "b", first, copy)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_arrays_in_any_memory_order(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensor = ir.Tensor(ir.DenseSpec((4, 3), "F32"), {".dense": values.T})
    plan = ir.Model(None, {}, "m", {}, {}, {"w": ir.Entry(tensor.spec)}, {})
    model = ir.write_ir(tmp_path / "x", plan, lambda _: (tensor, None))
    np.testing.assert_array_equal(model.dequantize("w"), values.T)
    assert model.entries["w"].sha256 == ir.digest(values.T)


def test_side_config_gives_way(zoo: dict[str, ir.Tensor], plan: ir.Model, tmp_path: Path) -> None:
    def side_files(folder: Path) -> None:
        (folder / "config.json").write_text('{"from": "source"}')

    model = ir.write_ir(tmp_path / "x", plan, lambda name: (zoo[name], None), side_files)
    assert model.config == plan.config


@pytest.mark.parametrize("name", ["anyquant.json", "anyquant.safetensors", "anyquant.safetensors.index.json"])
def test_side_files_that_would_mix_two_models(name: str, write_zoo: Writer, tmp_path: Path) -> None:
    with pytest.raises(AnyquantError, match=f"{name} is among the side files"):
        write_zoo(tmp_path / "x", write_side_files=lambda folder: (folder / name).write_text("{}") and None)
    assert tree(tmp_path) == {}


# --- what cannot be read is not written

DENSE = ir.Entry(ir.DenseSpec((1,), "F32"))
OURS, THEIRS = 1, 3  # exit codes: a fault of anyquant's, a fault of the source


def nested(depth: int) -> list[Any]:
    deep: list[Any] = []
    for _ in range(depth):
        deep = [deep]
    return deep


@pytest.mark.parametrize(
    ("change", "message", "code"),
    [
        ({"settings": {"x": (1, 2)}}, "settings would not come back from JSON", OURS),
        ({"settings": {1: 2}}, "settings would not come back", OURS),
        ({"settings": {"x": float("nan")}}, "cannot be written as JSON", OURS),
        ({"settings": {"x": np.int64(1)}}, "cannot be written as JSON", OURS),
        ({"settings": {"x": "\ud800"}}, "could not be read back.*surrogates", OURS),
        ({"settings": {"x": nested(3000)}}, "deep|recursion", OURS),
        ({"source": {"name": 3}}, "could not be read back.*'name'", OURS),
        ({"source": {"name": "\udcff.gguf"}}, "could not be read back.*surrogates.*Rename its file", THEIRS),
        ({"calibration": {"x": ()}}, "calibration would not come back", OURS),
        ({"config": {"x": object()}}, "could not be read back", OURS),
        ({"config": {"x": "\ud800"}}, "could not be read back.*surrogates", THEIRS),
        ({"config": {"x": nested(70)}}, "could not be read back.*more than 64 deep", THEIRS),
        ({"config": {"x": nested(3000)}}, "could not be read back.*more than 64 deep", THEIRS),
        ({"method": ""}, "could not be read back.*'method'", OURS),
        ({"aliases": {"a": "nowhere"}}, "could not be read back.*alias", OURS),
        ({"aliases": {"a\n": "ggml"}}, "no name for a tensor", THEIRS),
        ({"entries": {}}, "lists no tensors", OURS),
        ({"entries": {"a\x00b": DENSE}, "aliases": {}}, "no name for a tensor", THEIRS),
        ({"entries": {"": DENSE}, "aliases": {}}, "no name for a tensor", THEIRS),
    ],
)
def test_unreadable_descriptions(
    change: dict[str, Any], message: str, code: int, plan: ir.Model, tmp_path: Path
) -> None:
    def never(name: str) -> tuple[ir.Tensor, float | None]:
        raise AssertionError("found out before the first weight is read")

    with pytest.raises(AnyquantError, match=message) as caught:
        ir.write_ir(tmp_path / "x", replace(plan, **change), never)
    assert caught.value.exit_code == code
    assert tree(tmp_path) == {}
