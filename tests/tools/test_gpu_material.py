"""The layers that are carried to a GPU: made of a tiny model, checked in the emulator; and every kernel by itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyquant.calibration import CalibrationSettings
from anyquant.errors import InputError
from anyquant.job import Job, Target
from anyquant.runtime.cuda import linear
from tests.kernels.cuda.machine import TorchOnEmulator


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def emulated(script: Callable[[str], ModuleType], kernels: Path, monkeypatch: pytest.MonkeyPatch) -> TorchOnEmulator:
    from gpu import material

    gpu = TorchOnEmulator(kernels)
    monkeypatch.setattr(linear, "machine", lambda device: gpu)
    monkeypatch.setattr(material, "BATCHES", (1, 8))
    return gpu


@pytest.fixture(scope="module")
def prepared(
    tiny_checkpoint: Callable[..., Path], script: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from gpu import material

    folder = tmp_path_factory.mktemp("prepared")
    text = folder / "text.txt"
    text.write_text("The sea is salty, and nobody knows why. " * 100)
    calibration = CalibrationSettings(str(text), windows=2, window=32)
    jobs = [
        Job("skim", Target(bits=5.5), {"outliers": 0.5}, calibration=calibration),
        Job("block", Target(bits=4.25), quantize_embeddings=True),
    ]
    source = tiny_checkpoint(num_hidden_layers=3)
    nbytes = material.prepare(source, text, folder / "material", jobs)
    assert nbytes == sum(file.stat().st_size for file in (folder / "material").rglob("*") if file.is_file())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(material, "MOST_BYTES", nbytes - 1)
        with pytest.raises(InputError, match=f"{nbytes:,} bytes"):
            material.prepare(source, text, folder / "too-large", jobs)
        assert not (folder / "too-large").exists()
    return folder / "material"


def test_layers_and_logits(prepared: Path, emulated: TorchOnEmulator) -> None:
    from gpu.material import LIMIT, check

    results = check(prepared, torch.device("cpu"))
    assert all(result.ok for result in results), results
    assert len(results) == 2 * 7 * len(LIMIT) + 1
    assert results[-1].what == "logits"
    assert {"gemv_rows", "dequantize_block"} <= set(emulated.launched)


def test_what_is_not_as_recorded(prepared: Path, emulated: TorchOnEmulator, tmp_path: Path) -> None:
    from gpu.material import ABOUT, MODEL, RECORDS, check

    records = load_file(prepared / RECORDS)
    name = "output.model.layers.0.mlp.down_proj"
    records[name][0, 0] += 0.1 * records[name].abs().max()
    records["logits"][3, 3] += 0.01
    (tmp_path / ABOUT).write_bytes((prepared / ABOUT).read_bytes())
    (tmp_path / MODEL).symlink_to(prepared / MODEL)
    save_file(records, tmp_path / RECORDS)
    wrong = [result.what for result in check(tmp_path, torch.device("cpu")) if not result.ok]
    assert [re.sub(", .*", "", what) for what in wrong] == ["model.layers.0.mlp.down_proj"] * 3 + ["logits"]
    with pytest.raises(InputError, match="--prepare"):
        check(tmp_path / MODEL, torch.device("cpu"))


@pytest.mark.slow
def test_every_kernel_is_launched(emulated: TorchOnEmulator, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import worker

    monkeypatch.setattr(worker, "machine", lambda device: emulated)
    worker.launches(torch.device("cpu"))
    sources = "".join(file.read_text() for file in sorted((repository / "kernels" / "cuda").glob("*.cu")))
    kernels: Any = set(re.findall(r"^AQ_KERNEL\([^\n]*?\)\s*\n?(\w+)\(", sources, re.MULTILINE))
    assert len(kernels) > 10
    assert kernels == set(emulated.launched)


def test_a_worker_that_finds_something_wrong(
    prepared: Path, emulated: TorchOnEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu import worker
    from gpu.material import Result

    for ok, code in [(True, 0), (False, 4)]:
        monkeypatch.setattr(worker, "check", lambda folder, device, ok=ok: [Result("logits", 0.5, 1e-3, ok)])
        monkeypatch.setattr("sys.argv", ["worker", "material", str(prepared), str(tmp_path / "result.json")])
        assert worker.main() == code
        assert '"found": 0.5' in (tmp_path / "result.json").read_text()
