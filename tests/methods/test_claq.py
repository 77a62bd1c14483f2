"""CLAQ against a slow version of itself: inverses of what is left, and all partitions of a column tried."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anyquant import ir
from anyquant.allocation import Table, walk
from anyquant.calibration import MatrixStatistics
from anyquant.errors import InputError, UsageError
from anyquant.methods.claq import ClaqMethod, outlier_order
from anyquant.methods.protocol import JobDefaults

stats = MatrixStatistics.of

METHOD = ClaqMethod()
PLAIN = METHOD.settings({"outliers": 0.0})


def weights_of(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp2(rng.uniform(-2, 2, shape[1]))).astype(np.float32)


def moment_of(columns: int, seed: int = 1, dead: tuple[int, ...] = ()) -> np.ndarray:
    """Correlated inputs of different power."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((3 * columns + 2, columns)) + rng.standard_normal((3 * columns + 2, 1))
    inputs *= np.exp2(rng.uniform(-1, 1, columns))
    inputs[:, list(dead)] = 0
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def damped(moment: np.ndarray, damping: float) -> tuple[np.ndarray, list[int]]:
    """The moment that feedback inverts, and the order of the columns."""
    whole = moment.astype(np.float64)
    diagonal = np.diag(whole).copy()
    for j in range(len(whole)):
        whole[j, j] += damping * diagonal[diagonal > 0].mean() if diagonal[j] > 0 else 1.0
    return whole, sorted(range(len(whole)), key=lambda j: -diagonal[j])


def best_codebook(values: np.ndarray, weights: np.ndarray, k: int) -> np.ndarray:
    """Weighted k-means by trying every partition of the sorted values."""
    if not weights.any():
        weights = np.ones(len(values))
    values, weights = values[weights > 0], weights[weights > 0]
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    k = min(k, len(values))
    best, found = np.inf, np.empty(0)
    for cuts in itertools.combinations(range(1, len(values)), k - 1):
        parts = list(itertools.pairwise([0, *cuts, len(values)]))
        means = np.array([np.average(values[a:b], weights=weights[a:b]) for a, b in parts])
        error = sum(float(weights[a:b] @ (values[a:b] - m) ** 2) for (a, b), m in zip(parts, means, strict=True))
        if error < best:
            best, found = error, means
    return found.astype(np.float16).astype(np.float64)


def slow_claq(
    weight: np.ndarray,
    moment: np.ndarray,
    widths: np.ndarray,
    rows: np.ndarray,
    reserved: np.ndarray,
    *,
    fit_all: bool = False,
    damping: float = 0.01,
    zero_dead: bool = False,
) -> np.ndarray:
    """Column by column; after each the best change of the columns that are left, from the inverse of their moment."""
    whole, order = damped(moment, damping)
    current = weight.astype(np.float64)
    if zero_dead:
        current[:, np.diag(moment) == 0] = 0
    result = np.zeros(weight.shape)
    for place, j in enumerate(order):
        values = current[:, j].copy()
        weights = rows.astype(np.float64).copy()
        if not fit_all:
            weights[reserved[:, j]] = 0
        codebook = best_codebook(values, weights, 1 << int(widths[j]))
        for i, value in enumerate(values):
            result[i, j] = value if reserved[i, j] else codebook[np.argmin(np.abs(codebook - value))]
        result[reserved[:, j], j] = result[reserved[:, j], j].astype(np.float16)
        rest = order[place:]
        inverse = np.linalg.inv(whole[np.ix_(rest, rest)])
        for there, k in enumerate(rest[1:], start=1):
            current[:, k] -= (values - result[:, j]) / inverse[0, 0] * inverse[0, there]
    return result


def outliers_of(tensor: ir.Tensor) -> np.ndarray:
    """Where a tensor has outliers, bool [out, in]."""
    found = np.zeros(tensor.spec.shape, bool)
    if ".outlier_index" in tensor.arrays:
        counts = np.diff(tensor.arrays[".outlier_indptr"].astype(np.int64))
        found[np.repeat(np.arange(len(counts)), counts), tensor.arrays[".outlier_index"]] = True
    return found


@pytest.mark.parametrize("options", [
    {}, {"outliers": 8.0}, {"outliers": 8.0, "cluster_outliers": True}, {"damping": 0.5, "zero_dead": True},
    {"outliers": 8.0, "outlier_rule": "dynamic"}, {"row_weights": "none"},
])  # fmt: skip
@pytest.mark.parametrize(("shape", "dead"), [((9, 6), ()), ((8, 11), (2, 7)), ((1, 5), ()), ((10, 1), ())])
def test_against_a_slow_oracle(shape: tuple[int, int], dead: tuple[int, ...], options: dict[str, Any]) -> None:
    weight, moment = weights_of(shape), moment_of(shape[1], dead=dead)
    gradient = np.exp2(np.random.default_rng(2).uniform(-3, 3, shape[0])).astype(np.float32)
    chosen = METHOD.settings({"outliers": 0.0, **options})
    count = METHOD.levels(shape, chosen).count
    widths = np.random.default_rng(3).integers(0, min(count, 4), shape[1]).astype(np.uint8)
    tensor = METHOD.quantize(weight, widths, stats(moment, gradient), chosen)
    tensor.check("w")
    assert tensor.spec == METHOD.spec(shape, widths, chosen)
    rows = gradient + 0.3 * gradient.mean() if chosen["row_weights"] == "gradient" else np.ones(shape[0])
    kept = {key: chosen[key] for key in ("damping", "zero_dead")}
    expected = slow_claq(weight, moment, widths, rows, outliers_of(tensor), fit_all=chosen["cluster_outliers"], **kept)
    np.testing.assert_allclose(ir.dequantize(tensor), expected, rtol=2e-3, atol=2e-4)


def test_feedback_lowers_the_error_of_the_output() -> None:
    weight, moment = weights_of((64, 48)), moment_of(48)
    chosen = np.full(48, 2, np.uint8)
    lost = []
    for known in (stats(moment), stats(np.diag(np.diag(moment)))):
        error = ir.dequantize(METHOD.quantize(weight, chosen, known, PLAIN)).astype(np.float64) - weight
        lost.append(float(np.einsum("ij,jk,ik->", error, moment.astype(np.float64), error)))
    assert lost[0] < 0.7 * lost[1]


@pytest.mark.parametrize("outliers", [0.0, 4.0])
@pytest.mark.parametrize("shape", [(75, 5), (64, 1), (1, 9), (33, 4)])
@pytest.mark.parametrize("importance", ["none", "activation", "gradient", "fisher"])
def test_tables_hold_what_the_tensors_lose(shape: tuple[int, int], importance: str, outliers: float) -> None:
    """Of inputs that are not correlated, where there is no feedback."""
    weight = weights_of(shape)
    diagonal = np.exp2(np.random.default_rng(1).uniform(-4, 4, shape[1])).astype(np.float32)
    gradients = np.exp2(np.random.default_rng(2).uniform(-6, 2, shape)).astype(np.float32)
    factors = gradients[:, 0].copy()
    moment = np.diag(diagonal)
    known: Any = {
        "none": None, "activation": stats(moment), "gradient": stats(moment, factors),
        "fisher": stats(moment, gradients),
    }[importance]  # fmt: skip
    counted = {
        "none": np.ones(shape), "activation": np.broadcast_to(diagonal, shape),
        "gradient": np.outer(factors + 0.3 * factors.mean(), diagonal),
        "fisher": gradients + 0.3 * gradients.mean(axis=0),
    }[importance]  # fmt: skip
    chosen = METHOD.settings({"outliers": outliers, "damping": 0.0})
    table = METHOD.errors(weight, known, chosen)
    assert table.shape == (shape[1], METHOD.levels(shape, chosen).count)
    power = (counted * weight.astype(np.float64) ** 2).sum(axis=0)
    scale = 1.0 if importance in ("gradient", "fisher") else weight.size / power.sum()
    for level in range(table.shape[1]):
        tensor = METHOD.quantize(weight, np.full(shape[1], level, np.uint8), known, chosen)
        tensor.check("w")
        found = (counted * (ir.dequantize(tensor).astype(np.float64) - weight) ** 2).sum(axis=0) * scale
        rounding = scale * power * 2.0**-22  # of codebooks to FP16
        slack = 2 * np.sqrt(table[:, level] * rounding) + rounding
        assert (np.abs(found - table[:, level]) <= slack + 1e-5 * table[:, level]).all()


def test_tables_know_what_feedback_makes_up_for() -> None:
    weight, moment = weights_of((40, 12)), moment_of(12, dead=(5,))
    whole, order = damped(moment, 0.01)
    left = np.ones(12)
    for place, j in enumerate(order):
        rest = order[place:]
        if moment[j, j] > 0:
            left[j] = 1 / np.linalg.inv(whole[np.ix_(rest, rest)])[0, 0] / moment[j, j]
    apart = METHOD.errors(weight, stats(np.diag(np.diag(moment))), METHOD.settings({"outliers": 0.0, "damping": 0.0}))
    np.testing.assert_allclose(METHOD.errors(weight, stats(moment), PLAIN), apart * left[:, None], rtol=1e-4)
    assert left.min() < 0.7  # else this says little


def test_codes_are_in_the_order_of_the_matrix() -> None:
    weight, moment = weights_of((30, 9)), moment_of(9)
    widths = np.array([2, 4, 0, 1, 3, 2, 2, 4, 1], np.uint8)
    mixed = np.random.default_rng(0).permutation(9)
    made = METHOD.settings({"outliers": 3.0})
    one = METHOD.quantize(weight, widths, stats(moment), made)
    other = METHOD.quantize(weight[:, mixed].copy(), widths[mixed], stats(moment[np.ix_(mixed, mixed)]), made)
    np.testing.assert_allclose(ir.dequantize(one)[:, mixed], ir.dequantize(other), rtol=2e-3, atol=1e-5)


def test_reserved_weights_have_the_value_that_feedback_gave_them() -> None:
    weight, moment = weights_of((50, 20)), moment_of(20)
    weight[7, 3] = weight[31, 12] = 30.0
    chosen = METHOD.settings({"outliers": 0.2})
    tensor = METHOD.quantize(weight, np.full(20, 1, np.uint8), stats(moment), chosen)
    assert np.argwhere(outliers_of(tensor)).tolist() == [[7, 3], [31, 12]]
    values = ir.dequantize(tensor)
    first = int(np.argmax(np.diag(moment)))
    for i, j in ((7, 3), (31, 12)):
        assert abs(values[i, j] - 30) < 10
        assert values[i, j] != 30 or j == first
    assert np.abs(tensor.arrays[".codebook"]).max() < 20  # the clustering has not seen them


@pytest.mark.parametrize(
    ("out", "columns", "rich", "more", "fewer"),
    # round(n * .014) + 1 largest, n - round(n * .986) smallest, and so with .004
    [
        (576, 576, 58, (9, 8), (3, 2)), (192, 576, 58, (4, 3), (2, 1)), (4096, 100, 10, (58, 57), (17, 16)),
        (1, 4, 0, (1, 0), (1, 0)),
    ],
)  # fmt: skip
def test_reservation_counts_are_the_papers(
    out: int, columns: int, rich: int, more: tuple[int, int], fewer: tuple[int, int]
) -> None:
    paper = METHOD.settings({"profile": "paper"}, 2.1)
    spec = METHOD.spec((out, columns), np.zeros(columns, np.uint8), paper)
    assert spec.outliers == rich * sum(more) + (columns - rich) * sum(fewer)
    if out != 192:
        return
    weight = np.random.default_rng(0).standard_t(2, (out, columns)).astype(np.float32)
    tensor = METHOD.quantize(weight, np.zeros(columns, np.uint8), None, paper)
    tensor.check("w")
    found, values = outliers_of(tensor), ir.dequantize(tensor)
    magnitude = [[abs(float(w)) for w in column] for column in weight.T]
    mean = sum(map(sum, magnitude)) / weight.size
    many = [sum(w >= 13 * mean for w in column) for column in magnitude]
    richest = sorted(range(columns), key=lambda j: (-many[j], -sum(w * w for w in magnitude[j])))[:rich]
    for j in range(columns):
        largest, smallest = more if j in richest else fewer
        ranked = sorted(range(out), key=lambda i: weight[i, j])
        assert set(np.flatnonzero(found[:, j])) == {*ranked[:smallest], *ranked[out - largest :]}
    np.testing.assert_array_equal(values[found], weight[found].astype(np.float16))  # nothing was fed back


def test_columns_with_outliers_come_first() -> None:
    rng = np.random.default_rng(0)
    weight = rng.uniform(-1, 1, (200, 8)).astype(np.float32)
    weight[:3, 5] = weight[:2, 2] = weight[:2, 6] = 40.0
    moment = np.diag(np.array([4, 1, 1, 9, 1, 1, 2, 1], np.float32))
    order = outlier_order(weight, stats(moment))  # type: ignore[arg-type]
    assert order[:5].tolist() == [5, 6, 2, 3, 0]
    paper = METHOD.settings({"profile": "paper"}, 2.5)
    table = METHOD.errors(weight, stats(moment), paper)
    for nbytes in (METHOD.levels((200, 8), paper).nbytes, METHOD.levels((200, 8), paper).code_bytes):
        steps = walk([Table(nbytes, table)])
        assert steps.unit.tolist() == order.tolist()
        assert steps.level.tolist() == [1] * 8


def test_rows_count_in_refinement_as_in_clustering() -> None:
    rng = np.random.default_rng(3)
    weight, diagonal = rng.standard_normal((6, 9)).astype(np.float32), np.exp2(rng.uniform(-2, 2, 9)).astype(np.float32)
    gradient = np.exp2(rng.uniform(-6, 2, 6)).astype(np.float32)
    counted = gradient + 0.3 * gradient.mean()
    best, none = METHOD.settings({}), METHOD.settings({"row_weights": "none"})
    for gradients in (gradient, np.outer(gradient, diagonal)):  # of rows, and of each weight
        rows = METHOD.row_weights(weight, stats(diagonal, gradients), best)
        np.testing.assert_allclose(rows / rows.mean(), counted / counted.mean(), rtol=1e-5)
        assert METHOD.row_weights(weight, stats(diagonal, gradients), none) is None
    assert METHOD.row_weights(weight, stats(diagonal), best) is None


def test_profiles() -> None:
    best, low, high = METHOD.settings({}), *(METHOD.settings({"profile": "paper"}, bits) for bits in (2.12, 3.1))
    assert best["palette"] == "auto"
    assert METHOD.defaults(best) == JobDefaults("gradient", None)
    assert (low["palette"], high["palette"]) == ("2,4", "3,4")
    for paper in (low, high):
        assert METHOD.defaults(paper) == JobDefaults("activation", "matrix")
        assert paper["allocation_rule"] == "outlier_order"
        assert (paper["outlier_rule"], paper["outliers"]) == ("dynamic", 1.0)
        assert paper["row_weights"] == "none"
        assert paper["zero_dead"]
        assert paper["cluster_outliers"]
    assert METHOD.settings(low, 3.5) == low  # settings of an IR are settings
    levels = METHOD.levels((576, 576), low)
    assert levels.code_bytes == (144, 288)


@pytest.mark.parametrize("shape", [(70, 5), (1, 1), (1, 6), (300, 2)])
@pytest.mark.parametrize("options", [{}, {"outliers": 1.5}, {"profile": "paper"}, {"palette": "0,3,8"}])
def test_levels_are_the_bytes_of_the_specs(shape: tuple[int, int], options: dict[str, Any]) -> None:
    chosen = METHOD.settings(options)
    levels = METHOD.levels(shape, chosen)
    for seed in range(10):
        widths = np.random.default_rng(seed).integers(0, levels.count, shape[1]).astype(np.uint8)
        spec = METHOD.spec(shape, widths, chosen)
        assert spec.nbytes == levels.overhead + sum(levels.nbytes[w] for w in widths)
        assert spec.code_bytes == sum(levels.code_bytes[w] for w in widths)


def test_dead_columns() -> None:
    weight, moment = weights_of((64, 8)), moment_of(8, dead=(1, 6))
    chosen = np.full(8, 4, np.uint8)
    kept = ir.dequantize(METHOD.quantize(weight, chosen, stats(moment), PLAIN))
    assert np.abs(kept - weight)[:, [1, 6]].mean() < 0.2 * np.abs(weight)[:, [1, 6]].mean()
    zeroed = ir.dequantize(METHOD.quantize(weight, chosen, stats(moment), METHOD.settings({"zero_dead": True})))
    assert not zeroed[:, [1, 6]].any()
    assert zeroed[:, 0].any()


@pytest.mark.parametrize("value", [0.0, -0.75])
def test_constant_matrices_are_exact(value: float) -> None:
    weight = np.full((5, 3), value, np.float32)
    for known in (None, stats(np.zeros((3, 3), np.float32)), stats(moment_of(3))):
        for options in ({}, {"profile": "paper"}, {"outliers": 10.0}):
            made = METHOD.settings(options)
            assert np.isfinite(METHOD.errors(weight, known, made)).all()
            tensor = METHOD.quantize(weight, np.zeros(3, np.uint8), known, made)
            tensor.check("w")
            if known is None or known.full().any() or not made["zero_dead"]:
                np.testing.assert_array_equal(ir.dequantize(tensor), weight)


@settings(max_examples=30)
@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 12), st.integers(1, 6)),
        elements=st.floats(-100, 100, width=32, allow_subnormal=False),
    ),
    st.integers(0, 2**32 - 1),
    st.sampled_from([{}, {"outliers": 10.0}, {"profile": "paper"}, {"outliers": 10.0, "outlier_rule": "dynamic"}]),
)
def test_any_matrix(weight: np.ndarray, seed: int, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(seed)
    shape, chosen = (weight.shape[0], weight.shape[1]), METHOD.settings(options)
    levels = rng.integers(0, METHOD.levels(shape, chosen).count, shape[1]).astype(np.uint8)
    known = stats(moment_of(shape[1], seed), np.exp2(rng.uniform(-30, 3, shape[0])).astype(np.float32))
    tensor = METHOD.quantize(weight, levels, known, chosen)
    tensor.check("w")
    assert tensor.spec == METHOD.spec(shape, levels, chosen)
    table = METHOD.errors(weight, known, chosen)
    assert np.isfinite(table).all()
    assert (table >= 0).all()


def test_values_that_feedback_drives_out_of_fp16_are_clipped() -> None:
    weight = np.array([[6e4, 6e4]] * 4 + [[-6e4, 6e4]] * 4, np.float32)
    moment = np.array([[4, 3.9], [3.9, 3.9]], np.float32)
    tensor = METHOD.quantize(weight, np.zeros(2, np.uint8), stats(moment), METHOD.settings({"outliers": 0.0}))
    tensor.check("w")


def test_a_weight_outside_fp16_is_refused_by_name() -> None:
    weight = weights_of((3, 10))
    weight[1, 4] = -7e4
    with pytest.raises(InputError, match=r"-70000\.0 at \[1, 4\] does not fit into FP16"):
        METHOD.quantize(weight, np.full(10, 1, np.uint8), None, PLAIN)
    with pytest.raises(InputError, match=r"-70000\.0 at \[1, 4\] does not fit into FP16"):
        METHOD.errors(weight, None, PLAIN)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"outliers": -1.0}, "-1"),
        ({"palette": "4,2"}, "4,2"),
        ({"block": 32}, "'block'"),
        ({"damping": 2.0}, "damping"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        METHOD.settings(options)


def test_real_columns_at_the_papers_settings_and_ours(real_gguf: Path) -> None:
    """The first layer's queries, whose inputs are the normed embeddings of tokens."""
    from anyquant.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(real_gguf))
    embeddings = np.asarray(checkpoint.read("model.embed_tokens.weight"), np.float32)[:3000]
    norm = np.asarray(checkpoint.read("model.layers.0.input_layernorm.weight"), np.float32)
    inputs = embeddings / np.sqrt((embeddings**2).mean(axis=1, keepdims=True)) * norm
    moment = inputs.T @ inputs / len(inputs)
    weight = np.asarray(checkpoint.read("model.layers.0.self_attn.q_proj.weight"), np.float32)

    def lost(settings: dict[str, Any], width: int, *, apart: bool = False) -> tuple[float, float]:
        widths = [int(word) for word in settings["palette"].split(",")]
        chosen = np.full(576, widths.index(width), np.uint8)
        tensor = METHOD.quantize(weight, chosen, stats(np.diag(np.diag(moment)) if apart else moment), settings)
        error = inputs @ (ir.dequantize(tensor) - weight).T
        return float((error.astype(np.float64) ** 2).sum() / ((inputs @ weight.T) ** 2).sum()), tensor.spec.nbytes

    ours = METHOD.settings({"palette": "2,3,4"})
    paper = METHOD.settings({"profile": "paper"}, 2.1)
    assert lost(ours, 2)[0] < 0.6 * lost(ours, 2, apart=True)[0]
    assert lost(ours, 3)[0] < lost(paper, 2)[0] < lost(ours, 2)[0]  # the paper's has one percent of outliers as well
