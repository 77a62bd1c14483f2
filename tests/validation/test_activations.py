"""Quantized activations: the rounding against oracles, the model against a slow forward pass, the report's row."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from anyquant import ir
from anyquant.block_formats import quantize_blocks
from anyquant.errors import InputError, UnknownArchitecture, UsageError
from anyquant.ir import BlockSpec, Tensor
from anyquant.ir.packing import pack
from anyquant.validation import ValidationSettings, format_table, validate
from anyquant.validation.activation_formats import activation_format
from anyquant.validation.activations import quantized_activations, round_to_bfp
from anyquant.validation.gates import Gate
from anyquant.validation.html import to_html
from anyquant.validation.plots import plots
from anyquant.validation.report import to_json
from anyquant.validation.results import ValidationReport
from anyquant.validation.runners import RunnerSpec, open_runner

Make = Callable[..., Path]
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


def slow_logits(model: Any, width: int, block: int, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The same by hooks on the layers and an attention of its own, rounded by NumPy's quantizer of weights."""
    from transformers.models.llama import modeling_llama

    def rounded(x: torch.Tensor) -> torch.Tensor:
        flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]).numpy())
        return torch.from_numpy(as_weights(flat, width, block)).reshape(x.shape)

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> tuple[Any, None]:
        outputs = []
        for head in range(q.shape[1]):
            of = head // module.num_key_value_groups
            scores = (rounded(q[:, head]) @ rounded(k[:, of]).mT) * scaling
            chances = torch.softmax(scores + mask[:, 0], dim=-1)
            outputs.append(rounded(chances) @ rounded(v[:, of].mT).mT)
        return torch.stack(outputs, dim=2), None

    with monkeypatch.context() as patched:
        patched.setattr(modeling_llama, "eager_attention_forward", attention)
        model.set_attn_implementation("eager")
        linears = [layer for layer in model.model.layers.modules() if isinstance(layer, nn.Linear)]
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


# --- in a validation


@pytest.fixture(scope="module")
def settings(tiny_ir: Path, tiny_text: Path, tiny_llama: Path) -> ValidationSettings:
    return ValidationSettings(
        model=tiny_ir,
        text=tiny_text,
        source=str(tiny_llama),
        activations="bfp5",
        max_kl=1e-9,
        window=64,
        windows=3,
        resamples=50,
        generate=4,
        threads=1,
        isolate=False,
    )


@pytest.fixture(scope="module")
def report(settings: ValidationSettings) -> ValidationReport:
    return validate(settings)


ROW = "IR, A bfp5"


def test_the_row_is_measured_and_not_gated(report: ValidationReport) -> None:
    assert [row.name for row in report.rows] == ["source", "IR", ROW]
    assert {(c.reference, c.candidate) for c in report.comparisons} == {("source", "IR"), ("source", ROW), ("IR", ROW)}
    assert [(g.name, g.subject) for g in report.failed] == [("--max-kl", "IR")]
    assert ROW not in {g.subject for g in report.gates}
    weights, both = report.rows[1:]
    assert both.nbytes == weights.nbytes
    assert both.arithmetic == "quantized"
    assert len(both.token_ids) == 4
    own = report.comparison("IR", ROW)
    assert own is not None
    assert own.kl_mean.value > 1e-4
    assert own.perplexity_change.value == pytest.approx(both.perplexity.value - weights.perplexity.value)


def test_the_row_is_what_the_model_gives_in_python(report: ValidationReport, tiny_ir: Path, tiny_text: Path) -> None:
    import anyquant
    from anyquant.validation import texts

    tokenizer = texts.load_tokenizer(tiny_ir)
    windows, _ = texts.cut_text(tiny_text, tokenizer, ir.open_ir(tiny_ir).config, window=64, windows=3, seed=0)
    model = anyquant.load(tiny_ir)
    losses = []
    with quantized_activations(model, "bfp5"):
        for ids in windows.ids:
            chances = logits(model, [ids.tolist()])[0].double().log_softmax(-1)
            losses += [-float(chances[at, token]) for at, token in enumerate(ids[1:].tolist())]
    assert report.rows[2].perplexity.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_the_row_is_in_every_form_of_the_report(
    report: ValidationReport, check_page: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = format_table(report)
    assert max(map(len, text.splitlines())) <= 80
    at = next(at for at, line in enumerate(text.splitlines()) if line.startswith(" IR,  "))
    line, rest = text.splitlines()[at : at + 2]
    assert line.endswith("\u2013")  # no gate
    assert "\u2026" not in line
    assert rest.strip() == "A bfp5"
    assert f"{ROW} against the IR in float32: max" in text
    data = json.loads(json.dumps(to_json(report)))
    assert data["rows"][2]["name"] == ROW
    assert "attention products in bfp5, blocks of 16 (5.5 bits)" in data["rows"][2]["arithmetic_reason"]
    page = to_html(report)
    check_page(page)
    assert f"perplexity, {ROW}" in page
    assert "quantized: inputs of linear layers" in page
    assert f"{ROW} file" not in page
    pytest.importorskip("matplotlib")
    drawn = plots(report)["Distance to PyTorch on the same weights"]
    assert "gate" not in drawn


def test_logits_that_are_not_finite_still_fail(settings: ValidationSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    import anyquant.validation.activations as activations

    monkeypatch.setattr(activations, "round_to_bfp", lambda x, *_: x * math.nan)
    failed: list[Gate] = validate(replace(settings, max_kl=None, source=None, windows=1, generate=0)).failed
    assert [(gate.name, gate.subject) for gate in failed] == [("finite logits", ROW)]


def test_the_runner_generates_in_the_same_arithmetic(tiny_ir: Path) -> None:
    runner = open_runner(RunnerSpec(ROW, "ir", str(tiny_ir), 64, 1, activations="bfp5"))
    exact = open_runner(RunnerSpec("IR", "ir", str(tiny_ir), 64, 1))
    ids = np.array(IDS[0])
    assert np.abs(runner.logits(ids) - exact.logits(ids)).max() > 1e-3
    assert runner.generate(IDS[0], 1) == [int(runner.logits(ids)[-1].argmax())]
    assert len(runner.generate(IDS[0], 5)) == 5


def test_command_line(settings: ValidationSettings, invoke: Callable[..., Any]) -> None:
    """Without a source, and each model in a process of its own."""
    command = ("validate", settings.model, "--text", settings.text, "--json", "--activations")
    wrong = invoke(*command, "int8")
    assert wrong.code == 2
    assert "it must be one of bfp2, bfp3, bfp4, bfp5, bfp6, bfp7, bfp8" in wrong.err
    done = invoke(*command, "bfp5", "--windows", 1, "--window", 32)
    assert (done.code, done.data["failed"]) == (0, [])
    here = validate(replace(settings, source=None, max_kl=None, windows=1, window=32, generate=0))
    assert [row["name"] for row in done.data["rows"]] == [row.name for row in here.rows] == ["IR", ROW]
    assert done.data["rows"][1]["perplexity"]["value"] == pytest.approx(here.rows[1].perplexity.value, rel=1e-5)
    assert "against IR: change" in to_html(here)


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
