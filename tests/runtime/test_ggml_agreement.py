"""Stock types mean the same bits to all: to us, to gguf-py, to ggml's quantizer and to the ggml inside llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.exporters.gguf import stock
from anyquant.runtime import libggml
from anyquant.testing import affine_tensor, block_tensor

pytest.importorskip("libggml")
gguf = pytest.importorskip("gguf")

TYPES = [
    # ggml builds tables for some seconds before the first block of these.
    pytest.param(name, marks=pytest.mark.slow) if name.startswith(("IQ1", "IQ2")) else name
    for name in ir.GGML_TYPES
]
# The others it can only read.
WRITTEN_BY_GGUF_PY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0")


@pytest.fixture(scope="module")
def in_llama_cpp() -> libggml.Library | None:
    """The ggml that files are run with, of another version; None where it is not installed."""
    try:
        import xllamacpp
    except ImportError:
        return None
    return libggml.Library(Path(xllamacpp.xllamacpp.__file__))


def assert_same_bits(blocks: np.ndarray, name: str, in_llama_cpp: libggml.Library | None) -> np.ndarray:
    """All values of these rows, the signs of zeros included."""
    spec = ir.GGMLSpec((len(blocks), blocks.shape[1] // ir.GGML_TYPES[name][1] * ir.GGML_TYPES[name][0]), name)
    tensor = ir.Tensor(spec, {".blocks": blocks})
    tensor.check(name)
    values = ir.dequantize(tensor)
    found = {"ggml": libggml.library().dequantize(blocks, name)}
    found["gguf-py"] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    if in_llama_cpp is not None:
        found["llama.cpp"] = in_llama_cpp.dequantize(blocks, name)
    for whose, others in found.items():
        assert others.dtype == np.float32
        np.testing.assert_array_equal(others.view(np.uint32), values.view(np.uint32), err_msg=whose)
    return values


def odd_rows(columns: int) -> np.ndarray:
    """Rows at random, of zeros, of one value, with a single one, of any magnitude that FP16 scales hold, and mixed."""
    rng, spike = np.random.default_rng(columns), np.eye(1, columns, 7)[0]
    rows = [np.zeros(columns), -np.zeros(columns), np.full(columns, 0.3), np.full(columns, -0.3), spike, -spike]
    rows += [scale * rng.standard_normal(columns) for scale in (1, 1e4, 1e-3, 1e-5, 1e-7, 1e-9, 1e-30, 1e-36, 1e-42)]
    rows += [np.abs(rows[6]), -np.abs(rows[6]), np.linspace(-1, 1, columns), rng.integers(-8, 8, columns)]
    rows += [np.exp2(rng.integers(-20, 10, columns)) * np.sign(rows[6]), rng.integers(-1, 2, columns)]
    return np.stack(rows).astype(np.float32)


@pytest.mark.parametrize("name", TYPES)
def test_what_ggml_quantizes(name: str, in_llama_cpp: libggml.Library | None) -> None:
    library, weight = libggml.library(), odd_rows(3 * ir.GGML_TYPES[name][0])
    importance = np.exp2(np.random.default_rng(1).uniform(-5, 5, weight.shape[1])).astype(np.float32)
    for given in (None, importance):
        blocks = library.quantize(weight, name, given)
        values = assert_same_bits(blocks, name, in_llama_cpp)
        assert not values[:2].any()  # zeros stay zeros
        assert values[2:9].any(axis=1).all()
        for rows in (1, 5):
            np.testing.assert_array_equal(library.quantize(weight[:rows], name, given), blocks[:rows])


@pytest.mark.parametrize("name", ir.GGML_TYPES)
def test_what_gguf_py_quantizes(name: str) -> None:
    kind, weight = gguf.GGMLQuantizationType[name], odd_rows(3 * ir.GGML_TYPES[name][0])
    weight += 0  # no negative zeros: see below
    if name in WRITTEN_BY_GGUF_PY:
        with np.errstate(all="ignore"):  # 1 / 1e-42
            theirs = gguf.quants.quantize(weight, kind)
        np.testing.assert_array_equal(theirs, libggml.library().quantize(weight, name))
    else:
        with pytest.raises(NotImplementedError):
            gguf.quants.quantize(weight, kind)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0"])
def test_gguf_py_gives_negative_zeros_another_zero_for_a_scale(name: str) -> None:
    """It divides the first of a block's largest weights; ggml has found none above 0, and divides that."""
    weight = -np.zeros((1, 32), np.float32)
    theirs = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name])[0]
    blocks = libggml.library().quantize(weight, name)[0]
    assert (theirs[:2].tobytes(), blocks[:2].tobytes()) == (b"\0\0", b"\0\x80")
    np.testing.assert_array_equal(theirs[2:], blocks[2:])


def test_mxfp4_of_weights_that_are_nearly_nothing(in_llama_cpp: libggml.Library | None) -> None:
    """ggml's exponent wraps around below 2**-125. All codes are 0 then, and exponents that we have not become 0."""
    tops = np.ldexp(np.float32(1.5), np.arange(-140, -110))
    weight = np.outer(tops, np.linspace(-1, 1, 32)).astype(np.float32)
    blocks = libggml.library().quantize(weight, "MXFP4")
    values = assert_same_bits(blocks, "MXFP4", in_llama_cpp)
    exponents = [241, 242, 243, 244, 245, 246, 247, 248, 249, 250, 251, 252, 0, 0, 0, *range(15)]
    np.testing.assert_array_equal(blocks[:, 0], exponents)
    assert not values[:15].any()
    assert (np.abs(values[15:] - weight[15:]) <= 0.25 * tops[15:, None]).all()


def symmetric(spec: ir.AffineSpec) -> ir.Tensor:
    tensor = affine_tensor(spec)
    tensor.arrays[".zero"][:] = 1 << (spec.bits - 1)
    return tensor


def held_by_stock_types() -> list[Any]:
    """Tensors, and the types that hold them."""
    found = []
    for width in range(2, 9):
        found.append(block_tensor(ir.BlockSpec((9, 512), "bfp", width, 32), width, (-10, 4)))
    for width in range(2, 7):
        found.append(block_tensor(ir.BlockSpec((9, 512), "bfp", width, 16), width, (-10, -4)))
    found += [block_tensor(ir.BlockSpec((9, 96), "bfp", width, 16), 0, (0, 2)) for width in (3, 4, 6)]
    for bits in (2, 4, 8):
        found += [symmetric(ir.AffineSpec((7, 288), bits, 32)), symmetric(ir.AffineSpec((1, 512), bits, 256))]
    return [*found, affine_tensor(ir.AffineSpec((7, 288), 4, 32)), affine_tensor(ir.AffineSpec((7, 288), 2, 64))]


def test_what_the_exporter_encodes(in_llama_cpp: libggml.Library | None) -> None:
    """In every type that holds a tensor exactly, not just in the one that is chosen."""
    chosen, encoded = set(), 0
    for tensor in held_by_stock_types():
        chosen.add(stock.choose(tensor))
        exact = ir.dequantize(tensor)
        for name in stock.candidates(tensor.spec):
            try:
                blocks = stock.encode(tensor, name)
            except stock.NotExact:
                continue
            values, encoded = assert_same_bits(blocks, name, in_llama_cpp), encoded + 1
            np.testing.assert_array_equal(
                values.view(np.uint32), exact.view(np.uint32), err_msg=f"{tensor.spec} {name}"
            )
    assert chosen == {*stock.RANGES, "Q6_K"}
    assert encoded > len(held_by_stock_types())
