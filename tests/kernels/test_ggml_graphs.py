"""The plug-in in ggml's own products, of matrices and of experts, with the threads and blocks that ggml makes."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
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
EXPERTS, ROWS, COLUMNS, SKIPPED = 3, 37, 576, 21
SHAPE = (EXPERTS * ROWS, COLUMNS)
TENSORS = {
    "rows": lambda: codebook_tensor(SHAPE, 0, [3, 4, 2, 0, 5], scaled=True, outliers=40),
    "columns": lambda: codebook_tensor(SHAPE, 1, [3, 0, 4], outliers=40),
    "block": lambda: block_tensor(ir.BlockSpec(SHAPE, "minifloat", 5, 32, 2)),
    "affine": lambda: affine_tensor(ir.AffineSpec(SHAPE, 4, 64)),
}
Run = Callable[..., dict[str, np.ndarray]]


def encoded(tensor: ir.Tensor) -> tuple[str, np.ndarray]:
    assert isinstance(tensor.spec, custom.Held)
    name = custom.type_for(tensor.spec)
    assert name is not None
    return name, custom.encode("w", tensor, name)


@pytest.fixture
def run(tmp_path: Path, ggml_libraries: list[str]) -> Run:
    """run(blob, name, x, chosen, threads, route, then) -> the driver's answer."""

    def run(
        blob: np.ndarray, name: str, x: np.ndarray, chosen: np.ndarray, threads: int, route: str = "",
        then: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        arrays = {
            "blob": blob, "shape": np.array([EXPERTS, ROWS, COLUMNS]), "number": np.array(custom.TYPES[name][0]),
            "x": x, "chosen": chosen, "threads": np.array(threads), "skipped": np.array(SKIPPED),
        } | ({} if then is None else {"then": then})  # fmt: skip
        np.savez(tmp_path / "request.npz", **arrays)  # type: ignore[arg-type]  # its other argument is a switch
        command = [sys.executable, str(DRIVER), str(tmp_path), str(ggml_plugin.path()), *ggml_libraries]
        environment = {**os.environ, "ANYQUANT_GGML": route}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        with np.load(tmp_path / "answer.npz") as answer:
            return dict(answer)

    return run


def inputs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations, and two experts for each row of them."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n, COLUMNS)).astype(np.float32)
    return x, np.array([rng.permutation(EXPERTS)[:2] for _ in range(n)], np.int32)


def exact_products(tensor: ir.Tensor, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In FP64, and how far from there others may be."""
    weight, given = ir.dequantize(tensor).astype(np.float64), x.astype(np.float64)
    return given @ weight.T, 2e-6 * (np.abs(given) @ np.abs(weight.T))


@pytest.mark.parametrize("route", ["", "rows"])
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize(("n", "threads"), [(1, 1), (1, 3), (2, 5), (3, 7), (5, 3), (34, 2), (67, 7), (135, 2)])
def test_products_of_graphs(kind: str, n: int, threads: int, route: str, run: Run) -> None:
    """Whole ones, and one row after the other: so are those of activations that lie apart, and of some of the rows."""
    tensor = TENSORS[kind]()
    name, blob = encoded(tensor)
    x, chosen = inputs(n)
    answer = run(blob, name, x, chosen, threads, route)
    assert answer["whole"] == answer["added"] == (route == "")
    at_once = [route == ""] * 2  # of all rows, with activations without gaps
    assert answer["taken"].tolist() == [*at_once, False, False, False]
    exact, limit = exact_products(tensor, x)
    for each in ("plain", "apart", "strided"):
        assert (np.abs(answer[each] - exact) <= limit).all(), each
    assert (np.abs(answer["first_rows"] - exact[:, :SKIPPED]) <= limit[:, :SKIPPED]).all()
    assert (np.abs(answer["of_rows"] - exact[:, SKIPPED:]) <= limit[:, SKIPPED:]).all()
    row = np.arange(n)[:, None]
    apart, most = (array.reshape(n, EXPERTS, ROWS)[row, chosen] for array in (exact, limit))
    assert (np.abs(answer["of_experts"] - apart) <= most).all()


def test_whole_products_do_not_depend_on_threads(run: Run) -> None:
    name, blob = encoded(TENSORS["rows"]())
    for n in (1, 5, 34):
        found = [run(blob, name, *inputs(n), threads)["plain"] for threads in (1, 2, 5)]
        assert (found[0] == found[1]).all()
        assert (found[0] == found[2]).all()


@pytest.mark.parametrize("route", ["", "rows"])
@pytest.mark.parametrize("n", [1, 6])
def test_another_tensor_in_the_same_memory(n: int, route: str, run: Run) -> None:
    first, second = (codebook_tensor(SHAPE, 0, 3, seed=seed) for seed in (1, 2))
    name, blob = encoded(first)
    x, chosen = inputs(n)
    exact, limit = exact_products(second, x)
    answer = run(blob, name, x, chosen, 3, route, encoded(second)[1])
    assert (np.abs(answer["then"] - exact) <= limit).all()


@pytest.mark.parametrize("route", ["", "rows"])
@pytest.mark.parametrize("n", [1, 6])
def test_damage(n: int, route: str, run: Run) -> None:
    """Nothing is a number; where the whole tensor comes into the same memory everything is."""
    tensor = TENSORS["rows"]()
    name, blob = encoded(tensor)
    damaged, foreign = blob.copy(), np.full_like(blob, 7)
    damaged[struct.unpack_from("<Q", blob.data, 24)[0] - 70] ^= 1
    x, chosen = inputs(n)
    answer = run(damaged, name, x, chosen, 3, route, blob)
    assert np.isnan([answer[each] for each in ("plain", "apart", "strided")]).all()
    assert np.isnan(answer["of_rows"]).all()
    exact, limit = exact_products(tensor, x)
    assert (np.abs(answer["then"] - exact) <= limit).all()
    assert np.isnan(run(foreign, name, x, chosen, 3, route)["plain"]).all()
