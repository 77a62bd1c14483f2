"""Tensors of files against the IR's manifest."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anyquant import ir
from anyquant.exporters.protocol import ExportOptions
from anyquant.exporters.registry import get_exporter
from anyquant.gguf_container import map_file, parse
from anyquant.validation.arithmetic import gguf_arithmetic
from anyquant.validation.gates import tensor_gate
from anyquant.validation.tensors import _is_rounded, compare_export, compare_file, compare_ir


@pytest.fixture
def model(tiny_ir: Path) -> ir.Model:
    return ir.open_ir(tiny_ir)


def values(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: model.dequantize(name) for name in model.entries}


def test_an_ir_equals_its_manifest(model: ir.Model) -> None:
    calls: list[tuple[str, int, int]] = []
    found = compare_ir(model, lambda *call: calls.append(call))
    assert (found.equal, found.total, found.differences) == (len(model.entries), len(model.entries), ())
    assert found.n_values == sum(e.spec.numel for e in model.entries.values())
    assert calls[-1][1:] == (found.total, found.total)
    assert tensor_gate(found).passed


def test_an_edited_ir_is_found(tiny_ir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(tiny_ir, folder)
    arrays = load_file(folder / "anyquant.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name + ".codes"][3, 0] ^= 1
    norm = "model.norm.weight"
    arrays[norm + ".dense"][0] = np.nan
    save_file(arrays, folder / "anyquant.safetensors", {"format": "anyquant"})
    found = compare_ir(ir.open_ir(folder))
    assert {d.tensor for d in found.differences} == {name, norm}
    assert found.equal == found.total - 2
    assert not tensor_gate(found).passed


def test_a_faithful_file_is_equal(model: ir.Model) -> None:
    found = compare_file(model, "GGUF", values(model).items())
    assert (found.equal, found.differences) == (found.total, ())


def test_minus_zero_counts_as_zero(model: ir.Model) -> None:
    name = next(n for n, e in model.entries.items() if e.spec.kind == "block")
    data = values(model)
    zeros = np.argwhere(data[name] == 0)
    assert len(zeros)
    data[name][tuple(zeros[0])] = -0.0
    assert compare_file(model, "GGUF", data.items()).equal == len(model.entries)


def test_one_changed_value_is_located(model: ir.Model) -> None:
    data = values(model)
    name = "model.layers.0.self_attn.q_proj.weight"
    before = float(data[name][2, 5])
    data[name][2, 5] = np.nextafter(np.float32(before), np.float32(9))
    found = compare_file(model, "ONNX", data.items())
    (difference,) = found.differences
    assert (difference.tensor, difference.index, difference.expected) == (name, (2, 5), before)
    assert difference.found != before
    assert "1 of 4,096 values differ" in difference.problem
    gate = tensor_gate(found)
    assert not gate.passed
    assert gate.subject == "ONNX"
    assert "[2, 5]" in gate.detail


def test_a_nan_in_a_file_is_located(model: ir.Model) -> None:
    data = values(model)
    data["model.norm.weight"][7] = np.nan
    (difference,) = compare_file(model, "GGUF", data.items()).differences
    assert difference.index == (7,)


def test_missing_extra_and_misshapen_tensors(model: ir.Model) -> None:
    data = values(model)
    gone = "model.norm.weight"
    del data[gone]
    turned = "model.layers.0.mlp.up_proj.weight"
    data[turned] = np.ascontiguousarray(data[turned].T)
    data["surprise"] = np.zeros(3, dtype=np.float32)
    found = compare_file(model, "GGUF", data.items())
    problems = {d.tensor: d.problem for d in found.differences}
    assert problems[gone] == "missing in the file"
    assert "has shape [64, 96], the IR [96, 64]" in problems[turned]
    assert "no tensor of this name" in problems["surprise"]
    assert found.equal == found.total - 2


ALLOWED = "written with --allow-rounding"


def test_rounding_is_reported_not_failed_but_a_missing_tensor_fails(model: ir.Model) -> None:
    data = {name: v.astype(np.float16).astype(np.float32) for name, v in values(model).items()}
    rounded = compare_file(model, "GGUF", data.items(), rounding=ALLOWED)
    assert 0 < rounded.equal < rounded.total
    gate = tensor_gate(rounded)
    assert gate.passed
    assert ALLOWED in gate.detail
    assert not tensor_gate(compare_file(model, "GGUF", data.items())).passed
    del data["model.norm.weight"]
    assert not tensor_gate(compare_file(model, "GGUF", data.items(), rounding=ALLOWED)).passed


def test_a_norm_stored_plus_one_may_be_rounded(model: ir.Model) -> None:
    data = values(model)
    name = "model.norm.weight"
    small = data[name] * np.float32(1e-3)
    assert _is_rounded(small, (small + np.float32(1)) - np.float32(1))
    assert not _is_rounded(small, small + np.float32(1e-4))
    matrix = next(v for v in data.values() if v.ndim == 2)
    assert not _is_rounded(matrix, (matrix + np.float32(1)) - np.float32(1))


@pytest.mark.parametrize("damage", ["reversed rows", "one value", "BF16", "beyond FP16"])
def test_rounding_excuses_nothing_else(model: ir.Model, damage: str) -> None:
    data = {name: v.astype(np.float16).astype(np.float32) for name, v in values(model).items()}
    name = "model.embed_tokens.weight"
    if damage == "reversed rows":
        data[name] = data[name][::-1].copy()
    elif damage == "one value":
        data[name][3, 4] += np.float32(2.0**-8)
    elif damage == "BF16":
        data[name] = (model.dequantize(name).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    else:
        data[name][3, 4] = np.inf
    found = compare_file(model, "ONNX", data.items(), rounding=ALLOWED)
    assert [d.tensor for d in found.differences if not d.rounded] == [name]
    assert not tensor_gate(found).passed


def test_an_f16_file_has_no_excuse_of_its_own(model: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "f16.gguf"
    get_exporter("gguf").export(model, path, ExportOptions(layout="f16"))  # BFP4 is exact in FP16
    header = parse(map_file(path), str(path))
    assert header.get("anyquant.layout") == "f16"
    rounding = gguf_arithmetic(header).rounding
    assert rounding == ""
    found = compare_export(model, "gguf", path, rounding=rounding)
    assert (found.equal, found.differences) == (found.total, ())
    data = values(model)
    name = "model.layers.0.mlp.up_proj.weight"
    data[name] = data[name][::-1].copy()
    assert not tensor_gate(compare_file(model, "GGUF", data.items(), rounding=rounding)).passed


def test_tied_tensors_come_under_either_name(model: ir.Model) -> None:
    assert model.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    data = values(model)
    data["lm_head.weight"] = data["model.embed_tokens.weight"]
    assert compare_file(model, "ONNX", data.items()).equal == len(model.entries)
    del data["model.embed_tokens.weight"]
    assert compare_file(model, "ONNX", data.items()).equal == len(model.entries)
    data["lm_head.weight"] = data["lm_head.weight"] + 1
    (difference,) = compare_file(model, "ONNX", data.items()).differences
    assert difference.tensor == "lm_head.weight"


def test_one_bad_copy_of_a_tied_tensor_is_enough(model: ir.Model) -> None:
    data = values(model)
    data["lm_head.weight"] = data["model.embed_tokens.weight"] + 1
    found = compare_file(model, "ONNX", data.items())
    assert found.equal == found.total - 1


def test_an_exported_file_through_its_exporter(model: ir.Model, tiny_gguf: Path) -> None:
    found = compare_export(model, "gguf", tiny_gguf)
    assert (found.file, found.equal, found.differences) == ("GGUF", len(model.entries), ())
