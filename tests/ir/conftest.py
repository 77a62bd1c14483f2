"""Random tensors of every kind, made without the packing code under test, and small models of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir

HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108]}
HALVES |= {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0]}


def _pack_slowly(codes: np.ndarray, bits: int) -> np.ndarray:
    """One row of codes as bytes, through one big integer: code i at bits [i*b, i*b+b)."""
    number = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    return np.frombuffer(number.to_bytes((len(codes) * bits + 7) // 8, "little"), np.uint8).copy()


def _random_halves(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float16)


def _block(spec: ir.BlockSpec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    out, columns = spec.shape
    blocks = -(-columns // spec.block)
    sign = 1 << (spec.width - 1)
    codes = rng.integers(0, 2 * sign, (out, blocks * spec.block))
    if spec.format != "log":
        codes[codes == sign] = 0
        codes[0, : spec.block] = 0  # a zero block
    codes[:, columns:] = 0
    exponents = rng.integers(-9, 9, (out, blocks)).astype(np.int8)
    if spec.format != "log":
        exponents[~codes.reshape(out, blocks, -1).any(axis=2)] = -128
    return {".codes": np.stack([_pack_slowly(row, spec.width) for row in codes]), ".exponents": exponents}


def _codebook(spec: ir.CodebookSpec, rng: np.random.Generator, bits: np.ndarray) -> dict[str, np.ndarray]:
    length = spec.shape[1 - spec.axis]
    codes = [_pack_slowly(rng.integers(0, 1 << int(b), length), int(b)) for b in bits]
    tables = [np.sort(_random_halves(rng, (1 << int(b),))) for b in bits]
    arrays = {".bits": bits, ".codes": np.concatenate(codes), ".codebook": np.concatenate(tables)}
    if spec.input_scale:
        arrays[".input_scale"] = rng.uniform(0.5, 2, spec.shape[1]).astype(np.float16)
    if spec.outliers:
        chosen = np.sort(rng.choice(spec.numel, spec.outliers, replace=False))
        row, column = np.divmod(chosen, spec.shape[1])
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=spec.shape[0]))])
        arrays[".outlier_indptr"] = indptr.astype(np.uint32)
        arrays[".outlier_index"] = column.astype(np.uint16 if spec.shape[1] <= 65536 else np.uint32)
        arrays[".outlier_value"] = _random_halves(rng, (spec.outliers,))
    return arrays


def _affine(spec: ir.AffineSpec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    out, columns = spec.shape
    blocks = -(-columns // spec.block)
    codes = rng.integers(0, 1 << spec.bits, (out, blocks * spec.block))
    codes[:, columns:] = 0
    return {
        ".codes": np.stack([_pack_slowly(row, spec.bits) for row in codes]),
        ".scale": _random_halves(rng, (out, blocks)),
        ".zero": rng.integers(0, 1 << spec.bits, (out, blocks)).astype(np.uint8),
    }


def _ggml(spec: ir.GGMLSpec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    dtype, shape = spec.arrays()[".blocks"]
    size = ir.GGML_TYPES[spec.type][1]
    blocks = rng.integers(0, 256, shape).astype(dtype).reshape(-1, size)
    for at in HALVES[spec.type]:
        blocks[:, at : at + 2] = _random_halves(rng, (len(blocks), 1)).view(np.uint8)
    return {".blocks": blocks.reshape(shape)}


def _dense(spec: ir.DenseSpec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    values = np.asarray(rng.normal(size=spec.shape), np.float32)
    if spec.dtype == "BF16":
        return {".dense": np.asarray(values.view(np.uint32) >> 16, np.uint16)}
    return {".dense": np.asarray(values, spec.arrays()[".dense"][0])}


@pytest.fixture(scope="session")
def make_tensor() -> Callable[..., ir.Tensor]:
    """make_tensor(spec, seed=0, bits=None): a random tensor; ``bits`` are a codebook tensor's widths per channel."""

    def make(spec: ir.Spec, seed: int = 0, bits: np.ndarray | None = None) -> ir.Tensor:
        rng = np.random.default_rng(seed)
        if isinstance(spec, ir.BlockSpec):
            return ir.Tensor(spec, _block(spec, rng))
        if isinstance(spec, ir.CodebookSpec):
            assert bits is not None
            return ir.Tensor(spec, _codebook(spec, rng, bits))
        if isinstance(spec, ir.AffineSpec):
            return ir.Tensor(spec, _affine(spec, rng))
        if isinstance(spec, ir.GGMLSpec):
            return ir.Tensor(spec, _ggml(spec, rng))
        return ir.Tensor(spec, _dense(spec, rng))

    return make


@pytest.fixture(scope="session")
def make_codebook(make_tensor: Callable[..., ir.Tensor]) -> Callable[..., ir.Tensor]:
    """make_codebook(shape, axis, bits, seed=0, **spec settings)."""

    def make(shape: tuple[int, int], axis: int, bits: Any, seed: int = 0, **settings: Any) -> ir.Tensor:
        widths = np.asarray(bits, np.uint8)
        return make_tensor(ir.CodebookSpec.from_bits(shape, axis, widths, **settings), seed, widths)

    return make


@pytest.fixture(scope="session")
def zoo(make_tensor: Callable[..., ir.Tensor], make_codebook: Callable[..., ir.Tensor]) -> dict[str, ir.Tensor]:
    """At least one tensor of every kind, with awkward shapes and names."""
    return {
        "block.bfp": make_tensor(ir.BlockSpec((3, 40), "bfp", 4, 32)),
        "block.minifloat": make_tensor(ir.BlockSpec((2, 17), "minifloat", 6, 16, 3)),
        "block.log": make_tensor(ir.BlockSpec((2, 33), "log", 5, 32)),
        "codebook.rows": make_codebook((5, 13), 0, [0, 3, 8, 1, 4], input_scale=True, outliers=7),
        "codebook.columns": make_codebook((13, 4), 1, [2, 0, 5, 1]),
        "affine": make_tensor(ir.AffineSpec((3, 20), 4, 16)),
        "ggml": make_tensor(ir.GGMLSpec((2, 64), "Q4_1")),
        "größe.重み.🙂": make_tensor(ir.DenseSpec((3, 2, 2), "BF16")),
        "scalar": make_tensor(ir.DenseSpec((), "F32")),
        "empty": make_tensor(ir.DenseSpec((0, 5), "F16")),
        "double": make_tensor(ir.DenseSpec((7,), "F64")),
    }


@pytest.fixture(scope="session")
def plan(zoo: dict[str, ir.Tensor]) -> ir.Model:
    """A plan of the zoo."""
    entries = {n: ir.Entry(t.spec, quantized=t.spec.kind != "dense") for n, t in zoo.items()}
    return ir.Model(
        path=None,
        config={"model_type": "llama", "name": "größe", "time_step_limit": [0.0, float("inf")]},
        method="zoo",
        settings={"bits": 3.5, "list": [1, 2], "ü": "ß"},
        source={"kind": "huggingface", "name": "a/b", "fingerprint": "0" * 64},
        entries=entries,
        aliases={"tied": "ggml"},
        anyquant_version="0.1.0",
        calibration={"text": "self", "seed": 0},
    )


@pytest.fixture(scope="session")
def write_zoo(zoo: dict[str, ir.Tensor], plan: ir.Model) -> Callable[..., ir.Model]:
    """write_zoo(path, **arguments of write_ir) writes the zoo, one error smaller than the one before."""

    def write(path: Path, **arguments: Any) -> ir.Model:
        errors = {name: 10.0 ** (-20 * i) for i, name in enumerate(zoo)}
        return ir.write_ir(path, plan, lambda name: (zoo[name], ir.Loss(errors[name])), **arguments)

    return write


@pytest.fixture
def folder(write_zoo: Callable[..., ir.Model], tmp_path: Path) -> Path:
    """A folder of the zoo that the test may damage, in one file."""
    path = tmp_path / "zoo"
    write_zoo(path, write_side_files=lambda side: (side / "tokenizer.json").write_text("{}") and None)
    return path
