"""SKIM against what its tables promise: errors recomputed from the tensors, bytes from the specs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anyquant import ir
from anyquant.calibration import MatrixStatistics
from anyquant.errors import InputError, UsageError
from anyquant.methods.skim import SkimMethod

stats = MatrixStatistics.of

METHOD = SkimMethod()
PLAIN = METHOD.settings({})


def weights_of(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp2(rng.integers(-3, 3, (shape[0], 1)))).astype(np.float32)


def moments(columns: int, seed: int = 1) -> np.ndarray:
    return np.exp2(np.random.default_rng(seed).uniform(-4, 4, columns)).astype(np.float32)


def row_errors(weight: np.ndarray, tensor: ir.Tensor, importance: np.ndarray) -> np.ndarray:
    """Weighted squared error of each row, from the dequantized tensor; element by element."""
    values = ir.dequantize(tensor).astype(np.float64)
    errors = np.zeros(len(weight))
    for i, j in np.ndindex(weight.shape):
        errors[i] += float(importance[i, j]) * (float(weight[i, j]) - values[i, j]) ** 2
    return errors


@pytest.mark.parametrize("outliers", [0.0, 2.0])
@pytest.mark.parametrize("shape", [(5, 75), (1, 64), (4, 33), (3, 1), (7, 8)])
@pytest.mark.parametrize("importance", ["none", "activation", "gradient", "fisher"])
def test_tables_hold_what_the_tensors_lose(shape: tuple[int, int], importance: str, outliers: float) -> None:
    weight, diagonal = weights_of(shape), moments(shape[1])
    gradients = np.exp2(np.random.default_rng(2).uniform(-6, 2, shape)).astype(np.float32)
    factors = gradients[:, 0].copy()
    known = {
        "none": None, "activation": stats(diagonal), "gradient": stats(diagonal, factors),
        "fisher": stats(diagonal, gradients),
    }[importance]  # fmt: skip
    counted = {
        "none": np.ones(shape), "activation": np.broadcast_to(diagonal, shape),
        "gradient": np.outer(factors + 0.3 * factors.mean(), diagonal),
        "fisher": gradients + 0.3 * gradients.mean(axis=0),
    }[importance]  # fmt: skip
    chosen = METHOD.settings({"outliers": outliers})
    table = METHOD.errors(weight, known, chosen)
    assert table.shape == (shape[0], METHOD.levels(shape, chosen).count)
    scale = (
        1.0
        if importance in ("gradient", "fisher")
        else weight.size / float((counted * weight.astype(np.float64) ** 2).sum())
    )
    for width in range(table.shape[1]):
        tensor = METHOD.quantize(weight, np.full(shape[0], width, np.uint8), known, chosen)
        tensor.check("w")
        found = row_errors(weight, tensor, counted) * scale
        # Codebooks are FP16, rounded by up to 2**-11 of a value; (a + b)**2 <= a**2 + 2 a b + b**2.
        rounding = scale * (counted * weight.astype(np.float64) ** 2).sum(axis=1) * 2.0**-22
        slack = 2 * np.sqrt(table[:, width] * rounding) + rounding
        assert (np.abs(found - table[:, width]) <= slack + 1e-9 * table[:, width]).all()


@pytest.mark.parametrize("shape", [(5, 75), (1, 64), (4, 33)])
@pytest.mark.parametrize("importance", ["activation", "gradient", "fisher"])
def test_tables_by_outputs_hold_what_the_outputs_lose(shape: tuple[int, int], importance: str) -> None:
    """L-full: d^T E[x x^T] d of each row's error d, times what the row's gradient says where that is known."""
    weight, rng = weights_of(shape), np.random.default_rng(4)
    x = rng.standard_normal((300, shape[1])) @ rng.standard_normal((shape[1], shape[1]))
    moment = (x.T @ x / len(x)).astype(np.float32)
    gradients = np.exp2(rng.uniform(-6, 2, shape)).astype(np.float32)
    known = stats(moment, {"activation": None, "gradient": gradients[:, 0].copy(), "fisher": gradients}[importance])
    chosen = METHOD.settings({"objective": "full", "shared": 0.0})
    counts = gradients[:, 0] if importance == "gradient" else np.ones(shape[0])
    table = METHOD.errors(weight, known, chosen)
    found = np.empty(table.shape)
    for width in range(table.shape[1]):
        values = ir.dequantize(METHOD.quantize(weight, np.full(shape[0], width, np.uint8), known, chosen))
        for i, lost in enumerate(weight.astype(np.float64) - values):
            found[i, width] = counts[i] * (lost @ moment.astype(np.float64) @ lost)
    # Of activations alone errors are relative, by the factor that makes those by weights compare.
    factor = table[0, 0] / found[0, 0]
    assert importance == "activation" or factor == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(table, factor * found, rtol=1e-4, atol=1e-9 * table.max())


@pytest.mark.parametrize("how", ["closed", "gradient"])
def test_a_factor_per_column_serves_the_outputs(how: str) -> None:
    """Columns of unlike size, which no codebook of a row fits: the outputs lose less, at the same widths."""
    rng = np.random.default_rng(5)
    weight = (rng.standard_normal((40, 48)) * np.exp2(rng.uniform(-2, 2, 48))).astype(np.float32)
    known = stats(np.ones(48, np.float32))
    lost = {}
    for scale in ("off", how):
        chosen = METHOD.settings({"scale": scale})
        tensor = METHOD.quantize(weight, np.full(40, 3, np.uint8), known, chosen)
        assert (".input_scale" in tensor.arrays) == (scale != "off")
        lost[scale] = float(((weight - ir.dequantize(tensor)) ** 2).sum())
    assert lost[how] < 0.95 * lost["off"]


def test_rows_of_outliers_alone_lose_nothing() -> None:
    gradient = np.where(np.arange(10) == 2, np.float32(9), np.float32(1))
    weight, known = weights_of((10, 40)), stats(np.ones(40, np.float32), gradient)
    weight[2] = np.sign(weight[2]) * (1000 + np.abs(weight[2]))
    chosen = METHOD.settings({"outliers": 10.0, "outlier_rule": "magnitude"})  # of ten rows: as many as a row has
    table = METHOD.errors(weight, known, chosen)
    assert not table[2].any()
    assert (np.delete(table, 2, axis=0)[:, 0] > 0).all()
    np.testing.assert_array_equal(
        ir.dequantize(METHOD.quantize(weight, np.zeros(10, np.uint8), known, chosen))[2],
        weight[2].astype(np.float16),
    )


def test_more_bits_never_hurt() -> None:
    errors = METHOD.errors(weights_of((6, 100)), stats(moments(100)), PLAIN)
    for before, after in itertools.pairwise(errors.T):
        assert (after <= before).all()


@pytest.mark.parametrize("shape", [(5, 75), (1, 1), (2, 70_001)])
def test_levels_are_the_bytes_of_the_specs(shape: tuple[int, int]) -> None:
    for outliers in (0.0, 1.5):
        chosen = METHOD.settings({"outliers": outliers})
        levels = METHOD.levels(shape, chosen)
        rng = np.random.default_rng(3)
        for _ in range(20):
            widths = rng.integers(0, levels.count, shape[0]).astype(np.uint8)
            spec = METHOD.spec(shape, widths, chosen)
            assert spec.nbytes == levels.overhead + sum(levels.nbytes[w] for w in widths)
            assert spec.code_bytes == sum(levels.code_bytes[w] for w in widths)


@pytest.mark.parametrize(("columns", "most"), [(1, 1), (8, 2), (33, 4), (64, 5), (576, 8), (100_000, 8)])
def test_no_row_takes_more_than_in_fp16(columns: int, most: int) -> None:
    levels = METHOD.levels((3, columns), PLAIN)
    assert levels.count == most + 1
    assert all(nbytes <= 2 * columns for nbytes in levels.nbytes[2:])


def test_mixed_widths_row_by_row() -> None:
    weight, known = weights_of((9, 75)), stats(moments(75))
    widths = np.array([3, 0, 8, 1, 2, 5, 4, 7, 6], np.uint8)
    whole = ir.dequantize(METHOD.quantize(weight, widths, known, PLAIN))
    for row, width in enumerate(widths):
        alone = METHOD.quantize(weight[row : row + 1], widths[row : row + 1], known, PLAIN)
        np.testing.assert_array_equal(whole[row], ir.dequantize(alone)[0])
        assert len(np.unique(whole[row])) <= 1 << int(width)


def test_rows_of_one_value_are_exact_at_any_width() -> None:
    weight = np.zeros((3, 40), np.float32)
    weight[1] = 0.25
    weight[2, ::2] = -1.5
    for width in (1, 4, 8):
        tensor = METHOD.quantize(weight, np.full(3, width, np.uint8), stats(moments(40)), PLAIN)
        np.testing.assert_array_equal(ir.dequantize(tensor), weight)
    assert not METHOD.errors(weight, stats(moments(40)), PLAIN)[:2].any()


def test_a_matrix_of_zeros() -> None:
    weight = np.zeros((2, 5), np.float32)
    for known in (
        None,
        stats(np.zeros(5, np.float32)),
        stats(np.ones(5, np.float32), np.zeros((2, 5), np.float32)),
    ):
        assert not METHOD.errors(weight, known, PLAIN).any()
        assert not ir.dequantize(METHOD.quantize(weight, np.full(2, 2, np.uint8), known, PLAIN)).any()


def test_columns_that_never_saw_anything_are_still_near_their_weights() -> None:
    weight = weights_of((4, 64))
    diagonal = moments(64)
    diagonal[::2] = 0
    values = ir.dequantize(METHOD.quantize(weight, np.full(4, 4, np.uint8), stats(diagonal), PLAIN))
    assert np.abs(values - weight)[:, ::2].mean() < 0.3 * np.abs(weight)[:, ::2].mean()


def test_rows_without_gradient_still_count() -> None:
    """An attention head that sees one token, whatever its query, has none."""
    weight = weights_of((4, 64))
    known = stats(moments(64), np.array([1, 0, 1, 1e-12], np.float32))
    table = METHOD.errors(weight, known, PLAIN)
    plain = METHOD.errors(weight, stats(known.diagonal), PLAIN)
    plain *= float(known.diagonal @ (weight.astype(np.float64) ** 2).sum(0)) / weight.size  # in its own units again
    np.testing.assert_allclose(table[[1, 3]], 0.15 * plain[[1, 3]], rtol=1e-4)
    np.testing.assert_allclose(table[[0, 2]], 1.15 * plain[[0, 2]], rtol=1e-4)


def test_outliers_are_weighted_by_their_rows_too() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    weight[:4] *= 3
    gradient = np.array([0] * 4 + [1] * 4, np.float32)
    made = METHOD.settings({"outliers": 2.0})
    chosen = np.full(8, 3, np.uint8)
    tensor = METHOD.quantize(weight, chosen, stats(np.ones(64, np.float32), gradient), made)
    starts = tensor.arrays[".outlier_indptr"]
    # Rows of the first half, nine times as wide in squares, count for .15 of the second half's 1.15.
    assert starts[8] == 10
    plain = METHOD.quantize(weight, chosen, stats(np.ones(64, np.float32)), made).arrays[".outlier_indptr"]
    assert starts[4] < plain[4]


def test_outliers_keep_their_values_and_are_those_that_hurt_most() -> None:
    weight = np.random.default_rng(0).standard_normal((20, 100)).astype(np.float32)
    places = [(0, 3), (7, 99), (7, 0), (19, 50)]
    for i, (row, column) in enumerate(places):
        weight[row, column] = 50 + i
    tensor = METHOD.quantize(weight, np.full(20, 2, np.uint8), None, METHOD.settings({"outliers": 0.2}))
    tensor.check("w")
    assert isinstance(tensor.spec, ir.CodebookSpec)
    assert tensor.spec.outliers == 4
    values = ir.dequantize(tensor)
    rows = np.repeat(np.arange(20), np.diff(tensor.arrays[".outlier_indptr"].astype(np.int64)))
    assert sorted(zip(rows.tolist(), tensor.arrays[".outlier_index"].tolist(), strict=True)) == sorted(places)
    for place in places:
        assert values[place] == weight[place]
    assert np.abs(tensor.arrays[".codebook"]).max() < 10  # the clustering has not seen them


def test_outliers_that_tie_are_taken_in_order_and_exactly_as_many_as_promised() -> None:
    weight = np.tile(np.array([1.0, -1.0], np.float32), (10, 50))
    tensor = METHOD.quantize(weight, np.full(10, 1, np.uint8), None, METHOD.settings({"outliers": 10.0}))
    assert isinstance(tensor.spec, ir.CodebookSpec)
    assert tensor.spec.outliers == 100
    assert tensor.arrays[".outlier_indptr"].tolist() == [0] + [100] * 10
    np.testing.assert_array_equal(ir.dequantize(tensor), weight)


@settings(max_examples=40)
@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 40)),
        elements=st.floats(-100, 100, width=32, allow_subnormal=False),
    ),
    st.integers(0, 2**32 - 1),
)
def test_any_matrix(weight: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    widths = rng.integers(0, 9, len(weight)).astype(np.uint8)
    known = stats(np.exp2(rng.uniform(-30, 30, weight.shape[1])).astype(np.float32))
    tensor = METHOD.quantize(weight, widths, known, METHOD.settings({"outliers": 5.0}))
    tensor.check("w")
    assert tensor.spec == METHOD.spec((weight.shape[0], weight.shape[1]), widths, METHOD.settings({"outliers": 5.0}))


def test_a_weight_outside_fp16_is_refused_by_name() -> None:
    weight = weights_of((3, 10))
    weight[1, 4] = -7e4
    with pytest.raises(InputError, match=r"-70000\.0 at \[1, 4\] does not fit into FP16"):
        METHOD.quantize(weight, np.full(3, 2, np.uint8), None, PLAIN)
    with pytest.raises(InputError, match=r"-70000\.0 at \[1, 4\] does not fit into FP16"):
        METHOD.errors(weight, None, PLAIN)


def test_outliers_as_in_squeezellm() -> None:
    weight = weights_of((10, 40), 5)
    gradients = np.exp2(np.random.default_rng(6).uniform(-6, 2, (10, 40))).astype(np.float32)
    made = METHOD.settings({"outliers": 5.0, "outlier_rule": "magnitude"})
    tensor = METHOD.quantize(weight, np.full(10, 2, np.uint8), stats(np.ones(40, np.float32), gradients), made)
    row = np.repeat(np.arange(10), np.diff(tensor.arrays[".outlier_indptr"].astype(np.int64)))
    found = set(zip(row.tolist(), tensor.arrays[".outlier_index"].tolist(), strict=True))
    assert len(found) == 20
    counted = gradients + 0.3 * gradients.mean(axis=0)
    sensitive = [divmod(int(i), 40) for i in np.argsort(-counted.ravel(), kind="stable")[:2]]
    rest = [divmod(int(i), 40) for i in np.argsort(-np.abs(weight).ravel(), kind="stable")]
    assert found == set(sensitive) | set([place for place in rest if place not in sensitive][:18])
    tensor.check("w")


@pytest.mark.parametrize(
    ("options", "word"), [({"outliers": -1.0}, "-1"), ({"outliers": 10.5}, "10.5"), ({"block": 32}, "'block'")]
)
def test_bad_options_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        METHOD.settings(options)
