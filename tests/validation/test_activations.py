"""Quantized activations: the rounding against oracles, the model against a slow forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from anyquant import ir
from anyquant.block_formats import quantize_blocks
from anyquant.errors import InputError, UnknownArchitecture, UsageError
from anyquant.ir import BlockSpec, Tensor
from anyquant.ir.packing import pack
from anyquant.validation.activation_formats import activation_format
from anyquant.validation.activations import quantized_activations, round_to_bfp
from anyquant.validation.runners import RunnerSpec

Make = Callable[..., Path]
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "scores", "values")
IDS = [[5, 9, 300, 17, 200, 9, 41, 33, 2, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 380, 381]]  # 21: an odd last block


def as_weights(x: np.ndarray, width: int, block: int) -> np.ndarray:
    """What the IR holds of a matrix in this format."""
    spec = BlockSpec((x.shape[0], x.shape[1]), "bfp", width, block)
    exponents, codes, _ = quantize_blocks(x, spec)
    return ir.dequantize(Tensor(spec, {".codes": pack(codes.reshape(len(x), -1), width), ".exponents": exponents}))


def by_fractions(values: list[float], width: int) -> list[float]:
    """One block, in exact arithmetic; Python's round goes to even."""
    largest = max(abs(Fraction(v)) for v in values)
    if not largest:
        return [0.0] * len(values)
    exponent = min(max(next(e for e in range(-150, 129) if Fraction(2) ** e >= largest), -127), 127)
    step = Fraction(2) ** (exponent - width + 1)
    most = 2 ** (width - 1) - 1
    return [float(max(-most, min(most, round(Fraction(v) / step))) * step) for v in values]


def hard_matrix(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Values of all sizes that FP32 has, and rows that are zero, constant, powers of two, ties, subnormal, largest."""
    rng = np.random.default_rng(seed)
    spread = rng.integers(-20, 20, size=shape) + rng.integers(-129, 108, size=(shape[0], 1))
    x = np.ldexp(rng.normal(size=shape), spread).astype(np.float32)
    signs = rng.choice(np.array([-1, 1], np.float32), size=shape[1])
    special = [
        np.zeros(shape[1]),
        np.full(shape[1], -0.0),
        np.full(shape[1], 0.3),
        np.ldexp(1.0, rng.integers(-8, 9, size=shape[1])),
        np.arange(shape[1]) + 0.5,
        np.full(shape[1], 2.0**-149) * rng.integers(0, 3, size=shape[1]),
        rng.normal(size=shape[1]) * 2.0**-133,
        np.full(shape[1], np.finfo(np.float32).max),
        np.where(np.arange(shape[1]) % 16 == 3, 1.0, 2.0**-30),
        np.full(shape[1], 127.999),
    ]
    for row, values in zip(range(shape[0]), special, strict=False):
        x[row] = values.astype(np.float32) * signs
    return x


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("block", [16, 32])
def test_rounds_as_the_weights_are_rounded_bit_for_bit(width: int, block: int) -> None:
    for shape in ((40, 100), (12, 16), (12, 17), (30, 1), (1, 33), (20, 31), (3, 576)):
        x = hard_matrix(shape, seed=width)
        np.testing.assert_array_equal(
            round_to_bfp(torch.from_numpy(x), width, block).numpy().view(np.int32),
            as_weights(x, width, block).view(np.int32),
        )


@pytest.mark.parametrize("width", [2, 4, 6, 8])
def test_rounds_as_exact_arithmetic_does(width: int) -> None:
    x = hard_matrix((24, 21))
    found = round_to_bfp(torch.from_numpy(x), width).numpy()
    for row, values in zip(found.tolist(), x.tolist(), strict=True):
        assert row == by_fractions(values[:16], width) + by_fractions(values[16:], width)


def test_shapes_and_types() -> None:
    x = torch.randn(2, 3, 5, 37, generator=torch.Generator().manual_seed(0))
    whole = round_to_bfp(x, 5)
    assert whole.shape == x.shape
    torch.testing.assert_close(whole[1, 2, 4], round_to_bfp(x[1, 2, 4], 5), rtol=0, atol=0)
    turned = x.transpose(-1, -2)
    torch.testing.assert_close(round_to_bfp(turned, 5), round_to_bfp(turned.contiguous(), 5), rtol=0, atol=0)
    half = x.to(torch.bfloat16)  # has the 7 bits of every code
    rounded = round_to_bfp(half, 8)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), round_to_bfp(half.float(), 8), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_seen(bad: float) -> None:
    x = torch.ones(2, 40)
    x[1, 17] = bad
    found = round_to_bfp(x, 4)
    assert torch.isnan(found[1, 16:32]).all()
    assert torch.isfinite(found).sum() == 64


# --- a model


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any, ids: list[list[int]] = IDS) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(torch.tensor(ids), use_cache=False).logits
    return result


def slow_logits(
    model: Any,
    width: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
    parts: Collection[str] = PARTS,
    last: bool = False,
) -> torch.Tensor:
    """The same by hooks on the layers and an attention of its own, rounded by NumPy's quantizer of weights."""
    from transformers.models.llama import modeling_llama

    def rounded(x: torch.Tensor) -> torch.Tensor:
        flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]).numpy())
        return torch.from_numpy(as_weights(flat, width, block)).reshape(x.shape)

    def product(part: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if part not in parts:
            return a @ b
        return rounded(a) @ (rounded(b) if last else rounded(b.mT).mT)

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> tuple[Any, None]:
        outputs = []
        for head in range(q.shape[1]):
            of = head // module.num_key_value_groups
            scores = product("scores", q[:, head], k[:, of].mT) * scaling
            chances = torch.softmax(scores + mask[:, 0], dim=-1)
            outputs.append(product("values", chances, v[:, of]))
        return torch.stack(outputs, dim=2), None

    with monkeypatch.context() as patched:
        patched.setattr(modeling_llama, "eager_attention_forward", attention)
        model.set_attn_implementation("eager")
        linears = [layer for name, layer in model.model.layers.named_modules() if name.rpartition(".")[2] in parts]
        hooks = [layer.register_forward_pre_hook(lambda _, args: (rounded(args[0]),)) for layer in linears]
        result = logits(model)
    for hook in hooks:
        hook.remove()
    return result


@pytest.mark.parametrize(("width", "block"), [(6, 16), (3, 16), (8, 32)])
def test_a_model_computes_what_the_slow_way_computes(
    tiny_checkpoint: Make, width: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_checkpoint("llama", hidden=72))  # heads of 18, an MLP of 108: no width is whole blocks
    expected = slow_logits(model, width, block, monkeypatch)
    with quantized_activations(model, f"bfp{width}", block=block) as caught:
        found = logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert caught.linear == [7, 7]
    assert caught.attention == [2, 2]
    assert (found - logits(model)).abs().max() > 1e-2  # what was compared is not the float model


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_one_product_alone(part: str, last: bool, tiny_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_checkpoint("llama", hidden=72))
    expected = slow_logits(model, 3, 16, monkeypatch, [part], last)
    axes: Literal["last", "reduction"] = "last" if last else "reduction"
    with quantized_activations(model, "bfp3", products=lambda name: part in name, axes=axes) as caught:
        found = logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert caught.linear == [7, 7]  # all are seen, whatever is rounded
    assert (found - logits(model)).abs().max() > 1e-4


def test_the_model_is_left_as_it_was(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    before, kind = logits(model), model.config._attn_implementation
    assert kind != "eager"
    with quantized_activations(model, activation_format("bfp2")) as caught:
        assert model.config._attn_implementation == "eager"
        logits(model)
        logits(model)
    assert caught.linear == [14, 14]
    with pytest.raises(RuntimeError, match="stop"), quantized_activations(model, "bfp2"):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == kind
    assert all("forward" not in vars(block) for block in model.model.layers)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_a_forward_of_the_instance_is_put_back(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    own = model.model.layers[0].forward
    model.model.layers[0].forward = own  # as accelerate's hooks do
    with quantized_activations(model, "bfp6") as caught:
        logits(model)
    assert vars(model.model.layers[0])["forward"] is own
    assert caught.attention == [2, 2]


MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@pytest.mark.parametrize(
    ("family", "changes", "linear"),
    [
        ("mistral", {}, 7),
        ("qwen2", {}, 7),
        ("qwen3", {}, 7),
        ("gemma2", {}, 7),
        ("phi3", {}, 4),
        ("gpt2", {}, 4),
        ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}, 6),
        ("bloom", {}, 4),
        ("falcon", {}, 4),
        ("gptj", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 16}, 6),
        ("mixtral", {"num_local_experts": 5}, None),
        ("qwen3_moe", MOE, None),
    ],
)
def test_families(tiny_checkpoint: Make, family: str, changes: dict[str, Any], linear: int | None) -> None:
    model = load(tiny_checkpoint(family, tied=False, **changes))
    exact = logits(model)
    distance = []
    for name in ("bfp8", "bfp4"):
        with quantized_activations(model, name) as caught:
            distance.append(float((logits(model) - exact).square().mean().sqrt()))
        assert caught.attention == [2, 2]
        if linear is not None:
            assert caught.linear == [linear, linear]
        else:  # four of attention, the router, and two of each expert that got a token
            assert all(5 + 2 * 2 <= count <= 5 + 2 * 5 and count % 2 for count in caught.linear)
    assert 0 < distance[0] < distance[1] / 2
    torch.testing.assert_close(logits(model), exact, rtol=0, atol=0)


def test_a_window_is_blind_to_all_but_the_open_block_of_values(tiny_llama: Path) -> None:
    """Exponents of V are shared by 16 tokens: nothing else lets a token see later ones."""
    model = load(tiny_llama)
    changed = [[*IDS[0][:18], 1, 2, 3]]
    with quantized_activations(model, "bfp4"):
        first, second = logits(model), logits(model, changed)
    torch.testing.assert_close(first[:, :16], second[:, :16], rtol=0, atol=1e-5)
    assert (first[:, 18:] - second[:, 18:]).abs().max() > 1e-3


# --- models that cannot be rounded as a whole


class Layer(nn.Module):
    def __init__(self, attention: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("angles", torch.ones(1, 8, 1))
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return self.attention(self, y)


class Small(nn.Module):
    """A decoder whose layers do not read its configuration."""

    def __init__(self, attention: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(attention), Layer(attention)])
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.run = len(self.layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[: self.run]:
            x = layer(x)
        return x


def two_products(layer: Layer, y: torch.Tensor) -> torch.Tensor:
    return torch.bmm(torch.softmax(y.bmm(mat2=y.mT), -1), y)


def flat(layer: Layer, y: torch.Tensor) -> torch.Tensor:
    return (y[0] @ y[0].T)[None]


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (lambda _, y: nn.functional.scaled_dot_product_attention(y, y, y), "block 0 .*scaled_dot_product_att"),
        (lambda _, y: torch.einsum("bij,bkj->bik", y, y), "calls einsum, which hides its operands"),
        (lambda _, y: y, "1 linear layers and 0 attention products were seen"),
        (lambda _, y: torch.bmm(y, y.mT), "1 linear layers and 1 attention products were seen"),
        (flat, r"multiplies \[4, 8\] with \[8, 4\], neither of them a weight"),
    ],
)  # fmt: skip
def test_products_that_cannot_be_seen_are_refused(attention: Any, message: str) -> None:
    model = Small(attention)
    with pytest.raises(InputError, match=message), quantized_activations(model, "bfp6"):
        model(torch.ones(1, 4, 8))
    assert model.config._attn_implementation == "sdpa"
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_products_with_buffers_stay_float() -> None:
    seen = []

    def attention(layer: Layer, y: torch.Tensor) -> torch.Tensor:
        seen.append(layer.angles @ torch.full((1, 1, 4), 1.001))
        return two_products(layer, y)

    model = Small(attention)
    with quantized_activations(model, "bfp4") as caught:
        model(torch.ones(1, 4, 8))
    assert caught.attention == [2, 2]
    assert torch.equal(seen[0], torch.full((1, 8, 4), 1.001))


def test_a_block_that_never_ran_is_noticed() -> None:
    model = Small(two_products)
    with quantized_activations(model, "bfp6"):
        pass  # no forward pass, nothing to complain of
    model.run = 1
    with (
        pytest.raises(InputError, match="decoder block 1 cannot be quantized: it was not run"),
        quantized_activations(model, "bfp6"),
    ):
        model(torch.ones(1, 4, 8))


def test_a_model_without_blocks_is_refused() -> None:
    with (
        pytest.raises(UnknownArchitecture, match=r"keeps no list of decoder blocks.*without --activations"),
        quantized_activations(nn.Linear(2, 2), "bfp6"),
    ):
        pass


@pytest.mark.parametrize("name", ["bfp1", "bfp9", "bfp", "int8", "", "bfp6 bfp4", "bfp-6", "bfp66"])
def test_unknown_formats(name: str) -> None:
    with pytest.raises(UsageError, match=r"must be one of bfp2, bfp3, bfp4, bfp5, bfp6, bfp7, bfp8\."):
        activation_format(name)
    with pytest.raises(UsageError, match="it must be 16 or 32"):
        activation_format("bfp6", 8)


def test_a_format_has_names() -> None:
    found = activation_format(" BFP6 ")
    assert (found.name, found.row, found.width, found.block) == ("bfp6", "IR, A bfp6", 6, 16)
    assert "(6.5 bits)" in found.reason


@pytest.mark.slow
def test_real_model(real_gguf: Path, real_text: Path) -> None:
    """More bits are nearer, and eight are near: KL to float activations, nats per token."""
    from transformers import AutoTokenizer

    from anyquant.validation.metrics import compare_logits
    from anyquant.validation.runners.torch import open_checkpoint_runner

    tokenizer = AutoTokenizer.from_pretrained(real_gguf.parent, gguf_file=real_gguf.name)
    ids = np.array(tokenizer(real_text.read_text(encoding="utf-8")[:1500])["input_ids"][:100])
    runner = open_checkpoint_runner(RunnerSpec("source", "checkpoint", str(real_gguf), 128, 1))
    exact, found = runner.logits(ids), {}
    for width in (8, 6, 4):
        with quantized_activations(runner._model, f"bfp{width}") as caught:
            found[width] = float(compare_logits(exact, runner.logits(ids)).kl.mean())
        assert caught.linear == [7] * 30
        assert caught.attention == [2] * 30
    assert found[8] < 0.02 < found[4]
    assert found[8] * 4 < found[6] < found[4] / 4
