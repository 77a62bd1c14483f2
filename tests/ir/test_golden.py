"""Golden vectors: bytes and values worked out by hand, and one folder byte for byte.

The files in golden/ are the format. If one of these tests fails, the code is wrong, or the format has changed and
needs another version; the files are not to be made again from the code.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.ir.packing import pack
from anyquant.ir.spec import spec_from_json, spec_to_json

GOLDEN = Path(__file__).parent / "golden"
CASES = [
    case
    for kind in ("block", "codebook", "affine", "ggml", "dense")
    for case in json.loads((GOLDEN / f"{kind}.json").read_text(encoding="utf-8"))
]


def key(case: dict[str, Any]) -> str:
    return f"{case['spec']['kind']}: {case['name']}"


def tensor_of(case: dict[str, Any]) -> ir.Tensor:
    spec = spec_from_json("w", case["spec"])
    arrays = {
        suffix: np.frombuffer(bytes.fromhex(case["arrays"][suffix]), dtype).reshape(shape)
        for suffix, (dtype, shape) in spec.arrays().items()
    }
    assert set(arrays) == set(case["arrays"])
    return ir.Tensor(spec, arrays)


@pytest.mark.parametrize("case", CASES, ids=key)
def test_values(case: dict[str, Any]) -> None:
    tensor = tensor_of(case)
    tensor.check("w")
    values = ir.dequantize(tensor)
    expected = np.array(case["values"], np.float64)
    assert values.shape == expected.shape
    np.testing.assert_array_equal(values.astype(np.float64), expected)
    flat = expected.reshape(-1).tolist()
    sha256 = hashlib.sha256(struct.pack(f"<{len(flat)}f", *flat)).hexdigest()
    assert ir.tensor_digest(tensor) == sha256


@pytest.mark.parametrize("case", [case for case in CASES if "codes" in case], ids=key)
def test_packed_codes(case: dict[str, Any]) -> None:
    widths = case.get("widths", [case.get("bits")] * len(case["codes"]))
    packed = [pack(np.array([row]), width) for row, width in zip(case["codes"], widths, strict=True)]
    assert b"".join(p.tobytes() for p in packed) == bytes.fromhex(case["arrays"][".codes"])


@pytest.mark.parametrize("case", CASES, ids=key)
def test_description(case: dict[str, Any]) -> None:
    spec = spec_from_json("w", case["spec"])
    assert spec_to_json(spec) == case["spec"]
    assert spec.nbytes == sum(len(bytes.fromhex(text)) for text in case["arrays"].values())
    if spec.kind == "codebook":
        again = ir.CodebookSpec.from_bits(
            spec.shape,
            case["spec"]["axis"],
            np.array(case["widths"], np.uint8),
            input_scale=case["spec"]["input_scale"],
            outliers=case["spec"]["outliers"],
        )
        assert again == spec


def folder_files() -> dict[str, bytes]:
    """The golden folder; text as lists of lines, the safetensors file as hexadecimal digits."""
    stored = json.loads((GOLDEN / "folder.json").read_text(encoding="utf-8"))
    files = {name: "\n".join(lines).encode() for name, lines in stored["text"].items()}
    return files | {name: bytes.fromhex("".join(lines)) for name, lines in stored["hex"].items()}


def golden_model() -> tuple[ir.Model, dict[str, ir.Tensor]]:
    tensors = {f"layers.{i}.{case['spec']['kind']}.weight": tensor_of(case) for i, case in enumerate(CASES)}
    model = ir.Model(
        path=None,
        config={"model_type": "llama", "architectures": ["LlamaForCausalLM"], "quantization_config": {"old": 1}},
        method="block",
        settings={"bits": 4.5, "größe": [1, None, True]},
        source={"kind": "huggingface", "name": "somebody/model", "fingerprint": "f" * 64},
        entries={
            name: ir.Entry(t.spec, quantized=t.spec.kind != "dense", source_transposed=name.startswith("layers.1."))
            for name, t in tensors.items()
        },
        aliases={"lm_head.weight": "layers.0.block.weight"},
        anyquant_version="0.1.0",
        calibration=None,
    )
    return model, tensors


def test_writer_gives_the_golden_folder(tmp_path: Path) -> None:
    model, tensors = golden_model()
    errors = {name: 3.0 / (i + 7) ** 5 for i, name in enumerate(tensors)}
    ir.write_ir(tmp_path / "ir", model, lambda name: (tensors[name], ir.Loss(errors[name])))
    written = {path.name: path.read_bytes() for path in (tmp_path / "ir").iterdir()}
    expected = folder_files()
    assert set(written) == set(expected)
    for name, content in expected.items():
        assert written[name] == content, name


def test_reader_reads_the_golden_folder(tmp_path: Path) -> None:
    for name, content in folder_files().items():
        (tmp_path / name).write_bytes(content)
    model = ir.open_ir(tmp_path)
    planned, tensors = golden_model()
    assert list(model.entries) == list(tensors)
    assert model.aliases == planned.aliases
    assert model.settings == planned.settings
    assert model.config == {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for (name, entry), case in zip(model.entries.items(), CASES, strict=True):
        values = model.dequantize(name)
        np.testing.assert_array_equal(values, np.array(case["values"], np.float32))
        assert ir.digest(values) == entry.sha256
