"""S-diag against autograd on a plain transformers model, token by token."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from anyquant.calibration import backward, batches
from anyquant.calibration.store import Statistics
from anyquant.checkpoint import Checkpoint, open_checkpoint
from anyquant.errors import InputError

Record = Callable[..., Statistics]
Tiny = Callable[..., Path]
Ids = Callable[..., torch.Tensor]
Plain = Callable[[Checkpoint], Any]


def outputs_and_inputs(
    model: Any, checkpoint: Checkpoint, ids: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Gradient of the loss at each output, float64 [tokens, out], and input, float64 [tokens, in], of every layer."""
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            output.retain_grad()
            pairs[name] = (output, args[0].detach().flatten(0, -2).double())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            weight = f"{name}.weight"
            module.register_forward_hook(keep(checkpoint.aliases.get(weight, weight)))
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.zeros(())
    for window in range(len(ids)):
        for position in range(ids.shape[1] - 1):
            loss = loss - logits[window, position].log_softmax(dim=-1)[ids[window, position + 1]]
    loss.backward()  # type: ignore[no-untyped-call]
    found = {}
    for name, (output, x) in pairs.items():
        assert output.grad is not None
        found[name] = (output.grad.flatten(0, -2).double(), x)
    return found


def output_gradients(model: Any, checkpoint: Checkpoint, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: pair[0] for name, pair in outputs_and_inputs(model, checkpoint, ids).items()}


def s_diag(model: Any, checkpoint: Checkpoint, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean over tokens of g_i^2 x_j^2, float64 [out, in], one token after the other."""
    found = {}
    for name, (gradients, inputs) in outputs_and_inputs(model, checkpoint, ids).items():
        total = torch.zeros(gradients.shape[1], inputs.shape[1], dtype=torch.float64)
        for g, x in zip(gradients, inputs, strict=True):
            total += torch.outer(g.square(), x.square())
        found[name] = total / len(inputs)
    return found


def check(statistics: Statistics, name: str, expected: torch.Tensor) -> None:
    found = statistics.matrix(name)
    assert found is not None, name
    fisher = found.fisher()
    assert fisher is not None, name
    assert fisher.dtype == np.float32
    assert fisher.shape == expected.shape
    np.testing.assert_allclose(fisher, expected.numpy(), rtol=1e-4, atol=1e-5 * expected.max().item(), err_msg=name)


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", True), ("llama", False), ("qwen2", True), ("gemma2", True), ("phi3", False), ("gpt2", True)],
)
def test_against_autograd_token_by_token(
    tiny_checkpoint: Tiny, token_ids: Ids, record: Record, plain_model: Plain, family: str, tied: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(batches, "TOKENS", 30)  # two windows at a time
    monkeypatch.setattr(backward, "_LOGITS", 389 * 7)  # seven tokens at a time
    checkpoint = open_checkpoint(str(tiny_checkpoint(family, tied=tied)))
    names = [*checkpoint.matrices(), *checkpoint.embeddings()]
    ids = token_ids(3, 13)
    statistics = record(checkpoint, names, ids, "fisher")
    expected = s_diag(plain_model(checkpoint), checkpoint, ids)
    for name in expected:
        check(statistics, name, expected[name])
    for name in set(names) - set(expected):  # an embedding that is no head
        found = statistics.matrix(name)
        assert found is not None
        assert found.fisher() is None


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts(tiny_checkpoint: Tiny, token_ids: Ids, record: Record, plain_model: Plain, family: str) -> None:
    sizes = {"num_local_experts": 5} if family == "mixtral" else {"num_experts": 5, "moe_intermediate_size": 48}
    checkpoint = open_checkpoint(str(tiny_checkpoint(family, tied=False, num_experts_per_tok=2, **sizes)))
    ids = token_ids(2, 9)
    statistics = record(checkpoint, checkpoint.matrices(), ids, "fisher")

    # The oracle of one expert: its matrices joined along the rows, its outputs' gradients caught by a wrapper.
    model = plain_model(checkpoint)
    model.set_experts_implementation("eager")
    caught: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    original = nn.functional.linear
    owners = {
        (parameter.data_ptr() + expert * parameter[0].numel() * 4): f"{name}#{expert}"
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
        for expert in range(len(parameter))
    }

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output = original(x, weight, bias)
        if weight.data_ptr() in owners:
            output.retain_grad()
            caught.append((owners[weight.data_ptr()], x.detach(), output))
        return output

    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", linear)
        logits = model(input_ids=ids, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()  # type: ignore[no-untyped-call]
    expected = {}
    for owner, x, output in caught:
        assert output.grad is not None
        expected[owner] = (output.grad.double().square().T @ x.double().square()) / ids.numel()
    compared = 0
    for name in checkpoint.matrices():
        match = re.search(r"layers\.(\d+)\..*experts\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            continue
        part = {"w1": 0, "gate_proj": 0, "w3": 1, "up_proj": 1}.get(match[3])
        fused = "down_proj" if part is None else "gate_up_proj"
        total = expected.get(f"model.layers.{match[1]}.mlp.experts.{fused}#{match[2]}")
        if total is None:
            assert statistics.matrix(name) is None
            continue
        rows = len(total) if part is None else len(total) // 2
        check(statistics, name, total[(part or 0) * rows : ((part or 0) + 1) * rows])
        compared += 1
    assert compared > 6


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma2", True), ("gpt2", True)])
def test_rows_alone_on_the_first_windows(
    tiny_checkpoint: Tiny, token_ids: Ids, record: Record, plain_model: Plain, linear_inputs: Callable[..., Any],
    family: str, tied: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(batches, "TOKENS", 30)
    monkeypatch.setattr(backward, "LEARNED_TOKENS", 30)  # two windows of thirteen
    checkpoint = open_checkpoint(str(tiny_checkpoint(family, tied=tied)))
    names = [*checkpoint.matrices(), *checkpoint.embeddings()]
    ids = token_ids(5, 13)
    statistics = record(checkpoint, names, ids, "gradient")
    inputs = linear_inputs(checkpoint, ids)
    for name, expected in output_gradients(plain_model(checkpoint), checkpoint, ids[:2]).items():
        found = statistics.matrix(name)
        assert found is not None
        assert found.fisher() is None
        rows = found.gradient()
        assert rows is not None
        assert rows.dtype == np.float32
        mean = expected.square().mean(dim=0).numpy()
        np.testing.assert_allclose(rows, mean, rtol=1e-4, atol=1e-5 * mean.max(), err_msg=name)
        assert found.tokens == ids.numel()  # the moments are of all windows
        np.testing.assert_allclose(found.diagonal, inputs[name].square().mean(dim=0), rtol=1e-5, atol=1e-7)


def test_rows_of_experts_count_by_how_often_they_are_asked(
    tiny_checkpoint: Tiny, token_ids: Ids, record: Record
) -> None:
    sizes = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    checkpoint = open_checkpoint(str(tiny_checkpoint("qwen3_moe", tied=False, **sizes)))
    ids = token_ids(1, 6)
    each = record(checkpoint, checkpoint.matrices(), ids, "fisher")
    rows = record(checkpoint, checkpoint.matrices(), ids, "gradient")
    compared = 0
    for name in checkpoint.matrices():
        a, b = each.matrix(name), rows.matrix(name)
        assert (a is None) == (b is None)
        if a is None or b is None or a.tokens != 1:
            continue
        # Of a single token the sum of g_i^2 x_j^2 over the columns is g_i^2 |x|^2.
        weights, gradient = a.fisher(), b.gradient()
        assert each.has_gradient(name) == (weights is not None)
        if weights is None or gradient is None:  # it saw the last token alone, which predicts nothing
            assert weights is gradient is None
            continue
        expected = weights.sum(axis=1) / a.diagonal.sum()
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6 * expected.max())
        compared += 1
    assert compared


@pytest.mark.parametrize(("family", "tied", "groups"), [("llama", False, 4), ("gpt2", True, 3), ("phi3", False, 1)])
def test_moments_of_groups_of_rows(
    tiny_checkpoint: Tiny, token_ids: Ids, record: Record, plain_model: Plain, family: str, tied: bool, groups: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(batches, "TOKENS", 30)
    monkeypatch.setattr(backward, "LEARNED_TOKENS", 13)  # which holds where there are no groups
    checkpoint = open_checkpoint(str(tiny_checkpoint(family, tied=tied)))
    names = [*checkpoint.matrices(), *checkpoint.embeddings()]
    ids = token_ids(5, 13)
    statistics = record(checkpoint, names, ids, "gradient", groups)
    for name, (g, x) in outputs_and_inputs(plain_model(checkpoint), checkpoint, ids).items():
        found = statistics.matrix(name)
        assert found is not None
        guided, rows = found.guided(), found.gradient()
        assert guided is not None
        assert rows is not None
        assert guided.dtype == np.float32
        parts = np.array_split(np.arange(g.shape[1]), groups)
        assert guided.shape == (len(parts), x.shape[1], x.shape[1])
        for part, moment in zip(parts, guided, strict=True):
            expected = np.zeros((x.shape[1], x.shape[1]))
            for token in range(len(x)):
                expected += float(g[token, part].square().mean()) * torch.outer(x[token], x[token]).numpy()
            expected /= len(x)
            np.testing.assert_allclose(moment, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(), err_msg=name)
        np.testing.assert_allclose(rows, g.square().mean(dim=0).numpy(), rtol=1e-4, atol=1e-5 * float(rows.max()))


def test_more_groups_than_rows(tiny_llama: Path, token_ids: Ids, record: Record) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    names = checkpoint.matrices()
    statistics = record(checkpoint, names, token_ids(1, 9), "gradient", 1000)
    for name in names:
        found = statistics.matrix(name)
        assert found is not None
        guided, rows = found.guided(), found.gradient()
        assert guided is not None
        assert rows is not None
        assert len(guided) == len(rows) == checkpoint.tensors[name].shape[0]
        np.testing.assert_allclose(guided[0].diagonal().sum() > 0, rows[0] > 0)


@pytest.mark.parametrize("importance", ["activation", "gradient", "fisher"])
def test_only_what_was_asked_for(tiny_llama: Path, token_ids: Ids, record: Record, importance: str) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    found = record(checkpoint, checkpoint.matrices(), token_ids(1, 9), importance).matrix(checkpoint.matrices()[0])
    assert found is not None
    assert (found.fisher() is not None) == (importance == "fisher")
    assert (found.gradient() is not None) == (importance == "gradient")
    assert found.guided() is None


def test_hidden_states_do_not_stay_on_the_disk(
    tiny_llama: Path, token_ids: Ids, record: Record, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    record(checkpoint, checkpoint.matrices(), token_ids(2, 9), "fisher")
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    numbered = [f"{kind}-{number:04}.safetensors" for kind in ("gradients", "moments") for number in range(2)]
    assert left == sorted(["about.json", "tokens.safetensors", *numbered])


def test_a_loss_that_is_not_finite(tiny_checkpoint: Tiny, token_ids: Ids, record: Record, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_checkpoint("llama", tied=False).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] *= math.exp(88)  # finite itself; its logits are not
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(InputError, match="gradient of the loss holds"):
        record(checkpoint, checkpoint.matrices(), token_ids(1, 9), "fisher")
