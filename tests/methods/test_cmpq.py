"""CMPQ against a slow version of itself, which tries all partitions of a channel and all weights as outliers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anyquant import ir
from anyquant.allocation import Table, walk, within
from anyquant.errors import InputError, UsageError
from anyquant.methods.cmpq import CmpqMethod
from anyquant.methods.protocol import JobDefaults

METHOD = CmpqMethod()
NO_OUTLIERS = {"outliers_activation": 0.0, "outliers_error": 0.0}


@dataclass(frozen=True)
class Known:
    """Statistics as a calibration gives them; what CMPQ must not ask for is missing."""

    diagonal: np.ndarray
    row_gradient: np.ndarray | None = None
    tokens: int = 100

    def fisher(self) -> None:
        return None

    def gradient(self) -> np.ndarray | None:
        return self.row_gradient


def weights_of(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp2(rng.uniform(-2, 2, shape[1]))).astype(np.float32)


def moments(columns: int, seed: int = 1) -> np.ndarray:
    return np.exp2(np.random.default_rng(seed).uniform(-4, 4, columns)).astype(np.float32)


def best_codebook(values: np.ndarray, weights: np.ndarray, k: int) -> np.ndarray:
    """Weighted k-means by trying every partition of the sorted values."""
    order = np.argsort(values)
    values, weights = values[order].astype(np.float64), weights[order].astype(np.float64)
    k = min(k, len(values))
    best, found = np.inf, np.empty(0)
    for cuts in itertools.combinations(range(1, len(values)), k - 1):
        parts = list(itertools.pairwise([0, *cuts, len(values)]))
        means = np.array([np.average(values[a:b], weights=weights[a:b]) for a, b in parts])
        error = sum(float(weights[a:b] @ (values[a:b] - m) ** 2) for (a, b), m in zip(parts, means, strict=True))
        if error < best:
            best, found = error, means
    return found.astype(np.float16).astype(np.float64)


def slow_cmpq(
    weight: np.ndarray, diagonal: np.ndarray, widths: np.ndarray, axis: int, by_activation: int, by_error: int
) -> tuple[np.ndarray, set[tuple[int, int]]]:
    """The dequantized matrix, and where its outliers are."""
    places = list(np.ndindex(weight.shape))
    ranked = sorted(places, key=lambda p: -abs(float(weight[p])) * float(diagonal[p[1]]) ** 0.5)
    outliers = set(ranked[:by_activation])

    def served() -> np.ndarray:
        values = np.zeros(weight.shape)
        for channel in range(weight.shape[axis]):
            line = [p for p in places if p[axis] == channel]
            kept = [p for p in line if p not in outliers] or line
            codebook = best_codebook(
                np.array([weight[p] for p in kept]), np.array([diagonal[p[1]] for p in kept]), 1 << int(widths[channel])
            )
            for p in line:
                values[p] = codebook[np.argmin(np.abs(codebook - weight[p]))]
        return values

    if by_error:
        lost = (weight - served()) ** 2 * diagonal
        outliers |= set(sorted((p for p in places if p not in outliers), key=lambda p: -lost[p])[:by_error])
    values = served()
    for p in outliers:
        values[p] = np.float16(weight[p])
    return values, outliers


def places_of(tensor: ir.Tensor) -> set[tuple[int, int]]:
    """Where a tensor has outliers."""
    if ".outlier_index" not in tensor.arrays:
        return set()
    counts = np.diff(tensor.arrays[".outlier_indptr"].astype(np.int64))
    rows = np.repeat(np.arange(len(counts)), counts).tolist()
    return set(zip(rows, tensor.arrays[".outlier_index"].tolist(), strict=True))


@pytest.mark.parametrize("outliers", [(0.0, 0.0), (6.0, 0.0), (0.0, 6.0), (5.0, 5.0)])
@pytest.mark.parametrize("axis", ["column", "row"])
@pytest.mark.parametrize("shape", [(9, 7), (10, 4), (1, 6), (8, 1)])
def test_against_a_slow_oracle(shape: tuple[int, int], axis: str, outliers: tuple[float, float]) -> None:
    weight, diagonal = weights_of(shape), moments(shape[1])
    made = METHOD.settings({"axis": axis, "outliers_activation": outliers[0], "outliers_error": outliers[1]})
    count, channels = METHOD.levels(shape, made).count, shape[axis == "column"]
    widths = np.random.default_rng(3).integers(0, min(count, 3), channels).astype(np.uint8)
    tensor = METHOD.quantize(weight, widths, Known(diagonal), made)
    tensor.check("w")
    assert tensor.spec == METHOD.spec(shape, widths, made)
    counts = [round(percent / 100 * weight.size) for percent in outliers]
    values, places = slow_cmpq(weight, diagonal, widths, int(axis == "column"), counts[0], counts[1])
    assert places_of(tensor) == places
    np.testing.assert_allclose(ir.dequantize(tensor), values, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("axis", ["column", "row"])
@pytest.mark.parametrize("shape", [(75, 5), (64, 1), (1, 9), (33, 4), (4, 70)])
@pytest.mark.parametrize("importance", ["none", "activation", "gradient"])
def test_tables_hold_what_the_tensors_lose(shape: tuple[int, int], importance: str, axis: str) -> None:
    weight, diagonal = weights_of(shape), moments(shape[1])
    gradient = np.exp2(np.random.default_rng(2).uniform(-6, 2, shape[0])).astype(np.float32)
    known: Any = {"none": None, "activation": Known(diagonal), "gradient": Known(diagonal, gradient)}[importance]
    counted = np.broadcast_to(np.ones(shape) if known is None else diagonal.astype(np.float64), shape)
    if importance == "gradient":  # rows all count the same, but in units of the loss
        counted = counted * 1.3 * gradient.mean(dtype=np.float64)
    along = int(axis == "row")
    power = (counted * weight.astype(np.float64) ** 2).sum(axis=along)
    scale = 1.0 if importance == "gradient" else weight.size / power.sum()
    made = METHOD.settings({**NO_OUTLIERS, "axis": axis, "outliers_activation": 2.0})
    with_errors = METHOD.settings({**made, "outliers_error": 3.0})
    table = METHOD.errors(weight, known, made)
    np.testing.assert_array_equal(table, METHOD.errors(weight, known, with_errors))
    for level in range(table.shape[1]):
        chosen = np.full(len(table), level, np.uint8)
        lost = []
        for settings_ in (made, with_errors):
            tensor = METHOD.quantize(weight, chosen, known, settings_)
            tensor.check("w")
            error = (ir.dequantize(tensor).astype(np.float64) - weight) ** 2
            lost.append((counted * error).sum(axis=along) * scale)
        rounding = scale * power * 2.0**-22  # of codebooks to FP16
        slack = 2 * np.sqrt(table[:, level] * rounding) + rounding + 1e-5 * table[:, level]
        assert (np.abs(lost[0] - table[:, level]) <= slack).all()
        assert (lost[1] <= lost[0] + 2 * slack).all()


def test_outliers_of_both_rules_never_coincide() -> None:
    weight = np.random.default_rng(0).standard_normal((20, 10)).astype(np.float32)
    weight[3, 4], weight[5, 6] = 50.0, -40.0
    made = METHOD.settings({"outliers_activation": 1.0, "outliers_error": 10.0})
    tensor = METHOD.quantize(weight, np.zeros(10, np.uint8), None, made)
    assert len(places_of(tensor)) == 22
    assert {(3, 4), (5, 6)} <= places_of(tensor)
    values = ir.dequantize(tensor)
    for place in places_of(tensor):
        assert values[place] == np.float16(weight[place])
    assert np.abs(tensor.arrays[".codebook"]).max() < 2


@pytest.mark.parametrize("axis", ["column", "row"])
def test_bits_go_by_the_activation_norm(axis: str) -> None:
    weight, diagonal = weights_of((40, 12)), moments(12)
    made = METHOD.settings({"profile": "paper", "axis": axis}, 2.2)
    assert made["palette"] == "2,3"
    norms = np.sqrt(diagonal) if axis == "column" else np.sqrt((weight.astype(np.float64) ** 2) @ diagonal)
    levels = METHOD.levels((40, 12), made)
    steps = walk([Table(levels.code_bytes, METHOD.errors(weight, Known(diagonal), made))])
    assert steps.unit.tolist() == sorted(range(len(norms)), key=lambda c: -norms[c])


def test_an_exchange_at_three_bits() -> None:
    weight, diagonal = weights_of((64, 20)), moments(20)
    made = METHOD.settings({"profile": "paper", "exchange": 10.0}, 3.0)
    assert made["palette"] == "2,3,4"
    levels = METHOD.levels((64, 20), made)
    steps = walk([Table(levels.code_bytes, METHOD.errors(weight, Known(diagonal), made))])
    ranked = sorted(range(20), key=lambda j: -diagonal[j])
    widths = 2 + within(steps, levels.code_bytes, 20 * 24)[0]
    assert widths[ranked].tolist() == [4] * 2 + [3] * 16 + [2] * 2
    assert METHOD.settings({"profile": "paper"}, 3.0)["palette"] == "3,4"


@pytest.mark.parametrize("options", [{"palette": "3,4"}, {"profile": "paper"}])
def test_an_exchange_needs_a_width_between(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="exchange of the method cmpq is 10, but the palette 3,4 has no width between"):
        METHOD.settings({"allocation_rule": "norm", "exchange": 10.0, **options}, 3.3)
    assert METHOD.settings({"allocation_rule": "norm", "exchange": 10.0})["palette"] == "auto"


def test_gradients_change_nothing_but_the_scale() -> None:
    weight, diagonal = weights_of((30, 8)), moments(8)
    gradient = np.exp2(np.random.default_rng(2).uniform(-6, 2, 30)).astype(np.float32)
    made = METHOD.settings({"axis": "row", "outliers_error": 2.0})
    chosen = np.full(30, 1, np.uint8)
    with_, without = (METHOD.quantize(weight, chosen, Known(diagonal, g), made) for g in (gradient, None))
    np.testing.assert_array_equal(ir.dequantize(with_), ir.dequantize(without))
    tables = [METHOD.errors(weight, Known(diagonal, g), made) for g in (gradient, None)]
    assert np.ptp(tables[0][:, 0] / tables[1][:, 0]) < 1e-5 * (tables[0][0, 0] / tables[1][0, 0])


def test_dead_columns_are_never_outliers_by_activation() -> None:
    weight, diagonal = weights_of((64, 8)), moments(8)
    weight[:, 3] *= 100
    diagonal[3] = 0
    made = METHOD.settings({"outliers_activation": 1.0})
    tensor = METHOD.quantize(weight, np.full(8, 4, np.uint8), Known(diagonal), made)
    assert all(column != 3 for _, column in places_of(tensor))
    assert np.abs(ir.dequantize(tensor) - weight)[:, 3].mean() < 0.2 * np.abs(weight)[:, 3].mean()


def test_profiles() -> None:
    best, paper = METHOD.settings({}), METHOD.settings({"profile": "paper"}, 3.3)
    assert (best["palette"], best["allocation_rule"], best["axis"]) == ("auto", "gain", "column")
    assert (paper["palette"], paper["allocation_rule"]) == ("3,4", "norm")
    assert (paper["outliers_activation"], paper["outliers_error"]) == (0.25, 0.25)
    assert METHOD.defaults(best) == METHOD.defaults(paper) == JobDefaults("norms", "matrix")
    assert METHOD.settings(paper, 2.5) == paper  # settings of an IR are settings


@pytest.mark.parametrize("shape", [(70, 5), (1, 1), (1, 6), (300, 2)])
@pytest.mark.parametrize("options", [{}, {"axis": "row", "outliers_error": 1.5}, {"profile": "paper"}])
def test_levels_are_the_bytes_of_the_specs(shape: tuple[int, int], options: dict[str, Any]) -> None:
    chosen = METHOD.settings(options)
    levels = METHOD.levels(shape, chosen)
    for seed in range(10):
        widths = np.random.default_rng(seed).integers(0, levels.count, levels.units).astype(np.uint8)
        spec = METHOD.spec(shape, widths, chosen)
        assert spec.nbytes == levels.overhead + sum(levels.nbytes[w] for w in widths)
        assert spec.code_bytes == sum(levels.code_bytes[w] for w in widths)


@settings(max_examples=30)
@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 12), st.integers(1, 6)),
        elements=st.floats(-100, 100, width=32, allow_subnormal=False),
    ),
    st.integers(0, 2**32 - 1),
    st.sampled_from([{}, {"axis": "row", "outliers_error": 10.0}, {"profile": "paper"}, {"outliers_activation": 10.0}]),
)
def test_any_matrix(weight: np.ndarray, seed: int, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(seed)
    shape, chosen = (weight.shape[0], weight.shape[1]), METHOD.settings(options)
    offered = METHOD.levels(shape, chosen)
    levels = rng.integers(0, offered.count, offered.units).astype(np.uint8)
    known = Known(np.exp2(rng.uniform(-30, 30, shape[1])).astype(np.float32))
    tensor = METHOD.quantize(weight, levels, known, chosen)
    tensor.check("w")
    assert tensor.spec == METHOD.spec(shape, levels, chosen)
    table = METHOD.errors(weight, known, chosen)
    assert np.isfinite(table).all()
    assert (table >= 0).all()


@pytest.mark.parametrize("value", [0.0, -0.75])
@pytest.mark.parametrize("axis", ["column", "row"])
def test_constant_matrices_are_exact(axis: str, value: float) -> None:
    weight = np.full((5, 3), value, np.float32)
    for known in (None, Known(np.zeros(3, np.float32)), Known(moments(3))):
        for options in (NO_OUTLIERS, {"profile": "paper"}, {"outliers_activation": 10.0, "outliers_error": 10.0}):
            made = METHOD.settings({"axis": axis, **options})
            assert np.isfinite(METHOD.errors(weight, known, made)).all()
            tensor = METHOD.quantize(weight, np.zeros(METHOD.levels((5, 3), made).units, np.uint8), known, made)
            tensor.check("w")
            np.testing.assert_array_equal(ir.dequantize(tensor), weight)


def test_a_weight_outside_fp16_is_refused_by_name() -> None:
    weight = weights_of((3, 10))
    weight[1, 4] = -7e4
    with pytest.raises(InputError, match=r"-70000\.0 at \[1, 4\] does not fit into FP16"):
        METHOD.quantize(weight, np.full(10, 1, np.uint8), None, METHOD.settings({}))
    with pytest.raises(InputError, match=r"-70000\.0 at \[1, 4\] does not fit into FP16"):
        METHOD.errors(weight, None, METHOD.settings({}))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"outliers_error": -1.0}, "-1"),
        ({"axis": "both"}, "axis"),
        ({"palette": "9"}, "'9'"),
        ({"exchange": 60.0}, "60."),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        METHOD.settings(options)


def test_a_real_matrix_gains_from_mixed_widths(real_gguf: Path) -> None:
    """The first layer's gate, with normed embeddings for inputs: widths by what is saved, by norm, and all the same."""
    from anyquant.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(real_gguf))
    embeddings = np.asarray(checkpoint.read("model.embed_tokens.weight"), np.float32)[:3000]
    norm = np.asarray(checkpoint.read("model.layers.0.post_attention_layernorm.weight"), np.float32)
    inputs = embeddings / np.sqrt((embeddings**2).mean(axis=1, keepdims=True)) * norm
    known = Known((inputs.astype(np.float64) ** 2).mean(axis=0).astype(np.float32))
    weight = np.asarray(checkpoint.read("model.layers.0.mlp.gate_proj.weight"), np.float32)

    def lost(options: dict[str, Any], bits: float) -> float:
        made = METHOD.settings({**NO_OUTLIERS, "palette": "2,3,4", **options})
        levels = METHOD.levels((1536, 576), made)
        steps = walk([Table(levels.code_bytes, METHOD.errors(weight, known, made))])
        chosen = within(steps, levels.code_bytes, bits * weight.size / 8)[0]
        error = ir.dequantize(METHOD.quantize(weight, chosen, known, made)).astype(np.float64) - weight
        return float((error**2 @ known.diagonal).sum() / (weight.astype(np.float64) ** 2 @ known.diagonal).sum())

    by_gain, by_norm = lost({}, 3.0), lost({"allocation_rule": "norm"}, 3.0)
    assert by_gain < by_norm
    assert by_gain < lost({"palette": "3"}, 3.0)
    assert by_norm < 0.7 * lost({"allocation_rule": "norm", "palette": "2"}, 2.0)
