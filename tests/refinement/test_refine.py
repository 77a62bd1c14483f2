"""What refinement promises, for both axes, compiled and not; losses in FP64 from what is stored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyquant.errors import InputError, UsageError
from anyquant.ir import BlockSpec, CodebookSpec, DenseSpec, Tensor, dequantize
from anyquant.ir.packing import pack
from anyquant.refinement import losses, refine
from anyquant.runtime import native

MOMENTS = ["correlated", "diagonal", "low rank", "dead columns", "massive", "zero"]
WEIGHTS = ["normal", "few values", "constant", "zero", "heavy tails"]
SHAPES = [(6, 45), (1, 33), (7, 1), (1, 1)]
FORMS = [{"scaled": True, "outliers": 0.3}, {"outliers": 0.1}, {"scaled": True}, {"outliers": 1}, {}]
Arrays = Callable[..., np.ndarray]
MakeTensor = Callable[..., Tensor]


def widths(channels: int) -> np.ndarray:
    """Several, as far as they go."""
    return np.resize(np.array([3, 0, 2, 1, 5, 4], np.uint8), channels)


def check_same_form(before: Tensor, after: Tensor) -> None:
    assert after.spec == before.spec
    for name in set(before.arrays) - {".codes", ".codebook"}:
        np.testing.assert_array_equal(after.arrays[name], before.arrays[name])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("axis", [0, 1])
def test_never_worse(
    shape: tuple[int, int], kind: str, axis: int, moment_of: Arrays, weight_of: Arrays, tensor_of: MakeTensor,
    loss_of: Arrays, check_canonical: Callable[[Tensor], None],
) -> None:  # fmt: skip
    moment = moment_of(kind, shape[1])
    for name, form in zip(WEIGHTS, FORMS, strict=True):
        weight = weight_of(name, shape)
        tensor = tensor_of(weight, widths(shape[axis]), axis, **form)
        refined = refine(weight, tensor, moment, cycles=2)
        check_same_form(tensor, refined)
        check_canonical(refined)
        before, after = loss_of(weight, tensor, moment), loss_of(weight, refined, moment)
        slack = 1e-11 * np.abs(moment).max() * (weight.astype(np.float64) ** 2).sum(axis=1)
        if axis == 0:
            assert (after <= before + slack).all(), (form, name)
        else:
            assert after.sum() <= before.sum() + slack.sum(), (form, name)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_correlated_inputs_lose_much_less(
    axis: int, width: int, moment_of: Arrays, weight_of: Arrays, tensor_of: MakeTensor, loss_of: Arrays
) -> None:
    weight, moment = weight_of("normal", (50, 41)), moment_of("correlated", 41)
    tensor = tensor_of(weight, np.full(weight.shape[axis], width, np.uint8), axis)
    refined = refine(weight, tensor, moment)
    before, after = loss_of(weight, tensor, moment).sum(), loss_of(weight, refined, moment).sum()
    assert after < 0.75 * before
    more = refine(weight, refined, moment, alternations=6)
    assert loss_of(weight, more, moment).sum() <= after


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("axis", [0, 1])
def test_same_again(axis: int, moment_of: Arrays, weight_of: Arrays, tensor_of: MakeTensor) -> None:
    weight, moment = weight_of("heavy tails", (9, 50)), moment_of("massive", 50)
    tensor = tensor_of(weight, widths(weight.shape[axis]), axis, scaled=True, outliers=0.05)
    kept = {name: array.copy() for name, array in tensor.arrays.items()}
    first, second = refine(weight, tensor, moment), refine(weight, tensor, moment)
    for name, array in kept.items():
        assert first.arrays[name].tobytes() == second.arrays[name].tobytes()
        np.testing.assert_array_equal(tensor.arrays[name], array)  # and what was given is left alone
        assert not np.shares_memory(first.arrays[name], tensor.arrays[name])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("axis", [0, 1])
def test_nothing_to_do(axis: int, moment_of: Arrays, weight_of: Arrays, tensor_of: MakeTensor) -> None:
    weight, moment = weight_of("normal", (5, 40)), moment_of("correlated", 40)
    tensor = tensor_of(weight, np.full(weight.shape[axis], 2, np.uint8), axis)
    same = refine(weight, tensor, moment, alternations=0)
    np.testing.assert_array_equal(dequantize(same), dequantize(tensor))


@pytest.mark.usefixtures("backend")
def test_spare_entries_are_used(moment_of: Arrays, weight_of: Arrays, loss_of: Arrays) -> None:
    # All codes 0 and one value: everything else has to be found.
    weight, moment = weight_of("normal", (4, 60)), moment_of("correlated", 60)
    spec = CodebookSpec.from_bits((4, 60), 0, np.full(4, 3, np.uint8))
    arrays = {".bits": np.full(4, 3, np.uint8), ".codes": np.zeros(spec.code_bytes, np.uint8)}
    tensor = Tensor(spec, arrays | {".codebook": np.full(32, 0.25, np.float16)})
    refined = refine(weight, tensor, moment)
    assert (loss_of(weight, refined, moment) < 0.3 * loss_of(weight, tensor, moment)).all()
    assert all(len(np.unique(row)) > 5 for row in dequantize(refined))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("axis", [0, 1])
def test_dead_columns_stay_near_their_weights(
    axis: int, moment_of: Arrays, weight_of: Arrays, tensor_of: MakeTensor
) -> None:
    weight, moment = weight_of("normal", (30, 45)), moment_of("dead columns", 45)
    tensor = tensor_of(weight, np.full(weight.shape[axis], 3, np.uint8), axis)
    dead = np.diag(moment) == 0
    assert dead.any()
    error = (dequantize(refine(weight, tensor, moment)) - weight)[:, dead]
    assert np.abs(error).mean() < 1.5 * np.abs((dequantize(tensor) - weight)[:, dead]).mean()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("axis", [0, 1])
def test_groups_of_rows(
    axis: int, moment_of: Arrays, weight_of: Arrays, tensor_of: MakeTensor, loss_of: Arrays
) -> None:
    weight = weight_of("normal", (10, 36))
    moments = np.stack([moment_of("correlated", 36, 1), moment_of("dead columns", 36, 2), moment_of("massive", 36, 3)])
    tensor = tensor_of(weight, np.full(weight.shape[axis], 2, np.uint8), axis, outliers=0.05)
    refined = refine(weight, tensor, moments)
    before, after = loss_of(weight, tensor, moments), loss_of(weight, refined, moments)
    np.testing.assert_allclose(losses(weight, refined, moments), after, rtol=1e-9)
    if axis == 1:
        assert after.sum() < 0.8 * before.sum()
        return
    assert (after < before).all()
    assert after.sum() < 0.8 * before.sum()
    values = dequantize(refined)
    for part, moment in zip(np.array_split(np.arange(10), 3), moments, strict=True):
        alone = refine(weight, tensor, moment)  # rows know nothing of each other
        np.testing.assert_array_equal(dequantize(alone)[part], values[part])


def test_weights_of_rows_matter_where_columns_own_codebooks(
    moment_of: Arrays, weight_of: Arrays, tensor_of: MakeTensor, loss_of: Arrays
) -> None:
    weight, moment = weight_of("normal", (40, 30)), moment_of("correlated", 30)
    tensor = tensor_of(weight, np.full(30, 2, np.uint8), 1)
    row_weights = np.where(np.arange(40) < 5, 100, 1).astype(np.float32)
    row_weights[-1] = 0
    plain, weighted = refine(weight, tensor, moment), refine(weight, tensor, moment, row_weights=row_weights)
    before = loss_of(weight, tensor, moment)
    assert row_weights @ loss_of(weight, weighted, moment) < row_weights @ before
    assert loss_of(weight, weighted, moment)[:5].sum() < 0.5 * loss_of(weight, plain, moment)[:5].sum()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1]), st.integers(1, 12), st.integers(1, 40))
def test_never_worse_for_any_tensor(
    moment_of: Arrays,
    loss_of: Arrays,
    check_canonical: Callable[[Tensor], None],
    seed: int,
    axis: int,
    out: int,
    n: int,
) -> None:
    # Codes and codebooks at random: nothing like what a method makes.
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((out, n)) * 10.0 ** rng.integers(-6, 4)).astype(np.float32)
    bits = rng.integers(0, 9, (out, n)[axis]).astype(np.uint8)
    spec = CodebookSpec.from_bits((out, n), axis, bits)
    codes = [pack(rng.integers(0, 1 << int(b), (1, (n, out)[axis])), int(b))[0] for b in bits]
    books = [np.sort(rng.choice(weight.ravel(), 1 << int(b))).astype(np.float16) for b in bits]
    tensor = Tensor(spec, {".bits": bits, ".codes": np.concatenate(codes), ".codebook": np.concatenate(books)})
    tensor.check("random")
    moment = moment_of(str(rng.choice(MOMENTS)), n, int(rng.integers(99)))
    refined = refine(weight, tensor, moment, cycles=2)
    check_canonical(refined)
    before, after = loss_of(weight, tensor, moment).sum(), loss_of(weight, refined, moment).sum()
    assert after <= before * (1 + 1e-9) + 1e-11 * float(np.abs(moment).max()) * (weight.astype(np.float64) ** 2).sum()


def test_what_is_refused(moment_of: Arrays, weight_of: Arrays, tensor_of: MakeTensor) -> None:
    weight, moment = weight_of("normal", (4, 20)), moment_of("correlated", 20)
    tensor = tensor_of(weight, np.full(4, 2, np.uint8))
    column = tensor_of(weight, np.full(20, 2, np.uint8), 1)
    for spec in (DenseSpec((4, 20), "F32"), BlockSpec((4, 20))):
        with pytest.raises(UsageError, match=spec.kind):
            refine(weight, Tensor(spec, {}), moment)
    with pytest.raises(UsageError, match="-1"):
        refine(weight, tensor, moment, cycles=-1)
    with pytest.raises(ValueError, match=r"float32 \[4, 20\]"):
        refine(weight[:3], tensor, moment)
    with pytest.raises(ValueError, match="float64"):
        refine(weight.astype(np.float64), tensor, moment)
    with pytest.raises(ValueError, match=r"\[19, 19\]"):
        refine(weight, tensor, moment[1:, 1:])
    with pytest.raises(ValueError, match="5 groups"):
        refine(weight, tensor, np.stack([moment] * 5))
    crooked = moment.copy()
    crooked[3, 7] += 1
    with pytest.raises(InputError, match=r"not symmetric.*\[3, 7\]"):
        refine(weight, tensor, crooked)
    for bad in (np.nan, np.inf):
        broken = moment.copy()
        broken[5, 5] = bad
        with pytest.raises(InputError, match=r"moment holds 1 non-finite.*\[5, 5\]"):
            refine(weight, tensor, broken)
    broken[5, 5] = -1
    with pytest.raises(InputError, match=r"-1 at \[5, 5\]"):
        refine(weight, tensor, broken)
    with pytest.raises(ValueError, match=r"row_weights must be float32 \[4\]"):
        refine(weight, column, moment, row_weights=np.ones(3, np.float32))
    with pytest.raises(ValueError, match="negative number, -1"):
        refine(weight, column, moment, row_weights=np.array([1, 1, -1, 1], np.float32))
    broken = weight.copy()
    broken[2, 1] = np.nan
    with pytest.raises(InputError, match=r"weight holds 1 .*\[2, 1\]"):
        refine(broken, tensor, moment)


def test_a_moment_that_rounding_made_crooked_is_taken(
    moment_of: Arrays, weight_of: Arrays, tensor_of: MakeTensor, loss_of: Arrays
) -> None:
    weight, moment = weight_of("normal", (4, 20)), moment_of("correlated", 20)
    tensor = tensor_of(weight, np.full(4, 2, np.uint8))
    moment[2, 3] = np.nextafter(moment[2, 3], np.float32(9))
    assert (loss_of(weight, refine(weight, tensor, moment), moment) < loss_of(weight, tensor, moment)).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_damping_adds_to_the_diagonal(axis: int, moment_of: Arrays, weight_of: Arrays, tensor_of: MakeTensor) -> None:
    weight, moment = weight_of("normal", (12, 30)), moment_of("low rank", 30)
    tensor = tensor_of(weight, np.full(weight.shape[axis], 2, np.uint8), axis)
    damped = refine(weight, tensor, moment, damping=0.25)
    by_hand = moment + np.eye(30, dtype=np.float32) * np.float32(0.25 * moment.diagonal().mean(dtype=np.float64))
    expected = refine(weight, tensor, by_hand)
    np.testing.assert_array_equal(dequantize(damped), dequantize(expected))
    assert (dequantize(damped) != dequantize(refine(weight, tensor, moment))).any()
    for bad in (-0.1, np.nan, np.inf):
        with pytest.raises(UsageError, match="damping"):
            refine(weight, tensor, moment, damping=bad)


@pytest.mark.skipif(not native.available(), reason="no compiled library")
def test_threads_do_not_disturb_each_other(moment_of: Arrays, weight_of: Arrays, tensor_of: MakeTensor) -> None:
    from concurrent.futures import ThreadPoolExecutor

    weight, moment = weight_of("normal", (40, 96)), moment_of("correlated", 96)
    tensor = tensor_of(weight, np.full(40, 3, np.uint8))
    alone = refine(weight, tensor, moment).arrays[".codes"].tobytes()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: refine(weight, tensor, moment).arrays[".codes"].tobytes(), range(8)))
    assert found == [alone] * 8
