"""The dithered model: exact noise, reading it again, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.checkpoint import open_checkpoint
from anyquant.errors import InputError, UsageError


@pytest.fixture(scope="module")
def sources(accuracy: Callable[[str], Any]) -> Any:
    return accuracy("sources")


@pytest.fixture(scope="module")
def small_gguf(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama whose matrices are Q4_0, as a GGUF file."""
    from anyquant.exporters.gguf import GGUFExporter
    from anyquant.exporters.protocol import ExportOptions
    from anyquant.job import Job, Target
    from anyquant.pipeline import run
    from anyquant.planning import plan

    folder = tmp_path_factory.mktemp("small")
    checkpoint = open_checkpoint(str(tiny_checkpoint("llama")))
    run(plan(checkpoint, Job("block", Target(bits=4.25), {"block": 32}, workers=1)), folder / "ir")
    GGUFExporter().export(ir.open_ir(folder / "ir"), folder / "small.gguf", ExportOptions())
    return folder / "small.gguf"


def slow_steps(blocks: np.ndarray, length: int) -> np.ndarray:
    """The step of every single weight, from the bytes of its block of 32."""
    rows, row_bytes = blocks.shape
    block_bytes = row_bytes // (length // 32)
    steps = np.empty((rows, length), np.float32)
    for row in range(rows):
        for column in range(length):
            at = column // 32 * block_bytes
            steps[row, column] = blocks[row, at : at + 2].copy().view("<f2")[0]
    return steps


def test_noise_stays_within_half_a_step_of_every_weight(sources: Any, small_gguf: Path, tmp_path: Path) -> None:
    folder = sources.dithered(small_gguf, tmp_path / "model")
    source, made = open_checkpoint(str(small_gguf)), open_checkpoint(str(folder))
    assert made.tensors.keys() == source.tensors.keys()
    assert made.aliases == source.aliases
    quantized = 0
    for name, info in source.tensors.items():
        before, after = source.read(name), made.read(name)
        assert made.tensors[name].dtype == "F32"
        if info.dtype in ir.DENSE_DTYPES:
            np.testing.assert_array_equal(after, before)
            continue
        quantized += 1
        steps = np.abs(slow_steps(source.raw(name).arrays[".blocks"], info.shape[1]))
        shift = np.abs(after.astype(np.float64) - before)
        assert (shift <= 0.5 * steps + 1e-6).all()
        assert (shift[steps > 0] / steps[steps > 0]).mean() == pytest.approx(0.25, abs=0.02)
    assert quantized


def test_noise_depends_on_seed_and_name_alone(sources: Any) -> None:
    values, steps = np.zeros((3, 64), np.float32), np.array([[1, 2], [0, 4], [-8, 16]], np.float32)
    noise = sources.dither("a", values, steps, 0)
    np.testing.assert_array_equal(noise, sources.dither("a", values, steps, 0))
    assert (noise != sources.dither("b", values, steps, 0)).any()
    assert (noise != sources.dither("a", values, steps, 1)).any()
    assert (noise[1, :32] == 0).all()  # a block of one value stays that
    for row, block, step in ((0, 0, 1), (0, 1, 2), (1, 1, 4), (2, 0, 8), (2, 1, 16)):
        part = noise[row, 32 * block : 32 * block + 32]
        assert 0.3 * step < np.abs(part).max() <= 0.5 * step


def test_used_again_if_intact_and_made_again_if_not(sources: Any, small_gguf: Path, tmp_path: Path) -> None:
    folder = sources.dithered(small_gguf, tmp_path / "model")
    weights = folder / sources.WEIGHTS
    content, time = weights.read_bytes(), weights.stat().st_mtime_ns
    assert sources.dithered(small_gguf, folder) == folder
    assert weights.stat().st_mtime_ns == time
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    sources.dithered(small_gguf, folder)
    assert weights.read_bytes() == content
    sources.dithered(small_gguf, folder, seed=1)
    assert weights.read_bytes() != content
    assert json.loads((folder / sources.RECORD).read_text())["identity"]["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_left_alone(sources: Any, small_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="no dithered model"):
        sources.dithered(small_gguf, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_type_without_uniform_steps_is_refused(sources: Any) -> None:
    spec = ir.GGMLSpec((2, 256), "Q4_K")
    with pytest.raises(InputError, match="Q4_K has no uniform step"):
        sources.steps_of(ir.Tensor(spec, {".blocks": np.zeros((2, 144), np.uint8)}))


@pytest.mark.slow
def test_the_real_model_leaves_its_grids(sources: Any, real_gguf: Path) -> None:
    """One row holds at most 16 levels in 32 columns before, and as many as columns after."""
    checkpoint = open_checkpoint(str(real_gguf))
    name = checkpoint.matrices()[0]
    values = checkpoint.read(name)
    made = sources.dither(name, values, sources.steps_of(checkpoint.raw(name)), 0)
    assert max(len(set(part)) for part in values[:64, :32].tolist()) <= 16
    assert min(len(set(part)) for part in made[:64, :32].tolist()) == 32
    assert 0.05 < np.abs(made - values).mean() / np.abs(values).mean() < 0.15
