"""Tensors given to the plug-in in a prebuilt ggml, in a process of its own, and what that answers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.exporters.gguf import custom
from anyquant.runtime import ggml_plugin

DRIVER = Path(__file__).with_name("ggml_driver.py")
SENTINEL = np.float32(12345)


class Answer:
    """What the driver's process found out."""

    def __init__(self, folder: Path, steps: list[dict[str, Any]], errors: list[str]) -> None:
        self.about: dict[str, Any] = json.loads((folder / "answer.json").read_text())
        with np.load(folder / "answer.npz") as arrays:
            self._arrays = dict(arrays)
        self._steps, self.errors = steps, errors

    def values(self, step: int, thread: int = 0) -> np.ndarray:
        """Of all rows; nothing was written beside them."""
        found, columns = self._arrays[f"{thread}/{step}/values"], self._steps[step]["columns"]
        assert (found[:, columns:] == SENTINEL).all()
        values: np.ndarray = found[:, :columns]
        return values

    def products(self, step: int, thread: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[row], of one row of activations; [row, activations] of pairs' first and second; none is written beside."""
        single, pairs = (self._arrays[f"{thread}/{step}/{what}"] for what in ("single", "pairs"))
        assert (single[:, 1:] == SENTINEL).all()
        assert (pairs[:, :, 2:] == SENTINEL).all()
        return single[:, 0], pairs[:, :, 0], pairs[:, :, 1]

    def is_nan(self, step: int) -> bool:
        """Whether nothing is a number; otherwise all is."""
        found = np.concatenate([np.isnan(array).ravel() for array in (self.values(step), *self.products(step))])
        assert found.all() or not found.any()
        return bool(found.all())

    def assert_of(self, step: int, tensor: ir.Tensor, thread: int = 0) -> None:
        """Values to the last bit, products near those in FP64."""
        weight = ir.dequantize(tensor)
        assert ir.digest(self.values(step, thread)) == ir.digest(weight), (step, tensor.spec)
        x = np.random.default_rng(weight.shape[1]).standard_normal((2, weight.shape[1])).astype(np.float32)
        weights, inputs = weight.astype(np.float64), x.astype(np.float64)
        exact, limit = weights @ inputs.T, 1e-6 * (np.abs(weights) @ np.abs(inputs.T)) + 1e-42
        single, first, second = self.products(step, thread)
        apart = len(exact) - len(first)
        assert (np.abs(single - exact[:, 0]) <= limit[:, 0]).all(), (step, tensor.spec)
        assert (np.abs(first - exact[: len(first)]) <= limit[: len(first)]).all(), (step, tensor.spec)
        assert (np.abs(second - exact[apart:]) <= limit[apart:]).all(), (step, tensor.spec)


Ask = Callable[..., Answer]


@pytest.fixture(scope="session")
def ggml_libraries() -> list[str]:
    """Paths of libggml-base and libggml-cpu, as the package libggml-python has them."""
    found = importlib.util.find_spec("libggml")
    folders = [
        Path(folder) / sub for folder in (found and found.submodule_search_locations) or () for sub in ("lib64", "lib")
    ]
    folder = next((folder for folder in folders if (folder / "libggml-cpu.so").is_file()), None)
    if folder is None:
        pytest.skip("libggml-python is not installed")
    return [str(folder / f"libggml-{part}.so") for part in ("base", "cpu")]


@pytest.fixture
def ask(tmp_path: Path, ggml_libraries: list[str]) -> Ask:
    """ask([(name of the type, shape, blob, place or None), ...], environment, **request) -> what the driver found."""

    def run(tensors: list[Any], environment: dict[str, str] | None = None, **request: Any) -> Answer:
        steps = []
        for name, (rows, columns), blob, *at in tensors:
            number = custom.TYPES[name][0]
            steps.append(
                {"number": number, "rows": rows, "columns": columns, "bytes": len(blob), "at": (at or [None])[0]}
            )
        (tmp_path / "request.json").write_text(json.dumps({"steps": steps, **request}))
        (tmp_path / "blobs.bin").write_bytes(b"".join(blob.tobytes() for _, _, blob, *_ in tensors))
        command = [sys.executable, str(DRIVER), str(tmp_path), str(ggml_plugin.path()), *ggml_libraries]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
        assert done.returncode == 0, done.stderr[-3000:]
        return Answer(tmp_path, steps, done.stderr.splitlines())

    return run
