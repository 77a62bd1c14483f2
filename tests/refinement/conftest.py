"""Tensors to refine, from easy to hostile: tensors, weights and moments by name, and the loss in plain words."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from anyquant.clustering import assign, kmeans
from anyquant.ir import CodebookSpec, Tensor, dequantize
from anyquant.ir.packing import pack
from anyquant.runtime import native

NEEDS_LIBRARY = pytest.mark.skipif(not native.available(), reason=f"no compiled library: {native.why_not()}")


def moment_of(kind: str, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, n])
    tokens = max(1, n // 3) if kind == "low rank" else 3 * n
    x = rng.standard_normal((tokens, n)) @ (np.eye(n) + 0.5 * rng.standard_normal((n, n)) / np.sqrt(n))
    if kind == "dead columns":
        x[:, ::3] = 0
    elif kind == "massive":
        x[:, n // 2] *= 1000
    elif kind == "zero":
        x[:] = 0
    moment = x.T @ x / tokens
    if kind == "diagonal":
        moment = np.diag(np.diag(moment))
    return np.asarray((moment + moment.T) / 2, np.float32)  # low rank: no longer quite semi-definite


def weight_of(kind: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, *shape])
    values = {
        "normal": lambda: rng.standard_normal(shape),
        "few values": lambda: rng.integers(-1, 2, shape) * 0.3,
        "constant": lambda: np.full(shape, 0.7),
        "zero": lambda: np.zeros(shape),
        "heavy tails": lambda: np.clip(rng.standard_t(2, shape), -100, 100),
    }[kind]()
    return values.astype(np.float32)


def tensor_of(
    weight: np.ndarray, bits: np.ndarray, axis: int = 0, *, scaled: bool = False, outliers: float = 0, seed: int = 0
) -> Tensor:
    """k-means of each channel by itself; outliers: what share of the weights is one."""
    rng = np.random.default_rng([seed, *weight.shape])
    columns = weight.shape[1]
    scale = np.exp(0.4 * rng.standard_normal(columns)).astype(np.float16) if scaled else np.ones(columns, np.float16)
    chosen = rng.permuted(np.arange(weight.size) < round(outliers * weight.size)).reshape(weight.shape)
    values = (weight / scale.astype(np.float32)).astype(np.float32)
    values = np.ascontiguousarray(values if axis == 0 else values.T)
    codes, books = [], []
    for row, width in zip(values, bits, strict=True):
        book = kmeans(row[None], None, 1 << int(width)).astype(np.float16)
        codes.append(pack(assign(row[None], book), int(width))[0])
        books.append(book[0])
    spec = CodebookSpec.from_bits(
        (weight.shape[0], columns), axis, bits, input_scale=scaled, outliers=int(chosen.sum())
    )
    arrays = {".bits": bits, ".codes": np.concatenate(codes), ".codebook": np.concatenate(books)}
    if scaled:
        arrays[".input_scale"] = scale
    if chosen.any():
        row_of, column_of = np.nonzero(chosen)
        arrays[".outlier_indptr"] = np.searchsorted(row_of, np.arange(len(weight) + 1)).astype(np.uint32)
        arrays[".outlier_index"] = column_of.astype(np.uint16)
        arrays[".outlier_value"] = weight[chosen].astype(np.float16)
    tensor = Tensor(spec, arrays)
    tensor.check("made")
    return tensor


def loss_of(weight: np.ndarray, tensor: Tensor, moment: np.ndarray) -> np.ndarray:
    """Losses of rows, float64 [out], row by row."""
    moments = moment if moment.ndim == 3 else moment[None]
    error = dequantize(tensor).astype(np.float64) - weight
    parts = np.array_split(np.arange(len(weight)), len(moments))
    return np.array([e @ h.astype(np.float64) @ e for h, part in zip(moments, parts, strict=True) for e in error[part]])


def check_canonical(tensor: Tensor) -> None:
    """Entries of a channel differ and ascend, all are named, and the rest repeat the last one."""
    tensor.check("refined")
    spec = tensor.spec
    assert isinstance(spec, CodebookSpec)
    plain = Tensor(
        CodebookSpec.from_bits(spec.shape, spec.axis, tensor.arrays[".bits"]),
        {name: tensor.arrays[name] for name in (".bits", ".codes", ".codebook")},
    )
    values = dequantize(plain)
    starts = np.concatenate([[0], np.cumsum(1 << tensor.arrays[".bits"].astype(np.int64))])
    for channel, row in enumerate(values if spec.axis == 0 else values.T):
        book = tensor.arrays[".codebook"][starts[channel] : starts[channel + 1]].astype(np.float32)
        named = np.unique(row)
        np.testing.assert_array_equal(book[: len(named)], named)
        np.testing.assert_array_equal(book[len(named) :], named[-1])


@pytest.fixture(name="moment_of", scope="session")
def moment_of_fixture() -> Callable[..., np.ndarray]:
    """Moments by name: moment_of(kind, n, seed=0), float32 [n, n]."""
    return moment_of


@pytest.fixture(name="weight_of", scope="session")
def weight_of_fixture() -> Callable[..., np.ndarray]:
    """Weights by name: weight_of(kind, shape, seed=0)."""
    return weight_of


@pytest.fixture(name="tensor_of", scope="session")
def tensor_of_fixture() -> Callable[..., Tensor]:
    """Codebooks by k-means: tensor_of(weight, bits, axis=0, scaled=False, outliers=0, seed=0)."""
    return tensor_of


@pytest.fixture(name="loss_of", scope="session")
def loss_of_fixture() -> Callable[..., np.ndarray]:
    """Losses of rows: loss_of(weight, tensor, moment)."""
    return loss_of


@pytest.fixture(name="check_canonical", scope="session")
def check_canonical_fixture() -> Callable[[Tensor], None]:
    """Fails unless codebooks are canonical: check_canonical(tensor)."""
    return check_canonical


@pytest.fixture(params=[pytest.param("compiled", marks=NEEDS_LIBRARY), "numpy"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the compiled library and without."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "available", lambda: False)
    return str(request.param)
