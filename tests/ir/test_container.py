"""The folder: sizes to the byte, what a model says of itself, and folders that contradict themselves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import AnyquantError, CorruptFileError, InputError
from anyquant.ir.container import INDEX, MANIFEST, WEIGHTS, shards

Writer = Callable[..., ir.Model]


def sizes_on_disk(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.fixture
def sharded(write_zoo: Writer, tmp_path: Path) -> Path:
    write_zoo(tmp_path / "sharded", shard_bytes=300)
    return tmp_path / "sharded"


@pytest.mark.parametrize("shard_bytes", [1, 60, 100, 300, 4 << 30])
def test_sizes_to_the_byte(shard_bytes: int, plan: ir.Model, write_zoo: Writer, tmp_path: Path) -> None:
    model = write_zoo(tmp_path / "x", shard_bytes=shard_bytes)
    assert sizes_on_disk(tmp_path / "x") == ir.file_sizes(plan, shard_bytes)
    assert sizes_on_disk(tmp_path / "x") == ir.file_sizes(model, shard_bytes)
    files = [f for f in sizes_on_disk(tmp_path / "x") if f.endswith(".safetensors")]
    if shard_bytes == 1:
        assert len(files) == len(plan.entries)
    if shard_bytes > 1 << 20:
        assert files == [WEIGHTS]


def test_sizes_for_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search for a size asks a few hundred times, with other forms of the tensors each time: little is made anew."""
    forms = [ir.BlockSpec((64, 64), width=width) for width in range(2, 9)]
    names = [f"model.layers.{i}.weight" for i in range(300)]

    def sizes(shift: int) -> dict[str, int]:
        entries = {name: ir.Entry(forms[(i + shift) % 7], quantized=True) for i, name in enumerate(names)}
        return ir.file_sizes(ir.Model(None, {}, "m", {}, {}, entries, {}))

    first, second = sizes(0), sizes(1)
    assert first != second
    made = 0
    dumps = json.dumps

    def counted(*arguments: Any, **options: Any) -> str:
        nonlocal made
        made += 1
        return dumps(*arguments, **options)

    monkeypatch.setattr(json, "dumps", counted)
    assert (sizes(0), sizes(1)) == (first, second)
    assert 0 < made < 10


def test_every_kind_takes_the_bytes_that_its_spec_says(zoo: dict[str, ir.Tensor], tmp_path: Path) -> None:
    for i, (name, tensor) in enumerate(zoo.items()):
        plan = ir.Model(None, {}, "m", {}, {}, {name: ir.Entry(tensor.spec)}, {})
        ir.write_ir(tmp_path / str(i), plan, lambda _, tensor=tensor: (tensor, None))
        raw = (tmp_path / str(i) / WEIGHTS).read_bytes()
        assert len(raw) - 8 - int.from_bytes(raw[:8], "little") == tensor.spec.nbytes


def test_shards_keep_order_and_size(plan: ir.Model) -> None:
    files = shards(plan.entries, 150)
    assert [name for names in files.values() for name in names] == list(plan.entries)
    for names in files.values():
        assert len(names) == 1 or sum(plan.entries[n].spec.nbytes for n in names) <= 150
    count = len(files)
    assert list(files) == [f"anyquant-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


@pytest.mark.parametrize("shard_bytes", [1, 4 << 30])
def test_round_trip(
    shard_bytes: int, zoo: dict[str, ir.Tensor], plan: ir.Model, write_zoo: Writer, tmp_path: Path
) -> None:
    write_zoo(tmp_path / "x", shard_bytes=shard_bytes)
    model = ir.open_ir(str(tmp_path / "x"))
    assert model.has_values
    assert model.path == tmp_path / "x"
    for field in ("config", "method", "settings", "source", "aliases", "anyquant_version", "calibration"):
        assert getattr(model, field) == getattr(plan, field), field
    assert model.files == {}
    assert list(model.entries) == list(zoo)
    for i, (name, tensor) in enumerate(zoo.items()):
        entry = model.entries[name]
        assert entry.spec == tensor.spec
        assert entry.quantized == (tensor.spec.kind != "dense")
        assert entry.error == (pytest.approx(10.0 ** (-20 * i), abs=1e-99) if entry.quantized else None)
        assert entry.sha256 == ir.digest(ir.dequantize(tensor)) == ir.digest(model.dequantize(name))
        found = model.tensor(name)
        assert set(found.arrays) == set(tensor.arrays)
        for suffix, array in tensor.arrays.items():
            assert found.arrays[suffix].dtype == array.dtype
            assert found.arrays[suffix].tobytes() == array.tobytes()
            assert found.arrays[suffix].shape == array.shape


def test_no_key_could_be_taken_for_a_weight(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert not [key for key in header if key.endswith((".weight", ".bias"))]


def test_plan(plan: ir.Model) -> None:
    assert not plan.has_values
    with pytest.raises(AnyquantError, match="affine: this model is a plan"):
        plan.tensor("affine")
    specs = [entry.spec for entry in plan.entries.values()]
    assert plan.nbytes == sum(s.nbytes for s in specs)
    assert plan.bits_per_weight == 8 * plan.nbytes / sum(s.numel for s in specs)
    chosen = [s for s in specs if s.kind != "dense"]
    assert plan.quantized_bits == 8 * sum(s.nbytes for s in chosen) / sum(s.numel for s in chosen)


def test_unknown_name(folder: Path) -> None:
    with pytest.raises(KeyError, match="nowhere"):
        ir.open_ir(folder).tensor("nowhere")


def test_config_of_a_quantized_source(plan: ir.Model, zoo: dict[str, ir.Tensor], tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq"}, "a": "\ud800"}
    model = replace(plan, config={**config, "a": "é"})
    opened = ir.write_ir(tmp_path / "x", model, lambda name: (zoo[name], None))
    assert opened.config == {"a": "é"}
    stored = json.loads((tmp_path / "x" / "config.json").read_text())
    assert stored["quantization_config"] == {"quant_method": "anyquant", "format_version": "1.0"}
    with pytest.raises(AnyquantError, match="surrogates"):
        ir.write_ir(tmp_path / "y", replace(plan, config=config), lambda name: (zoo[name], None))


def test_side_files(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("x")
    (folder / "subfolder").mkdir()
    model = ir.open_ir(folder)
    assert model.files == {n: folder / n for n in ("chat_template.jinja", "tokenizer.json")}


# --- damage


def assert_corrupt(folder: Path, message: str) -> None:
    with pytest.raises(CorruptFileError, match=message) as caught:
        ir.open_ir(folder)
    assert caught.value.exit_code == 3


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no is not a folder\. 'anyquant quantize MODEL -o .*no' writes"):
        ir.open_ir(tmp_path / "no")
    (tmp_path / "source.gguf").write_bytes(b"GGUF")
    # -o must not name the source.
    with pytest.raises(InputError, match=r"is not a folder\. 'anyquant quantize .*source\.gguf -o source-quantized' w"):
        ir.open_ir(tmp_path / "source.gguf")
    with pytest.raises(
        InputError, match=r"anyquant\.json is missing .*not a folder of anyquant's\. 'anyquant quantize MODEL -o DIR' w"
    ):
        ir.open_ir(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST, "config.json"])
def test_missing_files(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        ir.open_ir(folder)
    (folder / name).mkdir()
    assert_corrupt(folder, "not a regular file")


def test_missing_shard_and_index(sharded: Path) -> None:
    index = (sharded / INDEX).read_bytes()
    (sharded / INDEX).unlink()
    with pytest.raises(InputError, match=f"{WEIGHTS} is missing"):
        ir.open_ir(sharded)
    (sharded / INDEX).write_bytes(index)
    ir.open_ir(sharded)
    shard = next(sharded.glob("*-of-*"))
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name} is missing"):
        ir.open_ir(sharded)


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST, "config.json"])
def test_truncated_files(name: str, folder: Path) -> None:
    whole = (folder / name).read_bytes()
    for end in {*range(0, len(whole) - 2, 97), len(whole) - 3}:
        (folder / name).write_bytes(whole[:end])
        assert_corrupt(folder, name)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", ".", "pytorch_model.bin", "\0.safetensors"],
)
def test_index_that_leaves_the_folder(name: str, sharded: Path) -> None:
    (sharded.parent / "x.safetensors").write_bytes(next(sharded.glob("*-of-*")).read_bytes())
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (sharded / INDEX).write_text(json.dumps(index))
    assert_corrupt(sharded, "is not the name of a safetensors file in this folder")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", {"a": 1}, {"a": None}, {"a": ["x.safetensors"]}])
def test_malformed_index(weight_map: Any, sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_corrupt(sharded, "weight_map does not map keys to file names")


def test_index_that_contradicts_the_files(sharded: Path) -> None:
    text = (sharded / INDEX).read_text()
    files = sorted(path.name for path in sharded.glob("*-of-*"))

    def with_map(change: Callable[[dict[str, str]], Any]) -> None:
        index = json.loads(text)
        change(index["weight_map"])
        (sharded / INDEX).write_text(json.dumps(index))

    with_map(lambda m: m.update({"affine.codes": files[0]}))
    assert_corrupt(sharded, "index.json says that 'affine.codes' is in")
    with_map(lambda m: m.pop("affine.codes"))
    assert_corrupt(sharded, "index.json says that 'affine.codes' is in None")
    with_map(lambda m: m.update({"new.codes": files[0]}))
    assert_corrupt(sharded, "does not list 'new.codes'")
    with_map(lambda m: [m.pop(key) for key, file in list(m.items()) if file == files[0]])
    assert_corrupt(sharded, "lists it, but the safetensors files do not hold it")
    shutil.copy(sharded / files[0], sharded / "copy.safetensors")
    with_map(lambda m: m.update({"new.codes": "copy.safetensors"}))
    assert_corrupt(sharded, r"is both in .* and in copy\.safetensors|says that .* it is in copy")
    (sharded / INDEX).write_text(text)
    ir.open_ir(sharded)
    shutil.copy(sharded / files[0], sharded / WEIGHTS)
    assert_corrupt(sharded, "two models are mixed")


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_manifest_that_contradicts_the_weights(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()

    def assert_corrupt_after(change: Callable[[dict[str, Any]], Any], message: str) -> None:
        (folder / MANIFEST).write_text(text)
        edit_manifest(folder, lambda manifest: change(manifest["tensors"]))
        assert_corrupt(folder, message)

    assert_corrupt_after(lambda t: t.pop("affine"), r"does not list 'affine\.(codes|scale|zero)'")
    assert_corrupt_after(lambda t: t.update(b=t["affine"]), r"b\.codes: anyquant\.json lists it")
    assert_corrupt_after(lambda t: t["affine"].update(bits=8), r"affine\.codes in .* must be U8")
    assert_corrupt_after(lambda t: t["affine"].update(shape=[3, 33]), r"affine\.codes in .* must be U8")
    assert_corrupt_after(lambda t: t["affine"].update(shape=[1 << 22, 1 << 22]), r"affine\.codes in .* must be U8")
    assert_corrupt_after(lambda t: t["double"].update(dtype="F32"), r"double\.dense in .* is F64 \[7\], must be F32")
    # As many bytes, so the headers agree: the values decide.
    (folder / MANIFEST).write_text(text)
    edit_manifest(folder, lambda m: m["tensors"]["ggml"].update(shape=[4, 32]))
    assert_corrupt(folder, r"ggml\.blocks in .* must be U8 \[4, 20\]")


def test_wrong_values_are_found_when_they_are_read(folder: Path) -> None:
    model = ir.open_ir(folder)
    raw = bytearray((folder / WEIGHTS).read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    start = 8 + int.from_bytes(raw[:8], "little") + header["affine.scale"]["data_offsets"][0]
    raw[start : start + 2] = b"\x00\x7c"
    (folder / WEIGHTS).write_bytes(raw)
    with pytest.raises(CorruptFileError, match="was changed"):
        model.tensor("affine")
    model = ir.open_ir(folder)
    for read in (model.tensor, model.dequantize):
        with pytest.raises(CorruptFileError, match=r"affine\.scale: a non-finite scale at index \[0, 0\]"):
            read("affine")
    model.tensor("ggml")


def test_links_to_files_are_followed(folder: Path) -> None:
    """The cache of the Hugging Face hub is a folder of links."""
    linked = folder.parent / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        os.symlink(path, linked / path.name)
    model = ir.open_ir(linked)
    np.testing.assert_array_equal(model.dequantize("affine"), ir.open_ir(folder).dequantize("affine"))


def test_folder_that_cannot_be_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        ir.open_ir(folder)
