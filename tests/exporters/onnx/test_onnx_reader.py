"""The reader on folders that were damaged: a refusal that says what is wrong, never a wrong value."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from anyquant import ir
from anyquant.errors import CorruptFileError, InputError, MissingDependency
from anyquant.exporters.onnx import ONNXExporter

pytestmark = pytest.mark.slow  # the model builder runs once


@pytest.fixture(scope="module")
def original(export_tiny: Callable[..., Any]) -> Any:
    """An export with both widths, a padded embedding and 16-bit floats, left untouched."""

    def choose(name: str) -> str:
        if name.endswith("embed_tokens.weight"):
            return "affine8/32"
        return {"up_proj": "bfp4/32", "down_proj": "bfp8/32"}.get(name.split(".")[-2], "")

    return export_tiny(choose, hidden=48, num_attention_heads=3, num_key_value_heads=1, dtype="float16", tied=False)


@pytest.fixture
def folder(original: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original.folder, tmp_path / "model"))


def _edit(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    change(proto)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())


def _read(folder: Path) -> dict[str, np.ndarray]:
    return dict(ONNXExporter().read(folder))


def test_values_and_logits_of_the_original(original: Any, logits_of: Any) -> None:
    found = {name: ir.digest(values) for name, values in ONNXExporter().read(original.folder)}
    assert found == {name: entry.sha256 for name, entry in original.model.entries.items()}
    assert original.plan == original.promised
    assert original.plan.types["model.layers.0.self_attn.q_proj.weight"] == "F16"
    onnxruntime, torch = logits_of(original)
    assert np.abs(onnxruntime - torch).max() <= 1e-3


def test_not_such_a_folder(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="not a folder that"):
        _read(tmp_path)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(InputError, match=r"model\.onnx\.data is missing"):
        _read(folder)


def test_file_of_another_program(folder: Path) -> None:
    _edit(folder, lambda proto: proto.ClearField("metadata_props"))
    with pytest.raises(InputError, match=r"no anyquant\.tensors"):
        _read(folder)


def test_without_onnx(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependency, match=r"anyquant\[onnx\]"):
        _read(folder)


@pytest.mark.parametrize("size", [0, 1000])
def test_truncated_data(folder: Path, size: int) -> None:
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(size)
    with pytest.raises(CorruptFileError, match="the data file has"):
        _read(folder)


def test_truncated_proto(folder: Path) -> None:
    data = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptFileError, match="not an ONNX model"):
        _read(folder)


def test_proto_of_absurd_size(folder: Path) -> None:
    with (folder / "model.onnx").open("r+b") as file:
        file.truncate((1 << 30) + 1)  # a hole, no disk
    with pytest.raises(CorruptFileError, match="more than any graph"):
        _read(folder)


@pytest.mark.parametrize(
    "text",
    ["[]", "{", "1", '{"a": []}', '{"a": [1]}', '{"a": [["x", 0, 1]]}', '{"a": [["x", -1, 1, false]]}', "[" * 10**5],
)
def test_malformed_map(folder: Path, text: str) -> None:
    def change(proto: onnx.ModelProto) -> None:
        for entry in proto.metadata_props:
            if entry.key == "anyquant.tensors":
                entry.value = text

    _edit(folder, change)
    with pytest.raises(CorruptFileError, match="malformed"):
        _read(folder)


@pytest.mark.parametrize(
    "entry", [{}, {"zeros": 1}, {"zeros": [-1]}, {"zeros": ["1"]}, {"zeros": [1 << 40]}, {"zero": [1]}]
)
def test_malformed_zeros(folder: Path, entry: dict[str, object]) -> None:
    def change(proto: onnx.ModelProto) -> None:
        for property in proto.metadata_props:
            if property.key == "anyquant.tensors":
                property.value = json.dumps({"x": entry})

    _edit(folder, change)
    with pytest.raises(CorruptFileError, match="malformed"):
        _read(folder)


def _set_map(proto: onnx.ModelProto, value: object) -> None:
    for entry in proto.metadata_props:
        if entry.key == "anyquant.tensors":
            entry.value = json.dumps({"x": [value]})


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (["no such value", 0, 1, False], "not computed from stored values"),
        (["input_ids", 0, 1, False], "not computed from stored values"),
        (["/model/layers.0/mlp/act_fn/Mul/output_0", 0, 1, False], "Sigmoid|not computed"),
        (["/model/layers.0/mlp/act_fn/Sigmoid/output_0", 0, 1, False], "'Sigmoid' is not one"),
        (["model.layers.0.input_layernorm.weight", 0, 10**6, False], "rows 0 to 1000000"),
    ],
)
def test_map_that_points_astray(folder: Path, place: list[object], message: str) -> None:
    _edit(folder, lambda proto: _set_map(proto, place))
    with pytest.raises(CorruptFileError, match=message):
        _read(folder)


def _external(proto: onnx.ModelProto, suffix: str, key: str, value: str) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name.endswith(suffix))
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", "-64"), ("offset", str(1 << 60)), ("length", "7"), ("location", "/etc/passwd"), ("offset", "x")],
)
def test_bad_external_data(folder: Path, key: str, value: str) -> None:
    _edit(folder, lambda proto: _external(proto, "up_proj.MatMul.weight.low", key, value))
    with pytest.raises(CorruptFileError, match="up_proj"):
        _read(folder)


def _node(proto: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    # The builder has casts of its own, of the attention mask.
    found: onnx.NodeProto = next(n for n in proto.graph.node if n.op_type == op_type and "attn_mask" not in n.name)
    return found


def _attribute(proto: onnx.ModelProto, op_type: str, name: str, value: int) -> None:
    for attribute in _node(proto, op_type).attribute:
        if attribute.name == name:
            attribute.i = value


@pytest.mark.parametrize(
    ("op_type", "name", "value"),
    [
        ("MatMulNBits", "bits", 5),
        ("MatMulNBits", "block_size", 17),
        ("MatMulNBits", "K", 4096),
        ("MatMulNBits", "N", 7),
        ("Cast", "to", 99),
    ],
)
def test_operators_that_contradict_their_data(folder: Path, op_type: str, name: str, value: int) -> None:
    _edit(folder, lambda proto: _attribute(proto, op_type, name, value))
    with pytest.raises(CorruptFileError):
        _read(folder)


def test_other_constants_than_zero_points(folder: Path) -> None:
    def other_value(proto: onnx.ModelProto) -> None:
        _node(proto, "ConstantOfShape").attribute[0].t.raw_data = b"\1"

    def other_size(proto: onnx.ModelProto) -> None:
        tensor = next(t for t in proto.graph.initializer if t.name.startswith("anyquant.zeros"))
        tensor.raw_data = np.array([1 << 30, 1 << 30], np.int64).tobytes()

    whole = (folder / "model.onnx").read_bytes()
    for change, message in ((other_value, "another value"), (other_size, "a constant of shape")):
        (folder / "model.onnx").write_bytes(whole)
        _edit(folder, change)
        with pytest.raises(CorruptFileError, match=message):
            _read(folder)


def test_a_circle_of_operators_ends(folder: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        node = proto.graph.node.add(op_type="Transpose", input=["loop"], output=["loop"])
        assert node.op_type == "Transpose"
        _set_map(proto, ["loop", 0, 1, False])

    _edit(folder, change)
    with pytest.raises(CorruptFileError, match="not computed from stored values"):
        _read(folder)


def test_sum_of_unequal_matrices_and_slices_of_rows(folder: Path) -> None:
    def unequal(proto: onnx.ModelProto) -> None:
        add = next(n for n in proto.graph.node if n.op_type == "Add" and "down_proj" in n.name)
        up = next(n for n in proto.graph.node if n.op_type == "MatMulNBits" and "up_proj" in n.name)
        add.input[0] = up.output[0]

    def rows(proto: onnx.ModelProto) -> None:
        tensor = next(t for t in proto.graph.initializer if t.name == "anyquant.int64.-1")
        tensor.raw_data = np.array([0], np.int64).tobytes()

    whole = (folder / "model.onnx").read_bytes()
    for change, message in ((unequal, "a sum of matrices"), (rows, "a slice along axis 0")):
        (folder / "model.onnx").write_bytes(whole)
        _edit(folder, change)
        with pytest.raises(CorruptFileError, match=message):
            _read(folder)
