"""Moments and S-diag of whole models, block by block, against a plain transformers model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from anyquant.calibration import batches
from anyquant.calibration.blocks import StreamedModel
from anyquant.calibration.folder import CalibrationFolder
from anyquant.calibration.passes import ForwardPass
from anyquant.calibration.store import Statistics
from anyquant.checkpoint import Checkpoint, open_checkpoint
from anyquant.errors import InputError

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2"]
MIXTURES: dict[str, dict[str, int]] = {
    "mixtral": {"num_local_experts": 5},
    "qwen2_moe": {
        "num_experts": 7,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
    },
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}
Record = Callable[..., Statistics]
Tiny = Callable[..., Path]
Ids = Callable[..., torch.Tensor]
Inputs = Callable[[Checkpoint, torch.Tensor], dict[str, torch.Tensor]]


def check(statistics: Statistics, name: str, inputs: torch.Tensor) -> None:
    """Compare with inputs float64 [tokens, in]."""
    found = statistics.matrix(name)
    assert found is not None, name
    expected = (inputs.T @ inputs / len(inputs)).numpy()
    full = found.full()
    assert found.tokens == len(inputs)
    assert full.dtype == found.diagonal.dtype == np.float32
    np.testing.assert_allclose(full, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found.diagonal, np.diag(expected), rtol=1e-5, atol=1e-7 * largest, err_msg=name)
    np.testing.assert_array_equal(full, full.T)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_of_every_family(
    tiny_checkpoint: Tiny, token_ids: Ids, record: Record, linear_inputs: Inputs, family: str, tied: bool
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(family, tied=tied)))
    names = [*checkpoint.matrices(), *checkpoint.embeddings()]
    ids = token_ids(3, 37)
    statistics = record(checkpoint, names, ids)
    expected = linear_inputs(checkpoint, ids)
    assert set(names) - set(expected) == set(checkpoint.embeddings()) - {checkpoint.aliases.get("lm_head.weight")} - {
        "lm_head.weight"
    }
    for name in expected:
        check(statistics, name, expected[name])
    if not tied:
        [embedding] = set(names) - set(expected)
        found = statistics.matrix(embedding)
        assert found is not None
        np.testing.assert_array_equal(found.full(), np.eye(64))
    assert statistics.tokens == ids.numel()
    assert statistics.notes == []


def test_matrices_that_share_an_input_share_a_moment(tiny_llama: Path, token_ids: Ids, record: Record) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    statistics = record(checkpoint, checkpoint.matrices(), token_ids(2, 9))
    groups: dict[Any, list[str]] = {}
    for name in checkpoint.matrices():
        found = statistics.matrix(name)
        assert found is not None
        groups.setdefault(found._moment, []).append(name.removesuffix("_proj.weight").rpartition(".")[2])
    assert sorted(map(tuple, groups.values())) == sorted([("q", "k", "v"), ("o",), ("gate", "up"), ("down",)] * 2)


def expert_inputs(model: Any, ids: torch.Tensor) -> dict[tuple[int, int, str], torch.Tensor]:
    """Inputs float64 [tokens, in] of the experts' first ("in") and last ("out") matrices, by layer and expert."""
    routed: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        routed.append((module, args[0].reshape(-1, args[0].shape[-1]), args[1]))

    for name, module in model.named_modules():
        if re.search(r"\.experts$", name):
            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    found = {}
    for layer, (module, hidden, chosen) in enumerate(routed):
        for expert in range(len(module.gate_up_proj)):
            x = hidden[(chosen == expert).any(dim=-1)]
            gate, up = nn.functional.linear(x, module.gate_up_proj[expert]).chunk(2, dim=-1)
            found[layer, expert, "in"] = x.double()
            found[layer, expert, "out"] = (nn.functional.silu(gate) * up).double()
    return found


@pytest.mark.parametrize("family", MIXTURES)
def test_moments_of_experts(
    tiny_checkpoint: Tiny,
    token_ids: Ids,
    record: Record,
    linear_inputs: Inputs,
    plain_model: Callable[[Checkpoint], Any],
    family: str,
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(family, tied=False, **MIXTURES[family])))
    ids = token_ids(1, 5)  # so few that some expert sees none
    statistics = record(checkpoint, checkpoint.matrices(), ids)
    experts = expert_inputs(plain_model(checkpoint), ids)
    dense = linear_inputs(checkpoint, ids)
    unseen = []
    for name in checkpoint.matrices():
        if name in dense:
            check(statistics, name, dense[name])
            continue
        match = re.search(r"layers\.(\d+)\..*experts\.(\d+)\.(\w+)\.weight", name)
        assert match is not None, name
        inputs = experts[int(match[1]), int(match[2]), "out" if match[3] in ("w2", "down_proj") else "in"]
        if len(inputs):
            check(statistics, name, inputs)
        else:
            unseen.append(name)
            assert statistics.matrix(name) is None
    assert unseen
    assert statistics.notes == [
        f"experts that saw no token, {len(unseen)} matrices: {', '.join(unseen[:5])}{', ...' * (len(unseen) > 5)}"
    ]


@pytest.mark.parametrize(
    ("family", "per_call"),
    [("llama", 40), ("gemma2", 80), ("mixtral", 40), ("gpt2", 79), ("opt", 80), ("bloom", 80), ("falcon", 80)],
)
def test_windows_in_batches(
    tiny_checkpoint: Tiny,
    token_ids: Ids,
    record: Record,
    linear_inputs: Inputs,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    per_call: int,
) -> None:
    # 7 windows in batches of one or two; Gemma's sliding mask is shorter than a window, and Bloom's positions, laid out
    # [windows * heads, ...], cannot be divided.
    monkeypatch.setattr(batches, "TOKENS", per_call)
    sizes = {"ffn_dim": 96, "word_embed_proj_dim": 64} if family == "opt" else {}
    checkpoint = open_checkpoint(str(tiny_checkpoint(family, **sizes)))
    names = [name for name in (*checkpoint.matrices(), *checkpoint.embeddings()) if "experts" not in name]
    ids = token_ids(7, 40)
    statistics = record(checkpoint, names, ids)
    for name, inputs in linear_inputs(checkpoint, ids).items():
        if name in names:
            check(statistics, name, inputs)


@pytest.mark.parametrize("windows", [3, 4, 5])
def test_as_many_windows_as_heads(
    tiny_checkpoint: Tiny,
    token_ids: Ids,
    record: Record,
    linear_inputs: Inputs,
    monkeypatch: pytest.MonkeyPatch,
    windows: int,
) -> None:
    """MPT passes its blocks a bias [heads, 1, window], which has no axis of windows however long it is."""
    monkeypatch.setattr(batches, "TOKENS", 40)
    sizes = {"n_heads": 4, "d_model": 64, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64}
    checkpoint = open_checkpoint(str(tiny_checkpoint("mpt", **sizes)))
    ids = token_ids(windows, 24)
    statistics = record(checkpoint, checkpoint.matrices(), ids)
    inputs = linear_inputs(checkpoint, ids)
    assert set(checkpoint.matrices()) <= set(inputs)
    for name in checkpoint.matrices():
        check(statistics, name, inputs[name])


def test_one_block_in_memory_at_a_time(
    tiny_llama: Path, token_ids: Ids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    model = StreamedModel(checkpoint)

    def present() -> set[str]:
        return {name for name, parameter in model.model.named_parameters() if parameter.device.type != "meta"}

    seen = []
    load = model.load

    def watched(section: int, *, head: bool = True) -> Any:
        parts = load(section, head=head)
        seen.append(present())
        return parts

    monkeypatch.setattr(model, "load", watched)
    folder = CalibrationFolder(tmp_path / "c")
    ForwardPass(model, token_ids(2, 8), set(checkpoint.matrices()), folder, lambda *_: None).run()
    outside = {"model.embed_tokens.weight", "model.norm.weight"}
    blocks = [{n for n in checkpoint.tensors if f"layers.{number}." in n} for number in range(2)]
    assert seen == [outside, outside | blocks[0], outside | blocks[1]]
    assert present() == set()


def test_an_untied_head_is_not_loaded_for_its_moment(tiny_checkpoint: Tiny, token_ids: Ids, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("llama", tied=False)))
    model, reads = StreamedModel(checkpoint), []
    read = checkpoint.read
    checkpoint.read = lambda name, rows=None: reads.append(name) or read(name, rows)  # type: ignore[method-assign,func-returns-value]
    folder = CalibrationFolder(tmp_path / "c")
    ForwardPass(model, token_ids(2, 8), {"lm_head.weight"}, folder, lambda *_: None).run()
    assert "lm_head.weight" not in reads
    assert folder.has_moments(model.outside)


def test_dead_columns_are_reported(tiny_checkpoint: Tiny, token_ids: Ids, record: Record, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    source = tiny_checkpoint("llama")
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][[4, 90]] = 0
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    statistics = record(checkpoint, checkpoint.matrices(), token_ids(2, 8))
    assert statistics.notes == [
        "inputs that were 0 at every token, in 1 matrices: model.layers.1.mlp.down_proj.weight (2 of 96)"
    ]
    found = statistics.matrix("model.layers.1.mlp.down_proj.weight")
    assert found is not None
    assert np.flatnonzero(found.diagonal == 0).tolist() == [4, 90]


def test_overflow_is_reported_with_the_block(
    tiny_checkpoint: Tiny, token_ids: Ids, record: Record, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_checkpoint("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    for name in ("gate_proj", "up_proj", "down_proj"):
        state[f"model.layers.1.mlp.{name}.weight"] *= 1e20
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(InputError, match=r"output of block 1 holds 1,024 values of 1,024 .* window 0 at token 0"):
        record(checkpoint, checkpoint.matrices(), token_ids(2, 8))


def test_a_head_equal_to_the_embedding_in_an_untied_model(
    tiny_checkpoint: Tiny, token_ids: Ids, record: Record, linear_inputs: Inputs, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_checkpoint("llama", tied=False).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    ids = token_ids(2, 11)
    for importance in ("activation", "gradient", "fisher"):
        statistics = record(checkpoint, checkpoint.embeddings(), ids, importance)
        check(statistics, "model.embed_tokens.weight", linear_inputs(checkpoint, ids)["model.embed_tokens.weight"])
