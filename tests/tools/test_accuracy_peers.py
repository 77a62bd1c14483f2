"""Peers: exact bits, sane errors, and llama.cpp's choice of types."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anyquant.checkpoint import open_checkpoint
from anyquant.errors import InputError, UsageError


@pytest.fixture(scope="module")
def grids(accuracy: Callable[[str], Any]) -> Any:
    return accuracy("grids")


@pytest.fixture(scope="module")
def mixes(accuracy: Callable[[str], Any]) -> Any:
    return accuracy("mixes")


@pytest.fixture(scope="module")
def ggml(accuracy: Callable[[str], Any]) -> Any:
    pytest.importorskip("libggml", reason="libggml-python is not installed")
    return accuracy("ggml")


def problem(out: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight float32 [out, in], and the moment of inputs that depend on each other."""
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((4 * columns + 8, columns))
    inputs = inputs @ (0.2 * generator.standard_normal((columns, columns)) + np.eye(columns))
    inputs *= np.exp(0.7 * generator.standard_normal(columns))
    moment = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    return (0.1 * generator.standard_normal((out, columns))).astype(np.float32), moment


def output_error(weight: np.ndarray, values: np.ndarray, moment: np.ndarray) -> float:
    """Of W x relative to its power."""

    def power(d: np.ndarray) -> float:
        return float(np.einsum("ij,jk,ik->", d, moment, d, dtype=np.float64, optimize=True))

    return power(values.astype(np.float64) - weight) / power(weight.astype(np.float64))  # fmt: skip


def slow_rtn(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Each weight by itself: the nearest value of its group's grid, whose extremes are the group's and 0."""
    result = np.empty_like(weight)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            start = column // group * group
            part = weight[row, start : start + group]
            low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
            scale = max(np.float32(np.float16((high - low) / np.float32(2**bits - 1))), np.float32(2.0**-24))
            zero = min(max(round(float(-low / scale)), 0), 2**bits - 1)
            codes = np.arange(2**bits, dtype=np.float32)
            values = (codes - np.float32(zero)) * scale
            result[row, column] = values[np.abs(values - weight[row, column]).argmin()]
    return result


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(3, 150), (1, 64), (4, 1), (2, 65)])
def test_rtn_is_the_nearest_value_of_its_grid(grids: Any, bits: int, shape: tuple[int, int]) -> None:
    weight, moment = problem(*shape)
    weight[0, : shape[1] // 2] = 0
    before = weight.copy()
    np.testing.assert_allclose(grids.rtn(bits).quantize(weight, moment), slow_rtn(weight, bits, 64), atol=1e-7)
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3])
def test_constant_rows(grids: Any, value: float) -> None:
    weight, moment = np.full((2, 64), value, np.float32), np.eye(64, dtype=np.float32)
    for peer in (grids.rtn(2), grids.gptq(2), grids.gptq(3, None, clipped=True)):
        np.testing.assert_allclose(peer.quantize(weight, moment), weight, rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [64, None])
def test_gptq_beats_rounding_and_clipping_beats_that(grids: Any, bits: int, group: int | None) -> None:
    weight, moment = problem(48, 192)
    peers = (grids.rtn(bits, group), grids.gptq(bits, group), grids.gptq(bits, group, clipped=True))
    errors = [output_error(weight, peer.quantize(weight, moment), moment) for peer in peers]
    assert errors[1] < 0.8 * errors[0]
    if bits == 2:
        assert errors[2] < errors[1]
    # As good as its grid: no more values in a group than codes.
    values = peers[1].quantize(weight, moment)
    assert max(len(set(part)) for part in values[:, : group or 192].tolist()) <= 2**bits


def test_gptq_without_correlation_is_rounding(grids: Any) -> None:
    weight, _ = problem(5, 130)
    moment = np.diag(np.linspace(1, 2, 130)).astype(np.float32)
    np.testing.assert_array_equal(grids.gptq(3).quantize(weight, moment), grids.rtn(3).quantize(weight, moment))


def test_bits_of_grids_are_counted_byte_by_byte(grids: Any) -> None:
    assert grids.rtn(3).bits((576, 576)) == 3 + (16 + 3) / 64
    assert grids.gptq(2, None).bits((576, 1536)) == 2 + (16 + 2) / 1536
    # 5 rows of 65: 325 codes of 3 bits in 122 bytes; 10 groups: 20 bytes of scales, 4 of zeros.
    assert grids.gptq(3).bits((5, 65)) == 8 * (122 + 20 + 4) / 325


class PretendedAutoRound:
    """In the place of the package, which is not installed beside the tests: halves what it is to quantize."""

    class SignRoundConfig:
        def __init__(self, **settings: Any) -> None:
            self.settings = settings

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def AutoRound(self, model: Any, **arguments: Any) -> Any:
        self.seen = arguments

        def quantize() -> tuple[Any, dict[str, Any]]:
            import torch

            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and name not in arguments["layer_config"]:
                    module.weight.data /= 2
            return model, {}

        return SimpleNamespace(quantize=quantize)


def test_auto_round_sees_the_model_and_the_tokens_of_the_calibration(
    accuracy: Callable[[str], Any], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, peer = PretendedAutoRound(), accuracy("auto_rounding").auto_round(3)
    monkeypatch.setitem(sys.modules, "auto_round", package)
    checkpoint = open_checkpoint(str(tiny_llama))
    names = checkpoint.matrices()[:-1]  # the last one stays
    ids = np.arange(6 * 16).reshape(6, 16)
    found = peer.quantize(checkpoint, ids, names)
    assert list(found) == names
    for name, values in found.items():
        np.testing.assert_array_equal(values, checkpoint.read(name) / 2)
    assert package.seen["alg_configs"].settings == {"bits": 3, "group_size": 64, "sym": False}
    assert set(package.seen["layer_config"]) == {"lm_head", checkpoint.matrices()[-1].removesuffix(".weight")}
    assert (package.seen["nsamples"], package.seen["seqlen"]) == (6, 16)
    np.testing.assert_array_equal(np.concatenate([each["input_ids"].numpy() for each in package.seen["dataset"]]), ids)
    assert peer.bits({"a": (10, 64), "b": (3, 128)}) == 3 + 19 / 64


def test_hqq(accuracy: Callable[[str], Any], grids: Any) -> None:
    half_quadratic = accuracy("half_quadratic")
    if not half_quadratic.available():
        pytest.skip("hqq is not installed")
    weight, moment = problem(16, 192)
    peer = half_quadratic.hqq(3)
    assert peer.bits((16, 192)) == 3.5
    found = output_error(weight, peer.quantize(weight, moment), moment)
    assert found < 1.05 * output_error(weight, grids.rtn(3).quantize(weight, moment), moment)
    with pytest.raises(UsageError, match="groups of 64"):
        peer.quantize(weight[:, :100], moment[:100, :100])


@pytest.mark.parametrize(("name", "bits"), [("Q4_0", 4.5), ("IQ4_NL", 4.5), ("MXFP4", 4.25), ("Q8_0", 8.5)])
def test_ggml_types(ggml: Any, name: str, bits: float) -> None:
    weight, moment = problem(8, 96)
    peer = ggml.ggml(name)
    assert peer.bits((8, 96)) == bits
    assert output_error(weight, peer.quantize(weight, moment), moment) < 0.03
    with pytest.raises(UsageError, match="whole blocks of 32"):
        peer.bits((8, 100))
    with pytest.raises(UsageError, match="whole blocks of 32"):
        peer.quantize(weight[:, :50], moment[:50, :50])


def test_importances_help_and_dead_columns_do_no_harm(ggml: Any) -> None:
    weight, moment = problem(16, 256)
    peer = ggml.ggml("Q2_K")
    flat = peer.quantize(weight, np.eye(256, dtype=np.float32))
    diagonal = np.diag(np.diag(moment))
    assert output_error(weight, peer.quantize(weight, moment), diagonal) < output_error(weight, flat, diagonal)
    moment[:, :64] = moment[:64] = 0
    for name in ("Q2_K", "Q3_K", "IQ4_XS"):
        assert np.isfinite(ggml.ggml(name).quantize(weight, moment)).all()
    assert (ggml.importance(np.zeros((4, 4), np.float32)) == 1).all()


def test_half_precision(ggml: Any) -> None:
    weight, moment = problem(2, 7)
    peer = ggml.ggml("F16")
    assert peer.bits((2, 7)) == 16
    np.testing.assert_array_equal(peer.quantize(weight, moment), weight.astype(np.float16).astype(np.float32))
    with pytest.raises(InputError, match="does not fit"):
        peer.quantize(weight + 1e5, moment)
    with pytest.raises(UsageError, match="unknown ggml type"):
        ggml.ggml("Q9_9")


def smollm2() -> dict[str, tuple[int, int]]:
    """Matrices of SmolLM2-135M."""
    rows = {"self_attn.q_proj": 576, "self_attn.k_proj": 192, "self_attn.v_proj": 192, "self_attn.o_proj": 576,
            "mlp.gate_proj": 1536, "mlp.up_proj": 1536, "mlp.down_proj": 576}  # fmt: skip
    return {
        f"model.layers.{layer}.{name}.weight": (out, 1536 if "down" in name else 576)
        for layer in range(30)
        for name, out in rows.items()
    }


def test_names_tell_roles(mixes: Any) -> None:
    assert mixes.role_and_layer("model.layers.12.self_attn.v_proj.weight") == ("v", 12)
    assert mixes.role_and_layer("encoder.layer.3.attention.output.dense.weight") == ("o", 3)
    assert mixes.role_and_layer("encoder.layer.3.output.dense.weight") == ("down", 3)
    assert mixes.role_and_layer("encoder.layer.0.intermediate.dense.weight") == ("up", 0)
    with pytest.raises(UsageError, match="not for 'lm_head"):
        mixes.role_and_layer("lm_head.weight")


@pytest.mark.parametrize(
    ("mix", "role", "layer", "columns", "gqa", "expected"),
    [
        ("Q2_K", "q", 5, 576, 3, "Q4_0"), ("Q2_K", "q", 5, 4096, 1, "Q2_K"), ("Q2_K", "v", 5, 4096, 1, "Q3_K"),
        ("Q2_K", "v", 5, 4096, 4, "Q4_K"), ("Q2_K", "down", 5, 1536, 3, "Q3_K"), ("Q2_K", "o", 0, 512, 1, "Q3_K"),
        ("Q2_K_S", "down", 2, 1536, 3, "Q4_K"), ("Q2_K_S", "down", 3, 1536, 3, "Q2_K"),
        ("Q3_K_M", "v", 1, 512, 1, "Q5_K"), ("Q3_K_M", "v", 2, 512, 1, "Q4_K"), ("Q3_K_M", "v", 1, 576, 3, "Q5_1"),
        ("Q3_K_M", "down", 0, 512, 1, "Q5_K"), ("Q3_K_M", "down", 1, 512, 1, "Q4_K"),
        ("Q3_K_M", "up", 0, 512, 1, "Q3_K"),
        ("Q4_K_M", "v", 2, 576, 3, "Q8_0"), ("Q4_K_M", "down", 2, 512, 1, "Q6_K"),
        ("Q4_K_M", "down", 4, 512, 1, "Q4_K"),
        ("Q4_K_M", "down", 5, 512, 1, "Q6_K"), ("Q4_K_M", "down", 26, 512, 1, "Q6_K"),
        ("Q4_K_M", "q", 2, 576, 3, "Q5_0"),
        ("IQ3_XXS", "q", 9, 512, 1, "IQ2_S"), ("IQ3_XXS", "o", 9, 512, 1, "IQ3_S"),
        ("IQ3_XXS", "o", 9, 576, 3, "IQ4_NL"),
        ("IQ3_XS", "up", 2, 512, 1, "IQ3_S"), ("IQ3_XS", "up", 3, 512, 1, "IQ3_XXS"),
        ("IQ3_XS", "up", 26, 512, 1, "IQ3_S"),
        ("IQ2_M", "v", 9, 512, 1, "IQ3_S"), ("IQ2_XXS", "v", 9, 512, 8, "Q4_K"), ("IQ1_S", "o", 9, 512, 1, "IQ2_XXS"),
        ("Q4_0", "down", 2, 1536, 3, "Q4_1"), ("Q4_0", "down", 3, 1536, 3, "Q4_0"), ("IQ4_XS", "q", 3, 100, 3, "F16"),
    ],
)  # fmt: skip
def test_types_of_mixes(
    mixes: Any, mix: str, role: str, layer: int, columns: int, gqa: int, expected: str
) -> None:  # fmt: skip
    """Expected values were read off llama.cpp's source, for 30 layers."""
    assert mixes.type_of(mix, role, layer, columns, mixes.Model(30, gqa)) == expected


def test_bits_of_mixes(mixes: Any, ggml: Any) -> None:
    """The mix Q2_K_S of SmolLM2: 4.5 bits where 576 columns fall back to Q4_0, and Q2_K but for three layers."""
    shapes = smollm2()
    down = 2.625 * 27 / 30 + 4.5 * 3 / 30
    assert mixes.mixed("Q2_K_S", mixes.Model(30, 3)).bits(shapes) == pytest.approx(0.75 * 4.5 + 0.25 * down)
    assert mixes.mixed("IQ4_NL", mixes.Model(30, 3)).bits(shapes) == 4.5


def test_everyone_in_order_of_bits_and_no_mix_twice(
    accuracy: Callable[[str], Any], mixes: Any, ggml: Any
) -> None:  # fmt: skip
    notes: list[str] = []
    shapes = smollm2()
    found = accuracy("peers").contenders(mixes.Model(30, 3), shapes, notes.append)
    bits = [contender.bits(shapes) for contender in found]
    assert bits == sorted(bits)
    names = [contender.name for contender in found]
    assert len(set(names)) == len(names)
    assert {"RTN 3 bits, group 64", "GPTQ 3 bits, group 64", "GPTQ 2 bits, per row", "llama.cpp Q4_K_M"} <= set(names)
    assert "llama.cpp IQ3_S is the same here as llama.cpp IQ3_XS" in notes
    weight, moment = problem(8, 576)
    name = "model.layers.3.mlp.up_proj.weight"
    cheap = next(contender for contender in found if contender.name == "llama.cpp Q2_K")
    np.testing.assert_array_equal(
        cheap.quantize(name, weight, moment), ggml.ggml("Q4_0").quantize(weight, moment)
    )  # fmt: skip
