"""The plug-in in ggml's own products, of matrices and of experts, with the threads and blocks that ggml makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from anyquant import ir
from anyquant.exporters.gguf import custom
from anyquant.runtime import ggml_plugin, native
from anyquant.testing import affine_tensor, block_tensor, codebook_tensor

DRIVER = Path(__file__).with_name("graph_driver.py")

pytestmark = pytest.mark.skipif(native.path_of(ggml_plugin.LIBRARY) is None, reason=native.missing(ggml_plugin.LIBRARY))

# Rows of experts that are no multiple of the sixteen that are done together, and of what threads divide.
EXPERTS, ROWS, COLUMNS = 3, 37, 576
SHAPE = (EXPERTS * ROWS, COLUMNS)
TENSORS = {
    "rows": lambda: codebook_tensor(SHAPE, 0, [3, 4, 2, 0, 5], scaled=True, outliers=40),
    "columns": lambda: codebook_tensor(SHAPE, 1, [3, 0, 4], outliers=40),
    "block": lambda: block_tensor(ir.BlockSpec(SHAPE, "minifloat", 5, 32, 2)),
    "affine": lambda: affine_tensor(ir.AffineSpec(SHAPE, 4, 64)),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize(("n", "threads"), [(1, 1), (1, 3), (2, 2), (5, 3), (34, 2), (67, 7)])
def test_products_of_graphs(kind: str, n: int, threads: int, ggml_libraries: list[str], tmp_path: Path) -> None:
    tensor = TENSORS[kind]()
    assert isinstance(tensor.spec, custom.Held)
    name = custom.type_for(tensor.spec)
    assert name is not None
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n, COLUMNS)).astype(np.float32)
    chosen = np.array([rng.permutation(EXPERTS)[:2] for _ in range(n)], np.int32)
    np.savez(
        tmp_path / "request.npz", blob=custom.encode("w", tensor, name), shape=np.array([EXPERTS, ROWS, COLUMNS]),
        number=np.array(custom.TYPES[name][0]), x=x, chosen=chosen, threads=np.array(threads),
    )  # fmt: skip
    command = [sys.executable, str(DRIVER), str(tmp_path), str(ggml_plugin.path()), *ggml_libraries]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    weight, inputs = ir.dequantize(tensor).astype(np.float64), x.astype(np.float64)
    exact, limit = inputs @ weight.T, 1e-6 * (np.abs(inputs) @ np.abs(weight.T))
    with np.load(tmp_path / "answer.npz") as answer:
        plain, of_experts = answer["plain"], answer["of_experts"]
    assert (np.abs(plain - exact) <= limit).all()
    each = np.arange(n)[:, None]
    apart, most = (array.reshape(n, EXPERTS, ROWS)[each, chosen] for array in (exact, limit))
    assert (np.abs(of_experts - apart) <= most).all()
