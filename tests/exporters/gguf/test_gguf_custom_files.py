"""Files with tensor types of our own: what gguf-py makes of them, and what the exporter writes and reads."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import CorruptFileError
from anyquant.exporters.gguf import GGUFExporter, container, custom
from anyquant.exporters.protocol import ExportOptions
from anyquant.gguf_container import padded, parse
from anyquant.testing import affine_tensor, block_tensor, codebook_tensor

LAYER = "model.layers.0"
EMBEDDING = "model.embed_tokens.weight"
Q_PROJ, K_PROJ, V_PROJ = (f"{LAYER}.self_attn.{part}_proj.weight" for part in "qkv")
GATE_PROJ, UP_PROJ, DOWN_PROJ = (f"{LAYER}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))


# A process of its own: the types that gguf-py knows are those of all its users.
READING = """
import hashlib, json, sys
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from anyquant.exporters.gguf import custom

def tensors(path):
    return [
        [t.name, t.tensor_type.name, t.shape.tolist(), int(t.n_bytes), hashlib.sha256(t.data.tobytes()).hexdigest()]
        for t in GGUFReader(path).tensors
    ]

path, copy = sys.argv[1:]
try:
    unknown = str(tensors(path))
except ValueError as error:
    unknown = str(error)
stock = dict(GGML_QUANT_SIZES)
custom.register()
ours = {name: GGMLQuantizationType(number) for name, (number, _) in custom.TYPES.items()}
custom.register()
assert all(GGMLQuantizationType(number) is ours[name] for name, (number, _) in custom.TYPES.items())
assert all(GGMLQuantizationType[name] is ours[name] for name in custom.TYPES)
assert {**stock, **{ours[name]: (32, size) for name, (_, size) in custom.TYPES.items()}} == GGML_QUANT_SIZES
assert all(kind.value not in custom.NUMBERS for kind in stock)

writer = GGUFWriter(copy, "llama")
for tensor in GGUFReader(path).tensors:
    writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
print(json.dumps({"unknown": unknown, "read": tensors(path), "copied": tensors(copy)}))
"""


def test_gguf_py_reads_and_writes_the_types_once_registered(raw_value: Callable[..., bytes], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {name: (3, 32 * (i + 1)) for i, name in enumerate(custom.TYPES)}
    header = container.header_bytes(
        {"general.architecture": raw_value("llama")}, [(name.lower(), name, shape) for name, shape in shapes.items()]
    )
    data, expected = header, []
    for name, (rows, columns) in shapes.items():
        stored = rng.bytes(rows * columns // 32 * custom.TYPES[name][1])
        expected.append([name.lower(), name, [columns, rows], len(stored), hashlib.sha256(stored).hexdigest()])
        data += stored.ljust(padded(len(stored), 32), b"\0")
    (tmp_path / "x.gguf").write_bytes(data)
    command = [sys.executable, "-c", READING, str(tmp_path / "x.gguf"), str(tmp_path / "copy.gguf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert "is not a valid GGMLQuantizationType" in answer["unknown"]
    assert answer["read"] == expected
    assert answer["copied"] == expected


@pytest.fixture
def own(tensors: dict[str, ir.Tensor]) -> dict[str, ir.Tensor]:
    """The tiny llama, and in it what no stock type holds."""
    return {
        **tensors,
        EMBEDDING: codebook_tensor((50, 64), 0, [3, 4]),
        Q_PROJ: codebook_tensor((64, 64), 0, [2, 3, 0, 1], outliers=30),
        K_PROJ: codebook_tensor((32, 64), 1, [2, 0, 3], scaled=True, outliers=20),
        V_PROJ: affine_tensor(ir.AffineSpec((32, 64), 2, 16)),
        GATE_PROJ: block_tensor(ir.BlockSpec((96, 64), "minifloat", 4, 32, 2)),
        DOWN_PROJ: block_tensor(ir.BlockSpec((64, 96), "log", 3, 32)),
    }


def _export(model: ir.Model, path: Path) -> Any:
    """Export natively; the bytes are those promised, with and without values, and what is read is the model."""
    exporter = GGUFExporter()
    plan = exporter.export(model, path, ExportOptions())
    assert plan == exporter.check(model, ExportOptions())
    assert plan.bytes == path.stat().st_size
    assert plan.bytes == exporter.check(replace(model, path=None, _readers={}), ExportOptions()).bytes
    found = dict(exporter.read(path))
    assert {name: ir.digest(values) for name, values in found.items()} == {
        name: entry.sha256 for name, entry in model.entries.items()
    }
    return plan


def _stored(path: Path, name: str) -> tuple[str, tuple[int, ...], np.ndarray]:
    data = path.read_bytes()
    place = parse(data, path.name).stored(container.TYPES)[name]
    return place.type, place.shape, np.frombuffer(data, np.uint8, place.nbytes, place.offset)


def test_a_model_of_all_kinds(own: dict[str, ir.Tensor], save_tiny: Callable[..., ir.Model], tmp_path: Path) -> None:
    model = save_tiny(own)
    plan = _export(model, tmp_path / "x.gguf")
    taken = {name: plan.types[name] for name, tensor in own.items() if isinstance(tensor.spec, custom.Held)}
    assert taken.pop(EMBEDDING) == "F16"
    assert taken.pop(UP_PROJ) == "Q8_0"  # what a stock type holds stays in it
    assert taken == {name: custom.type_for(own[name].spec) for name in taken}  # type: ignore[arg-type]
    assert len(taken) == 5
    assert None not in taken.values()


@pytest.mark.parametrize(("name", "rows", "heads"), [(Q_PROJ, 64, 4), (K_PROJ, 32, 2)])
def test_rows_of_q_and_k_are_llama_cpp_s(
    own: dict[str, ir.Tensor], save_tiny: Callable[..., ir.Model], tmp_path: Path, name: str, rows: int, heads: int
) -> None:
    """Of codebooks of rows and of columns, and their outliers; still in the IR's kind, as many bytes."""
    model = save_tiny(own)
    _export(model, tmp_path / "x.gguf")
    gguf = f"blk.0.attn_{'q' if name == Q_PROJ else 'k'}.weight"
    type_name, shape, data = _stored(tmp_path / "x.gguf", gguf)
    assert shape == (rows, 64)
    assert type_name == custom.type_for(own[name].spec)  # type: ignore[arg-type]
    found = custom.decode(gguf, shape, data)
    assert found.spec == own[name].spec
    halves = model.dequantize(name).reshape(heads, 2, 8, 64)  # of each head; the converter pairs their rows
    np.testing.assert_array_equal(ir.dequantize(found), halves.swapaxes(1, 2).reshape(rows, 64))
    assert not np.array_equal(ir.dequantize(found), model.dequantize(name))


@pytest.mark.parametrize(("scaled", "expected"), [(False, "F16"), (True, "F32")])
@pytest.mark.parametrize("axis", [0, 1])
def test_embeddings_are_looked_up_and_so_of_a_stock_type(
    own: dict[str, ir.Tensor],
    save_tiny: Callable[..., ir.Model],
    tmp_path: Path,
    axis: int,
    scaled: bool,
    expected: str,
) -> None:
    own[EMBEDDING] = codebook_tensor((50, 64), axis, [3, 0, 4], scaled=scaled, outliers=9)
    plan = _export(save_tiny(own), tmp_path / "x.gguf")
    assert plan.types[EMBEDDING] == expected
    assert _stored(tmp_path / "x.gguf", "token_embd.weight")[0] == expected


@pytest.mark.parametrize(
    ("shape", "bits", "reason"),
    [
        ((96, 64), 8, r"no stock type has a codebook .*, and its [\d,]+ bytes and a header are more than the largest"),
        ((96, 40), 2, r"no stock type has a codebook .*, and rows of 40 are not whole blocks of 32"),
    ],
)
def test_what_no_type_holds_is_refused(
    own: dict[str, ir.Tensor], save_tiny: Callable[..., ir.Model], shape: tuple[int, int], bits: int, reason: str
) -> None:
    own[UP_PROJ] = codebook_tensor(shape, 0, [bits])
    [refusal] = GGUFExporter().check(save_tiny(own), ExportOptions()).refusals
    assert refusal.tensor == UP_PROJ
    assert refusal.remedy.startswith("use --layout f16")
    assert re.match(reason, refusal.reason), refusal.reason


def test_damage_in_a_file_is_named(
    own: dict[str, ir.Tensor], save_tiny: Callable[..., ir.Model], tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    _export(save_tiny(own), path)
    data = path.read_bytes()
    for name, at, message in [
        ("blk.0.attn_q.weight", 300, "checksum of its data"),
        ("blk.0.attn_k.weight", 30, "checksum of its header"),
        ("blk.0.ffn_down.weight", 0, "Another program"),
    ]:
        place = parse(data, path.name).stored(container.TYPES)[name].offset + at
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(CorruptFileError, match=f"^{name}: .*{message}"):
            dict(GGUFExporter().read(path))
