"""The exporter on tiny models that came from GGUF: layouts, bytes promised and kept, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from anyquant import ir
from anyquant.errors import (
    CorruptFileError,
    ExportRefused,
)
from anyquant.exporters.gguf import GGUFExporter, container
from anyquant.exporters.protocol import ExportOptions
from anyquant.gguf_container import parse
from anyquant.testing import codebook_tensor

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LAYER = "model.layers.0"
Q_PROJ = f"{LAYER}.self_attn.q_proj.weight"
UP_PROJ = f"{LAYER}.mlp.up_proj.weight"


def _dense(values: np.ndarray, dtype: str = "F32") -> ir.Tensor:
    return ir.Tensor(ir.DenseSpec(values.shape, dtype), {".dense": values})


def _planned(model: ir.Model, **changes: Any) -> ir.Model:
    return replace(model, path=None, _readers={}, **changes)


def _export(model: ir.Model, path: Path, **options: Any) -> Any:
    exporter = GGUFExporter()
    plan = exporter.export(model, path, ExportOptions(**options))
    assert plan == exporter.check(model, ExportOptions(**options))
    assert plan.bytes == path.stat().st_size
    found = dict(exporter.read(path))
    assert set(found) == set(model.entries)
    return plan, found


def _assert_equal(model: ir.Model, found: dict[str, np.ndarray]) -> None:
    for name, entry in model.entries.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == entry.spec.shape
        assert ir.digest(found[name]) == entry.sha256, name


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("native", ["F16", "F32", "Q4_0", "Q5_0", "F32", "Q8_0", "F32"]),
        ("f32", ["F16", "F32", "F32", "F32", "F32", "F32", "F32"]),
        ("f16", ["F16", "F32", "F16", "F16", "F32", "F16", "F32"]),
    ],
)
def test_every_layout_holds_every_value_in_the_bytes_promised(
    model: ir.Model, tmp_path: Path, layout: str, expected: list[str]
) -> None:
    plan, found = _export(model, tmp_path / "out" / "x.gguf", layout=layout)
    assert list(plan.types.values()) == expected
    assert list(found) == list(model.entries)
    _assert_equal(model, found)
    assert plan.bytes == GGUFExporter().check(_planned(model), ExportOptions(layout)).bytes
    assert plan.temporary_disk == 0
    assert plan.peak_memory > 50 * 64 * 2
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.gguf"]


def test_rows_of_q_and_k_are_llama_cpp_s(model: ir.Model, tmp_path: Path) -> None:
    _export(model, tmp_path / "x.gguf", layout="f32")
    stored = {t.name: np.asarray(t.data) for t in GGUFReader(tmp_path / "x.gguf").tensors}
    heads = model.dequantize(Q_PROJ).reshape(4, 2, 8, 64)  # the converter pairs the halves of each head
    np.testing.assert_array_equal(stored["blk.0.attn_q.weight"], heads.transpose(0, 2, 1, 3).reshape(64, 64))
    np.testing.assert_array_equal(stored["blk.0.ffn_up.weight"], model.dequantize(UP_PROJ))


def test_key_values_come_back_with_their_types(model: ir.Model, source: dict[str, bytes], tmp_path: Path) -> None:
    _export(model, tmp_path / "x.gguf")
    header = parse((tmp_path / "x.gguf").read_bytes(), "x.gguf")
    changed = {"general.file_type", "split.count"}
    assert {k: v for k, v in header.values.items() if k in source and k not in changed} == {
        k: v for k, v in source.items() if k not in changed
    }
    assert "split.count" not in header.values
    assert header.get("general.file_type") == 7  # most weights are in Q8_0
    assert header.get("general.quantization_version") == 2
    assert header.get("anyquant.method") == "block"
    assert json.loads(header.get("anyquant.settings")) == {"width": 4}
    assert header.get("anyquant.layout") == "native"
    assert header.get("anyquant.source_fingerprint") == "f" * 64
    assert header.get("anyquant.version")
    assert "anyquant.allow_rounding" not in header.values


def test_alignment_and_tensors_of_the_source_are_kept(
    tensors: dict[str, ir.Tensor],
    source: dict[str, bytes],
    raw_value: Callable[[object], bytes],
    save_tiny: Callable[..., ir.Model],
    tmp_path: Path,
) -> None:
    factors = np.arange(8, dtype=np.float32)
    header = container.header_bytes(
        {**source, "general.alignment": raw_value(128)}, [("rope_freqs.weight", "F32", (8,))], 128
    )
    files = {"source.gguf": header + factors.tobytes()}
    model = save_tiny(tensors, files=files)
    _, found = _export(model, tmp_path / "x.gguf")
    _assert_equal(model, found)
    reader = GGUFReader(tmp_path / "x.gguf")
    assert all(tensor.data_offset % 128 == 0 for tensor in reader.tensors)
    np.testing.assert_array_equal(reader.tensors[0].data, factors)


def test_planning_with_the_whole_source_file_counts_the_same(
    model: ir.Model, source: dict[str, bytes], tmp_path: Path
) -> None:
    """Its tensors, even of types not known here, are no metadata."""
    data = container.header_bytes(source, [("blk.0.attn_q.weight", "F32", (8,)), ("output.weight", "F32", (8,))])
    kind = data.index(b"output.weight") + len("output.weight") + 4 + 8
    whole = tmp_path / "whole.gguf"
    whole.write_bytes(data[:kind] + b"\x63" + data[kind + 1 :] + bytes(64))
    planned = _planned(model, files={"source.gguf": whole})
    exporter = GGUFExporter()
    assert exporter.check(planned, ExportOptions()).bytes == exporter.check(model, ExportOptions()).bytes


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (LLAMA3, {"rope_freqs.weight"}),
        (
            {"rope_type": "longrope", "long_factor": [1.5] * 8, "short_factor": [1.0] * 8},
            {"rope_factors_long.weight", "rope_factors_short.weight"},
        ),
        ({"rope_type": "linear", "factor": 2.0}, set()),
    ],
)
def test_rotary_factors_of_the_config_become_tensors_again(
    model: ir.Model, tmp_path: Path, scaling: dict[str, Any], expected: set[str]
) -> None:
    scaled = replace(model, config={**model.config, "rope_theta": 10000.0, "rope_scaling": scaling})
    _export(scaled, tmp_path / "x.gguf")
    found = {t.name: np.asarray(t.data) for t in GGUFReader(tmp_path / "x.gguf").tensors if "rope" in t.name}
    assert set(found) == expected
    if "rope_freqs.weight" in found:
        assert found["rope_freqs.weight"].shape == (8,)
        assert found["rope_freqs.weight"][0] == 1.0
        assert found["rope_freqs.weight"][-1] == 8.0
    elif expected:
        np.testing.assert_array_equal(found["rope_factors_long.weight"], [1.5] * 8)


def test_stock_blocks_are_copied_verbatim_in_llama_cpp_s_row_order(
    tensors: dict[str, ir.Tensor], save_tiny: Callable[..., ir.Model], tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (64, 40), dtype=np.uint8)
    blocks[:, [1, 3, 21, 23]] &= 0x3B  # finite FP16 scales
    tensors[Q_PROJ] = ir.Tensor(ir.GGMLSpec((64, 64), "Q4_1"), {".blocks": blocks})
    model = save_tiny(tensors)
    for layout in ("native", "f32", "f16"):
        plan, found = _export(model, tmp_path / layout, layout=layout)
        assert plan.types[Q_PROJ] == "Q4_1"
        _assert_equal(model, found)
        stored = {t.name: t.data for t in GGUFReader(tmp_path / layout).tensors}["blk.0.attn_q.weight"]
        np.testing.assert_array_equal(stored, blocks.reshape(4, 2, 8, 40).swapaxes(1, 2).reshape(64, 40))


@pytest.mark.parametrize("axis", [0, 1])
def test_codebooks_in_all_layouts(
    tensors: dict[str, ir.Tensor],
    save_tiny: Callable[..., ir.Model],
    tmp_path: Path,
    axis: int,
) -> None:
    tensors[UP_PROJ] = codebook_tensor((96, 64), axis, 0, scaled=True)
    model = save_tiny(tensors)
    plan, found = _export(model, tmp_path / "own.gguf")
    assert plan.types[UP_PROJ] == "ANYQUANT_2_0"
    _assert_equal(model, found)
    with pytest.raises(ExportRefused, match=r"(?s)values are not exactly an FP16.*--allow-rounding"):
        GGUFExporter().export(model, tmp_path / "x.gguf", ExportOptions("f16"))
    assert not (tmp_path / "x.gguf").exists()
    plan, found = _export(model, tmp_path / "x.gguf", layout="f32")
    _assert_equal(model, found)
    plan, found = _export(model, tmp_path / "y.gguf", layout="f16", allow_rounding=True)
    assert "rounded" in plan.notes[0]
    np.testing.assert_array_equal(found[UP_PROJ], model.dequantize(UP_PROJ).astype(np.float16))
    header = parse((tmp_path / "y.gguf").read_bytes(), "x")
    assert header.get("anyquant.allow_rounding") is True


def test_values_beyond_fp16_are_refused_even_where_rounding_is_allowed(
    tensors: dict[str, ir.Tensor],
    bfp: Callable[..., ir.Tensor],
    save_tiny: Callable[..., ir.Model],
) -> None:
    tensors[UP_PROJ] = bfp(np.full((96, 64), 7), np.full((96, 2), 17), 4, 32)
    model = save_tiny(tensors)
    plan = GGUFExporter().check(model, ExportOptions("f16", allow_rounding=True))
    assert [(r.tensor, "65504" in r.reason) for r in plan.refusals] == [(UP_PROJ, True)]


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("model.layers.0.mixer.weight", _dense(np.zeros((2, 2), np.float32)), "no GGUF name is known"),
        ("embed_tokens.weight", _dense(np.zeros((2, 2), np.float32)), "would be written twice"),
        (
            f"{LAYER}.self_attn.v_proj.weight",
            ir.Tensor(
                ir.BlockSpec((2, 40), "bfp", 2, 32),
                {".codes": np.zeros((2, 16), np.uint8), ".exponents": np.full((2, 2), -128, np.int8)},
            ),
            "not a multiple of 32",
        ),
        (f"{LAYER}.mlp.down_proj.bias", _dense(np.array([0.1])[:, None], "F64"), "not exactly an F32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tensors: dict[str, ir.Tensor],
    save_tiny: Callable[..., ir.Model],
    tmp_path: Path,
    name: str,
    tensor: ir.Tensor,
    reason: str,
) -> None:
    model = save_tiny({**tensors, name: tensor})
    plan = GGUFExporter().check(model, ExportOptions())
    assert [r.tensor for r in plan.refusals] == [name]
    assert reason in plan.refusals[0].reason
    with pytest.raises(ExportRefused, match="1 of 8 tensors"):
        GGUFExporter().export(model, tmp_path / "x.gguf", ExportOptions())


def test_blocks_that_no_stock_type_holds(
    tensors: dict[str, ir.Tensor],
    bfp: Callable[..., ir.Tensor],
    save_tiny: Callable[..., ir.Model],
    tmp_path: Path,
) -> None:
    exponents = np.tile([0, 3], (96, 2))
    tensors[UP_PROJ] = bfp(np.full((96, 64), 31), exponents, 6, 16)
    model = save_tiny(tensors)
    plan, found = _export(model, tmp_path / "x.gguf")
    assert plan.types[UP_PROJ] == "ANYQUANT_8_5"
    _assert_equal(model, found)
    plan = GGUFExporter().check(_planned(model), ExportOptions())
    assert plan.types[UP_PROJ] == "Q8_0"
    assert "3 tensors are assumed to fit" in plan.notes[0]


def test_heads_that_contradict_the_shape(model: ir.Model) -> None:
    wrong = replace(model, config={**model.config, "head_dim": 32})
    plan = GGUFExporter().check(wrong, ExportOptions())
    assert "heads in config.json make 128" in plan.refusals[0].reason


@pytest.mark.parametrize("value", [None, "abc", 0, -4, [4], 4.5, True, 10**11])
def test_heads_that_are_no_number(model: ir.Model, value: object) -> None:
    with pytest.raises(CorruptFileError, match="num_attention_heads of the configuration is"):
        GGUFExporter().check(replace(model, config={**model.config, "num_attention_heads": value}), ExportOptions())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": [16]}, r"head_dim of the configuration is \[16\]"),
        ({"head_dim": 15}, "a head has 15 rows"),
        ({"hidden_size": 2}, "a head has 0 rows"),
        ({"hidden_size": None}, "hidden_size of the configuration is None"),
        ({"num_key_value_heads": "x"}, "num_key_value_heads of the configuration is 'x'"),
        ({"rope_scaling": "x"}, "rope_scaling in config.json is 'x'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor of the rotary scaling in config.json is None"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "not below high_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "factor": float("inf")}}, "factor of the rotary scaling in config.json is inf"),
        ({"rope_scaling": LLAMA3, "rope_theta": "x"}, "rope_theta of the rotary scaling in config.json is 'x'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "long_factor of rope_scaling in config.json is None"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1, "x"]}}, "long_factor of the .* is 'x'"),
    ],
)
def test_sizes_of_the_config_that_are_odd(model: ir.Model, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptFileError, match=message):
        GGUFExporter().check(replace(model, config={**model.config, **changes}), ExportOptions())


def test_heads_beyond_the_rows_allocate_nothing(model: ir.Model) -> None:
    """An order of 2**39 rows would be 4 TiB."""
    huge = {**model.config, "num_attention_heads": 1 << 20, "num_key_value_heads": 1 << 20, "head_dim": 1 << 19}
    plan = GGUFExporter().check(replace(model, config=huge), ExportOptions())
    assert f"heads in config.json make {1 << 39} rows" in plan.refusals[0].reason


def test_exact_f64_and_names_without_prefix(
    tensors: dict[str, ir.Tensor], save_tiny: Callable[..., ir.Model], tmp_path: Path
) -> None:
    """A checkpoint of the bare model has no "model." in its names; the file remembers them."""
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    bare["norm.weight"] = _dense(np.linspace(0, 1, 65)[:64].astype(np.float32).astype(np.float64), "F64")
    model = save_tiny(bare)
    plan, found = _export(model, tmp_path / "x.gguf")
    assert plan.types["norm.weight"] == "F32"
    _assert_equal(model, found)


def test_norms_of_gemma_are_written_plus_one(
    raw_value: Callable[[object], bytes], save_ir: Callable[..., ir.Model], tmp_path: Path
) -> None:
    norms = np.array([0.25, -0.5, 0.0], np.float32)
    files = {"source.gguf": container.header_bytes({"general.architecture": raw_value("gemma2")}, [])}
    model = save_ir(tmp_path / "ir", {"model.norm.weight": _dense(norms)}, {}, kind="gguf", files=files)
    _, found = _export(model, tmp_path / "x.gguf")
    _assert_equal(model, found)
    np.testing.assert_array_equal(GGUFReader(tmp_path / "x.gguf").tensors[0].data, norms + 1)

    tiny = save_ir(
        tmp_path / "ir2", {"model.norm.weight": _dense(np.array([1e-9], np.float32))}, {}, kind="gguf", files=files
    )
    with pytest.raises(ExportRefused, match="1 of its values would be rounded"):
        GGUFExporter().export(tiny, tmp_path / "y.gguf", ExportOptions())
    plan = GGUFExporter().export(tiny, tmp_path / "y.gguf", ExportOptions(allow_rounding=True))
    assert "rounded" in plan.notes[0]
    assert parse((tmp_path / "y.gguf").read_bytes(), "y").get("anyquant.allow_rounding") is True


def test_progress_counts_tensors(model: ir.Model, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    GGUFExporter().export(model, tmp_path / "x.gguf", ExportOptions(), lambda *event: seen.append(event))
    assert seen == [(name, i, 7) for i, name in enumerate(model.entries, 1)]


@pytest.mark.parametrize("layout", ["native", "f32", "f16"])
def test_every_tensor_is_read_once(
    model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    read: list[str] = []
    tensor = ir.Model.tensor

    def counted(self: ir.Model, name: str) -> ir.Tensor:
        read.append(name)
        return tensor(self, name)

    monkeypatch.setattr(ir.Model, "tensor", counted)
    GGUFExporter().export(model, tmp_path / "x.gguf", ExportOptions(layout))
    assert read == list(model.entries)


def test_a_tensor_that_needs_another_type_than_most(
    tensors: dict[str, ir.Tensor],
    bfp: Callable[..., ir.Tensor],
    save_tiny: Callable[..., ir.Model],
    tmp_path: Path,
) -> None:
    tensors[UP_PROJ] = bfp(np.full((96, 64), 7), np.full((96, 2), 19), 4, 32)
    model = save_tiny(tensors)
    plan, found = _export(model, tmp_path / "x.gguf")
    assert plan.types[UP_PROJ] == "Q5_0"
    _assert_equal(model, found)
