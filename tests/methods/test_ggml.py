"""Stock types of ggml: tables against the tensors, what is on offer, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from anyquant import ir
from anyquant.calibration import MatrixStatistics
from anyquant.checkpoint import open_checkpoint
from anyquant.errors import InputError, MissingDependency, UsageError
from anyquant.methods.ggml import GgmlMethod
from anyquant.runtime import libggml

stats = MatrixStatistics.of

pytest.importorskip("libggml")

METHOD = GgmlMethod()
ALL_ROWS = METHOD.settings({"sample": 1})
# Without IQ2, whose first use takes half a minute.
LONG = "IQ3_XXS,IQ3_S,Q2_K,IQ4_XS,Q4_K,Q5_K,Q6_K,Q8_0"
SHORT = "MXFP4,IQ4_NL,Q4_1,Q5_0,Q5_1,Q8_0"


def weights_of(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp2(rng.integers(-3, 3, (shape[0], 1)))).astype(np.float32)


def moments(columns: int, seed: int = 1) -> np.ndarray:
    return np.exp2(np.random.default_rng(seed).uniform(-4, 4, columns)).astype(np.float32)


def lost(weight: np.ndarray, tensor: ir.Tensor, counted: np.ndarray) -> float:
    """Weighted squared error of a tensor, element by element."""
    values = ir.dequantize(tensor)
    total = 0.0
    for i, j in np.ndindex(weight.shape):
        total += float(counted[i, j]) * (float(weight[i, j]) - float(values[i, j])) ** 2
    return total


def counted_and_known(kind: str, shape: tuple[int, int]) -> tuple[np.ndarray, MatrixStatistics | None]:
    """What an error counts, [out, in], from its definition, and the statistics that say so."""
    diagonal = moments(shape[1])
    gradients = np.exp2(np.random.default_rng(2).uniform(-6, 2, shape)).astype(np.float32)
    factors = gradients[:, 0].copy()
    return {
        "none": (np.ones(shape), None),
        "activation": (np.broadcast_to(diagonal, shape), stats(diagonal)),
        "gradient": (np.outer(factors + 0.3 * factors.mean(), diagonal), stats(diagonal, factors)),
        "fisher": (gradients + 0.3 * gradients.mean(axis=0), stats(diagonal, gradients)),
    }[kind]


@pytest.mark.parametrize("weighting", ["exact", "ggml"])
@pytest.mark.parametrize("shape", [(5, 256), (1, 512), (3, 96), (1, 32)])
@pytest.mark.parametrize("importance", ["none", "activation", "gradient", "fisher"])
def test_tables_hold_what_the_tensors_lose(shape: tuple[int, int], importance: str, weighting: str) -> None:
    weight = weights_of(shape)
    if shape[0] > 2:
        weight[1] = 0
        weight[2] = 0.25
    counted, known = counted_and_known(importance, shape)
    types = LONG if shape[1] % 256 == 0 else SHORT
    settings = METHOD.settings({"types": types, "sample": 1, "weighting": weighting})
    table = METHOD.errors(weight, known, settings)
    assert table.shape == (1, METHOD.levels(shape, settings).count) == (1, len(types.split(",")))
    power = float((counted * weight.astype(np.float64) ** 2).sum())
    scale = 1.0 if importance in ("gradient", "fisher") else weight.size / power
    for level in range(table.shape[1]):
        chosen = np.array([level], np.uint8)
        tensor = METHOD.quantize(weight, chosen, known, settings)
        tensor.check("w")
        assert tensor.spec == METHOD.spec(shape, chosen, settings)
        assert lost(weight, tensor, counted) * scale == pytest.approx(table[0, level], rel=1e-5)


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q2_K", "Q3_K", "IQ3_S", "Q6_K", "Q8_0"])
def test_weighting_as_in_ggml_is_what_the_library_does(name: str) -> None:
    weight, known = weights_of((4, 512)), stats(moments(512))
    settings = METHOD.settings({"types": name, "weighting": "ggml"})
    tensor = METHOD.quantize(weight, np.zeros(1, np.uint8), known, settings)
    # ggml squares, sums and divides importances: but for rounding their unit does not matter.
    unit = (known.diagonal / known.diagonal.mean(dtype=np.float64)).astype(np.float32)
    expected = libggml.library().quantize(weight, name, unit)
    np.testing.assert_array_equal(tensor.arrays[".blocks"], expected)
    plain = METHOD.settings({"types": name, "weighting": "ggml", "importance_matrix": False})
    tensor = METHOD.quantize(weight, np.zeros(1, np.uint8), known, plain)
    np.testing.assert_array_equal(tensor.arrays[".blocks"], libggml.library().quantize(weight, name))


@pytest.mark.parametrize("importance", ["none", "activation", "gradient", "fisher"])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "IQ4_NL", "Q2_K", "Q3_K", "IQ3_XXS", "IQ3_S"])
def test_exact_weighting_loses_less(name: str, importance: str) -> None:
    weight = weights_of((24, 512))
    _, known = counted_and_known(importance, (24, 512))
    found = {
        way: METHOD.errors(weight, known, METHOD.settings({"types": name, "sample": 1, "weighting": way}))[0, 0]
        for way in ("exact", "ggml")
    }
    assert found["exact"] < found["ggml"]


def test_without_an_importance_matrix_statistics_change_nothing() -> None:
    weight, settings = weights_of((4, 64)), METHOD.settings({"importance_matrix": False})
    assert not METHOD.needs_statistics(settings)
    assert METHOD.needs_statistics(ALL_ROWS)
    known = stats(moments(64), moments(4))
    np.testing.assert_array_equal(METHOD.errors(weight, known, settings), METHOD.errors(weight, None, settings))
    for level in range(METHOD.levels((4, 64), settings).count):
        chosen = np.array([level], np.uint8)
        blocks = [METHOD.quantize(weight, chosen, given, settings).arrays[".blocks"] for given in (known, None)]
        np.testing.assert_array_equal(*blocks)


def test_a_sample_stands_for_all_rows() -> None:
    # Rows that repeat lose the same part of their squares, so any of them tell all.
    weight = np.tile(weights_of((1, 96)), (7, 1)) * np.exp2(np.arange(7, dtype=np.float32))[:, None]
    known = stats(moments(96), moments(7, 3))
    whole = METHOD.errors(weight, known, ALL_ROWS)
    for step in (2, 5, 64):
        sampled = METHOD.errors(weight, known, METHOD.settings({"sample": step}))
        np.testing.assert_allclose(sampled, whole, rtol=1e-4)
    # Others, nearly.
    weight, known = weights_of((256, 96)), stats(moments(96), moments(256, 3))
    settings = METHOD.settings({"sample": 4})
    np.testing.assert_allclose(METHOD.errors(weight, known, settings), METHOD.errors(weight, known, ALL_ROWS), rtol=0.2)


def test_a_matrix_of_zeros_loses_nothing() -> None:
    zeros = np.zeros((8, 96), np.float32)
    for known in (None, stats(np.zeros(96, np.float32), np.zeros(8, np.float32))):
        assert not METHOD.errors(zeros, known, METHOD.settings({})).any()
        tensor = METHOD.quantize(zeros, np.zeros(1, np.uint8), known, METHOD.settings({}))
        assert not ir.dequantize(tensor).any()


@pytest.mark.parametrize("shape", [(4, 256), (1, 1536), (4, 576), (3, 32), (2, 96)])
def test_levels_are_the_bytes_of_the_specs(shape: tuple[int, int]) -> None:
    settings = METHOD.settings({})
    levels = METHOD.levels(shape, settings)
    assert (levels.units, levels.overhead) == (1, 0)
    assert levels.count == (12 if shape[1] % 256 == 0 else 6)
    assert all(a < b for a, b in itertools.pairwise(levels.nbytes))
    for level, nbytes in enumerate(levels.nbytes):
        assert METHOD.spec(shape, np.array([level], np.uint8), settings).nbytes == nbytes


@pytest.mark.parametrize(
    ("types", "shape", "offered"),
    [
        ("q4_0, iq4_nl,q4_k", (2, 256), ["Q4_K"]),
        ("Q4_0,IQ4_NL,Q4_K", (2, 96), ["IQ4_NL"]),
        ("Q3_K,IQ3_S,Q3_K", (2, 256), ["IQ3_S"]),
        ("Q5_0,Q5_K,MXFP4,IQ4_XS,TQ2_0,IQ2_XXS", (2, 256), ["IQ2_XXS", "IQ4_XS", "Q5_K"]),
        ("Q5_0,Q5_K,MXFP4,IQ4_XS,TQ2_0,IQ2_XXS", (2, 32), ["MXFP4", "Q5_0"]),
        (",".join(ir.GGML_TYPES), (2, 32), ["MXFP4", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]),
    ],
)
def test_of_types_of_equal_size_one_is_offered(types: str, shape: tuple[int, int], offered: list[str]) -> None:
    settings = METHOD.settings({"types": types})
    count = METHOD.levels(shape, settings).count
    assert [METHOD.spec(shape, np.array([level], np.uint8), settings).type for level in range(count)] == offered
    assert METHOD.settings(settings) == settings  # what the IR records is as good as what was given


def test_every_type_can_be_chosen_alone() -> None:
    for name in ir.GGML_TYPES:
        settings = METHOD.settings({"types": name})
        assert METHOD.spec((1, 256), np.zeros(1, np.uint8), settings) == ir.GGMLSpec((1, 256), name)


def test_the_paper_profile_is_llama_cpp_s() -> None:
    settings = METHOD.settings({"profile": "paper"})
    assert settings["weighting"] == "ggml"
    assert METHOD.defaults(settings).importance == "activation"
    assert METHOD.defaults(ALL_ROWS).importance == "gradient"


def test_matrices_that_rule_types_out_are_refused_or_named() -> None:
    shapes = {"a": (64, 1536), "b": (64, 576), "c": (32, 576), "d": (8, 96)}
    settings = METHOD.settings({})
    [note] = METHOD.notes(shapes, settings)
    assert note == (
        "3 of 4 matrices have rows of 96, 576 weights, no multiple of 256, and cannot take IQ1_S, IQ1_M, IQ2_XXS, "
        "IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ4_XS, Q4_K, Q5_K, Q6_K: they choose from MXFP4, IQ4_NL, Q4_1, Q5_0, Q5_1, "
        "Q8_0."
    )
    assert METHOD.notes({"a": (64, 1536)}, settings) == []
    assert METHOD.notes(shapes, METHOD.settings({"types": SHORT})) == []
    [note] = METHOD.notes(shapes, METHOD.settings({"types": "Q8_0,Q2_K"}))
    assert note.endswith("cannot take Q2_K: they choose from Q8_0.")
    only = METHOD.settings({"types": "Q2_K"})
    with pytest.raises(UsageError, match=r"\[64, 576\] cannot take Q2_K \(blocks of 256\): .* 576 .* Add a type"):
        METHOD.levels((64, 576), only)
    for chosen in (settings, only):
        with pytest.raises(UsageError, match=r"\[3, 33\] cannot take .*multiple of 32.*Use another method"):
            METHOD.levels((3, 33), chosen)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"types": "Q9_0"}, "no type 'Q9_0'.*auto, or some of IQ1_S, "),
        ({"types": " , "}, "no type ''"),
        ({"weighting": "none"}, "weighting .* exact or ggml"),
        ({"sample": 0}, "sample .* 1..64"),
        ({"importance_matrix": 1}, "importance_matrix"),
        ({"bits": 4}, "no option 'bits'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        METHOD.settings(options)


def test_weights_beyond_fp16_scales_are_refused() -> None:
    weight = weights_of((2, 64))
    weight[1, 3] = 3e7
    with pytest.raises(InputError, match="too large for the scales of Q4_0"):
        METHOD.quantize(weight, np.zeros(1, np.uint8), None, METHOD.settings({"types": "Q4_0"}))


def test_without_the_package_settings_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libggml, "_find", lambda: None)
    with pytest.raises(MissingDependency, match=r"stock ggml types needs .*pip install 'anyquant\[ggml\]'"):
        METHOD.settings({})


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("model.layers.9.mlp.down_proj.weight", {"Q2_K": 0.1, "IQ3_XXS": 0.04, "IQ3_S": 0.025, "Q4_K": 0.007}),
        ("model.layers.9.mlp.up_proj.weight", {"MXFP4": 0.02, "IQ4_NL": 0.008, "Q5_0": 0.003, "Q8_0": 1e-4}),
    ],
)
def test_a_real_matrix(real_gguf: Path, name: str, bounds: dict[str, float]) -> None:
    """The library's own decoder agrees bit for bit, and larger types lose less, down to what is known of them."""
    weight = np.asarray(open_checkpoint(str(real_gguf)).read(name, slice(0, 24)), np.float32)
    shape, known = (weight.shape[0], weight.shape[1]), stats(moments(weight.shape[1]))
    settings = METHOD.settings({"types": LONG if shape[1] % 256 == 0 else SHORT, "sample": 1})
    table = METHOD.errors(weight, known, settings)[0] / weight.size
    for level in range(len(table)):
        tensor = METHOD.quantize(weight, np.array([level], np.uint8), known, settings)
        tensor.check(name)
        assert isinstance(tensor.spec, ir.GGMLSpec)
        values, own = ir.dequantize(tensor), libggml.library().dequantize(tensor.arrays[".blocks"], tensor.spec.type)
        np.testing.assert_array_equal((values + 0).view(np.uint32), (own + 0).view(np.uint32))
        relative = (known.diagonal * (weight - values) ** 2).sum() / (known.diagonal * weight**2).sum()
        assert relative == pytest.approx(table[level], rel=1e-3)
        assert relative < bounds.get(tensor.spec.type, 1.0)
    assert table[-1] < 0.01 * table[0]
