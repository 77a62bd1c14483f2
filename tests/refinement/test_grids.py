"""Refinement of affine tensors: never worse, at an optimum in the end, and the same as plain loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from anyquant.affine_grids import Kind, full_range, side_by_side
from anyquant.ir import AffineSpec, Tensor, dequantize
from anyquant.ir.packing import pack, unpack
from anyquant.refinement import grids, losses, refine

MOMENTS = ["correlated", "diagonal", "low rank", "dead columns", "massive", "zero"]
WEIGHTS = ["normal", "few values", "constant", "zero", "heavy tails"]
Arrays = Callable[..., np.ndarray]


def rounded(weight: np.ndarray, bits: int, block: int, *, symmetric: bool = False) -> Tensor:
    """To the nearest value of grids that reach from end to end."""
    spec = AffineSpec((weight.shape[0], weight.shape[1]), bits, block)
    kind = Kind(bits, symmetric)
    values = side_by_side(weight, spec)
    grid = full_range(values, kind)
    codes = (grid.steps(kind).nearest(values) + grid.zero).astype(np.uint8).T.reshape(len(weight), -1)
    codes[:, weight.shape[1] :] = 0
    arrays = {
        ".codes": pack(codes, bits),
        ".scale": grid.scale.reshape(len(weight), -1), ".zero": grid.zero.reshape(len(weight), -1),
    }  # fmt: skip
    tensor = Tensor(spec, arrays)
    tensor.check("made")
    return tensor


def codes_of(tensor: Tensor) -> np.ndarray:
    spec = tensor.spec
    assert isinstance(spec, AffineSpec)
    return unpack(tensor.arrays[".codes"], spec.blocks * spec.block, spec.bits)


@pytest.mark.parametrize("shape", [(6, 45), (1, 33), (7, 1), (1, 1), (3, 300)])
@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize(("bits", "block"), [(2, 16), (4, 32), (8, 64)])
def test_no_row_is_worse(
    shape: tuple[int, int], kind: str, bits: int, block: int, moment_of: Arrays, weight_of: Arrays, loss_of: Arrays
) -> None:
    moment = moment_of(kind, shape[1])
    for name in WEIGHTS:
        weight = weight_of(name, shape)
        tensor = rounded(weight, bits, block, symmetric=name == "heavy tails")
        refined = refine(weight, tensor, moment)
        refined.check("refined")
        assert refined.spec == tensor.spec
        np.testing.assert_array_equal(refined.arrays[".zero"], tensor.arrays[".zero"])
        slack = 1e-11 * np.abs(moment).max() * (weight.astype(np.float64) ** 2).sum(axis=1)
        assert (loss_of(weight, refined, moment) <= loss_of(weight, tensor, moment) + slack).all(), name


@pytest.mark.parametrize(("bits", "least"), [(2, 0.5), (4, 0.6)])
def test_correlated_inputs_lose_much_less(
    bits: int, least: float, moment_of: Arrays, weight_of: Arrays, loss_of: Arrays
) -> None:
    weight, moment = weight_of("normal", (50, 150)), moment_of("correlated", 150)
    tensor = rounded(weight, bits, 32)
    refined = refine(weight, tensor, moment)
    before, after = loss_of(weight, tensor, moment), loss_of(weight, refined, moment)
    assert (after < before).all()
    assert after.sum() < least * before.sum()


@pytest.mark.parametrize(("bits", "block"), [(2, 16), (4, 32)])
def test_in_the_end_no_code_and_no_scale_alone_is_better(
    bits: int, block: int, moment_of: Arrays, weight_of: Arrays
) -> None:
    weight, moment = weight_of("normal", (3, 40)), moment_of("correlated", 40)
    refined = refine(weight, rounded(weight, bits, block), moment, alternations=50, cycles=50)
    found = losses(weight, refined, moment)
    allowed = found * (1 - 1e-3)  # the last sweeps gain less than they cost
    codes = codes_of(refined)
    for column in range(40):
        for code in range(1 << bits):
            other = codes.copy()
            other[:, column] = code
            changed = Tensor(refined.spec, {**refined.arrays, ".codes": pack(other, bits)})
            assert (losses(weight, changed, moment) >= allowed).all(), (column, code)
    for at in range(refined.arrays[".scale"].shape[1]):
        for towards in (-np.inf, np.inf):
            scale = refined.arrays[".scale"].copy()
            scale[:, at] = np.nextafter(scale[:, at], np.float16(towards))
            changed = Tensor(refined.spec, {**refined.arrays, ".scale": scale})
            assert (losses(weight, changed, moment) >= allowed).all(), (at, towards)


def plainly_descended(weight: np.ndarray, tensor: Tensor, moment: np.ndarray) -> np.ndarray:
    """Every code of every row in turn, tried against all others, in FP64; the losses, float64 [out]."""
    spec = tensor.spec
    assert isinstance(spec, AffineSpec)
    scale, zero = tensor.arrays[".scale"].astype(np.float64), tensor.arrays[".zero"].astype(np.float64)
    result = np.empty(len(weight))
    for row, wanted in enumerate(weight.astype(np.float64)):
        q = dequantize(tensor)[row].astype(np.float64)
        for column in range(len(q)):
            block = column // spec.block
            tried = []
            for value in (np.arange(1 << spec.bits) - zero[row, block]) * scale[row, block]:
                q[column] = value
                tried.append(((q - wanted) @ moment @ (q - wanted), value))
            q[column] = min(tried)[1]
        result[row] = (q - wanted) @ moment @ (q - wanted)
    return result


@pytest.mark.parametrize("columns", [1, 15, 33, 140])  # within a leaf, over leaves, over blocks of products
@pytest.mark.parametrize("kind", ["correlated", "massive"])
def test_a_sweep_is_that_of_plain_loops(columns: int, kind: str, moment_of: Arrays, weight_of: Arrays) -> None:
    weight, moment = weight_of("normal", (5, columns)), moment_of(kind, columns)
    tensor = rounded(weight, 2, 16)
    fitted = refine(weight, tensor, moment, alternations=1, cycles=0)
    swept = refine(weight, tensor, moment, alternations=1, cycles=1)
    np.testing.assert_array_equal(codes_of(fitted), codes_of(tensor))
    np.testing.assert_array_equal(swept.arrays[".scale"], fitted.arrays[".scale"])
    np.testing.assert_allclose(
        losses(weight, swept, moment), plainly_descended(weight, fitted, moment.astype(np.float64)), rtol=1e-3
    )


def test_a_column_of_next_to_no_power_stays(moment_of: Arrays, weight_of: Arrays) -> None:
    weight, moment = weight_of("normal", (4, 20)), moment_of("correlated", 20)
    moment[3, :] = moment[:, 3] = 0
    moment[3, 3] = 1e-38
    tensor = rounded(weight, 2, 16)
    refined = refine(weight, tensor, moment)  # warnings are errors here
    np.testing.assert_array_equal(codes_of(refined)[:, 3], codes_of(tensor)[:, 3])


def test_groups_of_rows_know_nothing_of_each_other(moment_of: Arrays, weight_of: Arrays) -> None:
    weight = weight_of("normal", (10, 36))
    moments = np.stack([moment_of("correlated", 36, 1), moment_of("dead columns", 36, 2), moment_of("massive", 36, 3)])
    tensor = rounded(weight, 2, 16)
    values = dequantize(refine(weight, tensor, moments))
    for part, moment in zip(np.array_split(np.arange(10), 3), moments, strict=True):
        alone = Tensor(AffineSpec((len(part), 36), 2, 16), {name: array[part] for name, array in tensor.arrays.items()})
        np.testing.assert_array_equal(values[part], dequantize(refine(weight[part], alone, moment)))


def test_many_rows_are_refined_in_parts(moment_of: Arrays, weight_of: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = weight_of("normal", (11, 33)), moment_of("correlated", 33)
    tensor = rounded(weight, 2, 16)
    whole = refine(weight, tensor, moment)
    monkeypatch.setattr(grids, "_ELEMENTS", 4 * 33)
    parts = refine(weight, tensor, moment)
    np.testing.assert_allclose(losses(weight, parts, moment), losses(weight, whole, moment), rtol=0.05)
    assert (losses(weight, parts, moment) < losses(weight, tensor, moment)).all()


def test_what_is_given_is_left_alone(moment_of: Arrays, weight_of: Arrays) -> None:
    weight, moment = weight_of("normal", (9, 50)), moment_of("correlated", 50)
    tensor = rounded(weight, 4, 16)
    kept = {name: array.copy() for name, array in tensor.arrays.items()}
    first, second, none = (refine(weight, tensor, moment, alternations=count) for count in (2, 2, 0))
    for name, array in kept.items():
        np.testing.assert_array_equal(first.arrays[name], second.arrays[name])
        np.testing.assert_array_equal(tensor.arrays[name], array)
        np.testing.assert_array_equal(none.arrays[name], array)
        assert not np.shares_memory(first.arrays[name], tensor.arrays[name])


def test_a_scale_stays_within_fp16(moment_of: Arrays) -> None:
    moment = moment_of("diagonal", 16)
    weight = np.full((1, 16), 65504, np.float32)
    spec = AffineSpec((1, 16), 2, 16)
    codes = pack(np.array([[1] + [0] * 15], np.uint8), 2)  # one step of 1e5 would be best, the rest cannot move
    arrays = {".codes": codes, ".scale": np.full((1, 1), 60000, np.float16), ".zero": np.zeros((1, 1), np.uint8)}
    refined = refine(weight * np.float32(2), Tensor(spec, arrays), moment, cycles=0)
    assert refined.arrays[".scale"][0, 0] == np.float16(65504)
