"""The block method: levels, errors and tensors of every format; how it rounds is tested in test_block_formats.py."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.block_formats import quantize_blocks
from anyquant.calibration import MatrixStatistics
from anyquant.checkpoint import open_checkpoint
from anyquant.errors import InputError, UsageError
from anyquant.methods.block import WIDTHS, BlockMethod
from anyquant.methods.importance import CHUNK

stats = MatrixStatistics.of

METHOD = BlockMethod()
FORMATS = ("bfp", "minifloat", "log")


def weights_of(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp2(rng.integers(-3, 3, (shape[0], 1)))).astype(np.float32)


def positive(shape: int | tuple[int, int], seed: int = 1) -> np.ndarray:
    return np.exp2(np.random.default_rng(seed).uniform(-4, 4, shape)).astype(np.float32)


def quantized(weight: np.ndarray, width: int, chosen: dict[str, Any], known: Any = None) -> np.ndarray:
    """What the tensor of a width stands for, which must pass its checks."""
    tensor = METHOD.quantize(weight, np.array([width - WIDTHS[0]], np.uint8), known, chosen)
    tensor.check("w")
    assert tensor.spec.shape == weight.shape
    return ir.dequantize(tensor).astype(np.float64)


@pytest.mark.parametrize("shared_exponent", ["largest", "search"])
@pytest.mark.parametrize("shape", [(5, 75), (1, 64), (3, 1)])
@pytest.mark.parametrize("form", FORMATS)
def test_errors_are_those_of_the_tensors(form: str, shape: tuple[int, int], shared_exponent: str) -> None:
    weight = weights_of(shape)
    if form != "log":
        weight[0] = 0 if shape[0] > 1 else weight[0]
        weight[-1] = 0.375
    chosen = METHOD.settings({"format": form, "shared_exponent": shared_exponent})
    errors = METHOD.errors(weight, None, chosen)
    assert errors.shape == (1, len(WIDTHS))
    exact = weight.astype(np.float64)
    for level, width in enumerate(WIDTHS):
        difference = exact - quantized(weight, width, chosen)
        expected = (difference**2).sum() / (exact**2).sum() * weight.size
        assert errors[0, level] == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["activation", "gradient", "fisher"])
def test_gradients_weight_errors(form: str, kind: str) -> None:
    """Against a sum over all weights, the importance of each written out."""
    weight, diagonal = weights_of((6, 45)), positive(45)
    gradients = {"activation": None, "gradient": positive(6, 2), "fisher": positive((6, 45), 3)}[kind]
    known: Any = stats(diagonal, gradients)
    if kind == "activation":
        counts = np.tile(diagonal.astype(np.float64), (6, 1))
    elif kind == "gradient":
        assert gradients is not None
        counts = np.outer(gradients + 0.3 * gradients.mean(), diagonal)
    else:
        assert gradients is not None
        counts = gradients + 0.3 * gradients.mean(axis=0)
    exact = weight.astype(np.float64)
    scale = weight.size / (counts * exact**2).sum() if kind == "activation" else 1.0
    chosen = METHOD.settings({"format": form, "sensitivity": "gradient"})
    assert METHOD.needs_statistics(chosen)
    errors = METHOD.errors(weight, known, chosen)
    for level, width in enumerate(WIDTHS):
        difference = exact - quantized(weight, width, chosen, known)
        assert errors[0, level] == pytest.approx((counts * difference**2).sum() * scale, rel=1e-5)
    # Without the option statistics change nothing.
    plain = METHOD.settings({"format": form})
    assert not METHOD.needs_statistics(plain)
    np.testing.assert_array_equal(METHOD.errors(weight, known, plain), METHOD.errors(weight, None, plain))


def test_the_search_counts_as_the_errors_do() -> None:
    weight = weights_of((4, 64))
    known: Any = stats(positive(64), positive(4, 2))
    chosen = METHOD.settings({"sensitivity": "gradient", "shared_exponent": "search"})
    by_largest = METHOD.settings({"sensitivity": "gradient"})
    assert (METHOD.errors(weight, known, chosen) < METHOD.errors(weight, known, by_largest))[0, :3].all()
    assert (quantized(weight, 3, chosen, known) != quantized(weight, 3, chosen)).any()


def test_parts_of_a_large_matrix_fit_together() -> None:
    rows = CHUNK // 64 + 3
    weight = weights_of((rows, 64))
    chosen = METHOD.settings({"format": "minifloat"})
    spec = METHOD.spec(weight.shape, np.array([2], np.uint8), chosen)
    exponents, codes, errors = quantize_blocks(weight, spec)
    tensor = METHOD.quantize(weight, np.array([2], np.uint8), None, chosen)
    np.testing.assert_array_equal(tensor.arrays[".exponents"], exponents)
    np.testing.assert_array_equal(ir.packing.unpack(tensor.arrays[".codes"], 64, 4), codes.reshape(rows, 64))
    relative = errors.sum() / np.square(weight, dtype=np.float64).sum() * weight.size
    assert METHOD.errors(weight, None, chosen)[0, 2] == pytest.approx(relative, rel=1e-9)


@pytest.mark.parametrize("form", ["bfp", "minifloat"])
def test_more_bits_leave_less_error(form: str) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    errors = METHOD.errors(weight, None, METHOD.settings({"format": form}))
    assert all(after < 0.5 * before for before, after in itertools.pairwise(errors[0]))


def test_real_weights(real_gguf: Path) -> None:
    """The relative errors of SmolLM2 by which the docstring compares formats, on one of its matrices."""
    checkpoint = open_checkpoint(str(real_gguf))
    weight = checkpoint.read("model.layers.9.mlp.down_proj.weight").astype(np.float32)
    assert weight.shape == (576, 1536)
    errors = {}
    for form in ("bfp", "minifloat"):
        errors[form] = METHOD.errors(weight, None, METHOD.settings({"format": form}))[0] / weight.size
    at_four, at_six = 4 - WIDTHS[0], 6 - WIDTHS[0]
    assert 0.08 < errors["bfp"][at_four] ** 0.5 < 0.15
    assert 0.02 < errors["bfp"][at_six] ** 0.5 < 0.04
    assert (errors["minifloat"][at_four:] < 0.9 * errors["bfp"][at_four:]).all()


@pytest.mark.parametrize("form", FORMATS)
def test_levels_are_widths_by_bytes(form: str) -> None:
    chosen = METHOD.settings({"block": 16, "format": form})
    levels = METHOD.levels((4, 100), chosen)
    assert (levels.units, levels.overhead) == (1, 0)
    assert levels.code_bytes == tuple(4 * 7 * 16 * w // 8 for w in WIDTHS)
    assert levels.nbytes == tuple(codes + 4 * 7 for codes in levels.code_bytes)
    for level, nbytes in enumerate(levels.nbytes):
        assert METHOD.spec((4, 100), np.array([level], np.uint8), chosen).nbytes == nbytes


@pytest.mark.parametrize(
    ("exponent_width", "expected"), [(0, [1, 1, 2, 2, 2, 2, 2]), (4, [1, 1, 2, 3, 4, 4, 4]), (1, [1] * 7)]
)
def test_a_minifloat_keeps_a_mantissa_bit(exponent_width: int, expected: list[int]) -> None:
    chosen = METHOD.settings({"format": "minifloat", "exponent_width": exponent_width})
    specs = [METHOD.spec((2, 32), np.array([level], np.uint8), chosen) for level in range(len(WIDTHS))]
    assert [spec.exponent_width for spec in specs] == expected


def test_the_profile_of_the_paper() -> None:
    chosen = METHOD.settings({"profile": "paper"})
    assert (chosen["format"], chosen["block"], chosen["exponent_width"]) == ("bfp", 16, 0)
    assert METHOD.settings({"profile": "paper", "format": "minifloat"})["exponent_width"] == 4
    assert METHOD.defaults(chosen).allocation == "model"


@pytest.mark.parametrize("settings", [{}, {"format": "minifloat", "block": 16, "exponent_width": 3}])
def test_settings_are_what_settings_make_of_them(settings: dict[str, Any]) -> None:
    chosen = METHOD.settings(settings)
    assert METHOD.settings(chosen) == chosen


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"block": 64}, "64"),
        ({"format": "int"}, "'int'"),
        ({"bits": 4}, "'bits'"),
        ({"exponent_width": 7, "format": "minifloat"}, "7"),
        ({"exponent_width": 2}, "set format=minifloat"),
        ({"exponent_width": 2, "format": "log"}, "the format log have no exponent"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        METHOD.settings(options)


def test_a_logarithm_refuses_zeros() -> None:
    weight = weights_of((CHUNK // 64 + 3, 64))  # the zero lies in the second part
    weight[-1, 7] = 0
    chosen = METHOD.settings({"format": "log"})
    message = rf"1 of {weight.size} weights are zero, the first at index \[{len(weight) - 1}, 7\]"
    with pytest.raises(InputError, match=message):
        METHOD.errors(weight, None, chosen)
    with pytest.raises(InputError, match=message):
        METHOD.quantize(weight, np.array([2], np.uint8), None, chosen)
