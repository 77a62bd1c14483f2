"""Planning and quantizing: targets, promised bytes, determinism, and what happens when something goes wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anyquant import ir
from anyquant.checkpoint import open_checkpoint
from anyquant.errors import InfeasibleTarget, InputError, NonFiniteError, UsageError
from anyquant.job import Job, Target
from anyquant.pipeline import run
from anyquant.planning import Plan, feasible_bits, plan
from anyquant.workers import in_order


def planned(folder: Path, **target: object) -> Plan:
    options = target.pop("options", {})
    embeddings = bool(target.pop("embeddings", False))
    workers = target.pop("workers", 1)
    job = Job("block", Target(**target), dict(options), embeddings, workers=workers)  # type: ignore[arg-type,call-overload]
    return plan(open_checkpoint(str(folder)), job)


def widths(model: ir.Model) -> set[int]:
    return {e.spec.width for e in model.entries.values() if isinstance(e.spec, ir.BlockSpec)}


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize(("bits", "block", "width"), [(4.25, 32, 4), (4.5, 16, 4), (8.25, 32, 8), (2.25, 32, 2)])
def test_whole_widths_are_uniform_and_read_no_weight(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, bits: float, block: int, width: int
) -> None:
    from anyquant.checkpoint.base import BaseCheckpoint

    def refuse(*args: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(BaseCheckpoint, "read", refuse)
    monkeypatch.setattr(BaseCheckpoint, "raw", refuse)
    result = planned(tiny_llama, bits=bits, options={"block": block})
    assert widths(result.model) == {width}
    assert result.model.quantized_bits == pytest.approx(bits)
    assert not result.measured
    assert not result.model.has_values


@pytest.mark.parametrize("bits", [2.3, 3.0, 4.6, 7.9])
def test_fractions_mix_widths_from_below(tiny_llama: Path, bits: float) -> None:
    result = planned(tiny_llama, bits=bits)
    assert len(widths(result.model)) > 1
    assert result.measured
    # The smallest step is one bit of the smallest matrix.
    matrices = [e.spec for e in result.model.entries.values() if e.quantized]
    step = min(s.numel for s in matrices) / sum(s.numel for s in matrices)
    assert bits - step <= result.model.quantized_bits <= bits


def test_mixing_follows_the_measured_error(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    weights = load_file(folder / "model.safetensors")
    easy = "model.layers.0.mlp.up_proj.weight"
    # On the grid of 3 bits already: more bits gain nothing.
    weights[easy] = np.sign(weights[easy]) * np.float32(0.75)
    save_file(weights, folder / "model.safetensors")
    result = planned(folder, bits=6.0)
    spec = result.model.entries[easy].spec
    assert isinstance(spec, ir.BlockSpec)
    assert spec.width == 3
    assert max(widths(result.model)) > 6


@pytest.mark.parametrize("bits", [1.0, 2.2, 8.3, 32])
def test_infeasible_bits_name_the_interval(tiny_llama: Path, bits: float) -> None:
    with pytest.raises(InfeasibleTarget, match=r"2\.2500 \.\. 8\.2500") as error:
        planned(tiny_llama, bits=bits)
    assert error.value.feasible == pytest.approx((2.25, 8.25))
    assert error.value.exit_code == 2


def test_size_is_met_from_below(tiny_llama: Path) -> None:
    with pytest.raises(InfeasibleTarget, match="below the feasible interval") as error:
        planned(tiny_llama, size=100_000)
    low, high = map(int, error.value.feasible)
    for size in (low, low + 3000, (low + high) // 2, high, high + 10**9):
        result = planned(tiny_llama, size=size)
        written = sum(result.files.values())
        assert written <= size
        if size <= high:
            assert size - written < 800  # one bit of the smallest matrix, and its header
    with pytest.raises(InfeasibleTarget, match=f"{low:,}"):
        planned(tiny_llama, size=low - 1)


def test_size_of_an_export(tiny_llama: Path) -> None:
    pytest.importorskip("gguf")
    from anyquant.exporters.protocol import ExportOptions
    from anyquant.exporters.registry import get_exporter

    exporter = get_exporter("gguf")
    low, high = (exporter.check(planned(tiny_llama, bits=b).model, ExportOptions()).bytes for b in (2.25, 8.25))
    size = (low + high) // 2
    chosen = exporter.check(planned(tiny_llama, size=size, size_of="gguf").model, ExportOptions()).bytes
    assert size * 0.9 < chosen <= size
    with pytest.raises(UsageError, match="no exporter 'floppy'"):
        planned(tiny_llama, size=size, size_of="floppy")


def test_counting_codes_alone(tiny_llama: Path) -> None:
    assert widths(planned(tiny_llama, bits=4.0, count="index").model) == {4}
    job = Job("block", Target(bits=4.0, count="index"))
    assert feasible_bits(open_checkpoint(str(tiny_llama)), job) == pytest.approx((2.0, 8.0))


def test_a_size_for_an_exporter_takes_only_forms_that_it_writes(tiny_checkpoint: Callable[..., Path]) -> None:
    pytest.importorskip("gguf")
    # Rows of 48 are no whole blocks of any stock type.
    with pytest.raises(InfeasibleTarget, match=r"hold no form of model\.layers\.0.*not a multiple of 32"):
        planned(tiny_checkpoint("llama", hidden=48), size=10**9, size_of="gguf")
    # Widths 2 to 4, and 6 to 8, are written in as many bytes: only the best of each is worth taking.
    for size in (150_000, 180_000, 10**9):
        assert widths(planned(tiny_checkpoint("llama"), size=size, size_of="gguf").model) <= {4, 5, 8}


def test_no_more_matrices_are_in_memory_than_workers() -> None:
    running, most = 0, 0

    def unit(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        return number

    results = []
    for number in in_order(unit, [(i,) for i in range(40)], 3):
        results.append(number)
        time.sleep(0.002)  # a slow disk: the results must wait, not pile up
        running -= 1
    assert results == list(range(40))
    assert most <= 4  # three that wait or work, and the one that is being written


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_in_a_worker_comes_out(workers: int) -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda n: 1 // (n - 5), [(i,) for i in range(20)], workers))


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ({}, "exactly one"),
        ({"bits": 4.0, "size": 5}, "exactly one"),
        ({"bits": -1.0}, "positive"),
        ({"bits": float("nan")}, "positive"),
        ({"bits": 4.0, "size_of": "gguf"}, "--for gguf"),
        ({"size": 5, "count": "index"}, "--count index"),
    ],
)
def test_bad_targets(target: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Target(**target)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_what_is_written_is_what_was_planned(tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str) -> None:
    source = tiny_checkpoint(family)
    result = planned(source, bits=4.6, embeddings=True)
    model = run(result, tmp_path / "out")
    assert {f: (tmp_path / "out" / f).stat().st_size for f in result.files} == result.files
    assert {n: e.spec for n, e in model.entries.items()} == {n: e.spec for n, e in result.model.entries.items()}
    checkpoint = open_checkpoint(str(source))
    for name, entry in model.entries.items():
        values = model.dequantize(name)
        assert ir.digest(values) == entry.sha256
        weight = checkpoint.read(name)
        if entry.quantized:
            error = float(((weight - values).astype(np.float64) ** 2).sum() / (weight.astype(np.float64) ** 2).sum())
            assert entry.error == pytest.approx(error, rel=1e-5)
            assert 0 < error < 0.2
        else:
            np.testing.assert_array_equal(values, weight)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_any_number_of_workers_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        run(planned(tiny_llama, bits=3.7, workers=workers), tmp_path / str(workers))
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")


def test_progress(tiny_llama: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    result = planned(tiny_llama, bits=4.25)
    run(result, tmp_path / "out", progress=lambda *step: seen.append(step))
    count = len(result.model.entries)
    assert [name for name, _, _ in seen] == list(result.model.entries)
    assert [(done, total) for _, done, total in seen] == [(i + 1, count) for i in range(count)]


def test_a_non_finite_weight_stops_and_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = np.inf
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: 1 non-finite.*\[3, 5\]"):
        run(planned(folder, bits=4.25), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_an_existing_folder_is_not_touched(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="exists"):
        run(planned(tiny_llama, bits=4.25), tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_nothing_to_quantize(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    save_file({"model.norm.weight": np.ones(8, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="no matrices"):
        planned(tmp_path, bits=4.25)


def test_the_real_model(real_ir: Path, real_gguf: Path) -> None:
    result = planned(real_gguf, bits=4.25)
    assert {f: (real_ir / f).stat().st_size for f in result.files} == result.files
    assert sum(result.files.values()) < real_gguf.stat().st_size
    model = ir.open_ir(real_ir)
    assert model.quantized_bits == 4.25
    embedding = model.entries["model.embed_tokens.weight"].spec
    assert isinstance(embedding, ir.GGMLSpec)
    assert embedding.type == "Q8_0"
    assert model.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert json.loads((real_ir / "config.json").read_text())["quantization_config"]["quant_method"] == "anyquant"
