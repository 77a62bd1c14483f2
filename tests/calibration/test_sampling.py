"""Self-sampled text against a loop without cache and without batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyquant.calibration import CalibrationSettings, sampling
from anyquant.calibration.blocks import StreamedModel
from anyquant.calibration.tokens import load_tokenizer
from anyquant.checkpoint import Checkpoint, open_checkpoint
from anyquant.errors import InputError

Tiny = Callable[..., Path]
BOS, EOS, KNOWN = 1, 2, 389
STOPS = [EOS, *range(50, 90)]
"""More than one token ends a document, and so many that some end early."""


def tokenizer_of(checkpoint: Checkpoint, *, leading: bool = False) -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(checkpoint)
    if leading:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def sample(checkpoint: Checkpoint, settings: CalibrationSettings, *, leading: bool = False) -> np.ndarray:
    steps: list[tuple[str, int, int]] = []
    tokenizer = tokenizer_of(checkpoint, leading=leading)
    found = sampling.sample(StreamedModel(checkpoint), tokenizer, settings, lambda *step: steps.append(step))
    assert found.notes == []
    assert [done for _, done, _ in steps] == sorted({done for _, done, _ in steps})
    assert not steps or steps[-1][1] == steps[-1][2]
    return found.ids


def slowly(model: Any, settings: CalibrationSettings, *, leading: bool) -> list[list[int]]:
    """The same, all tokens computed again at every step."""
    generator = torch.Generator().manual_seed(settings.seed)
    body = settings.window - leading
    length = (body + 1) // 2
    ordinary = [token for token in range(3, KNOWN) if token not in STOPS]

    def beginnings(count: int) -> list[int]:
        return [ordinary[i] for i in torch.randint(len(ordinary), (count,), generator=generator).tolist()]

    documents = [[token] for token in beginnings(2 * settings.windows)]
    while len(documents[0]) < length:
        logits = [model(torch.tensor([[BOS] * leading + d])).logits[0, -1].detach() for d in documents]
        uniform = torch.rand(len(documents), 1, generator=generator, dtype=torch.float64)[:, 0].tolist()
        tokens = []
        for row, u in zip(logits, uniform, strict=True):
            row[[0, BOS, *range(KNOWN, len(row))]] = -torch.inf
            cumulative = row.softmax(dim=0).double().cumsum(dim=0)
            tokens.append(int((cumulative <= u * cumulative[-1]).sum()))
        ended = [n for n, document in enumerate(documents) if document[-1] in STOPS]
        for n, token in zip(ended, beginnings(len(ended)), strict=True):
            tokens[n] = token
        for document, token in zip(documents, tokens, strict=True):
            document.append(token)
    pairs = zip(documents[::2], documents[1::2], strict=True)
    return [[BOS] * leading + (first + second)[:body] for first, second in pairs]


@pytest.mark.parametrize(
    ("family", "leading"), [("llama", False), ("llama", True), ("gpt2", False), ("gemma2", True), ("qwen3_moe", False)]
)
def test_against_the_slow_loop(
    tiny_checkpoint: Tiny, plain_model: Callable[[Checkpoint], Any], family: str, leading: bool
) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32} if "moe" in family else {}
    # A vocabulary beyond the tokenizer's; Gemma's window is shorter than a document.
    checkpoint = open_checkpoint(str(tiny_checkpoint(family, vocab_size=400, eos_token_id=STOPS, **sizes)))
    settings = CalibrationSettings(windows=2, window=43, seed=3)
    ids = sample(checkpoint, settings, leading=leading)
    assert ids.dtype == np.int64
    assert np.isin(ids, STOPS).sum() > 2
    assert ids.tolist() == slowly(plain_model(checkpoint), settings, leading=leading)


def test_only_ordinary_tokens_and_ends(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    ids = sample(checkpoint, CalibrationSettings(windows=16, window=128))
    assert ids.min() == EOS
    assert ids.max() < KNOWN
    ends = np.argwhere(ids[:, :-1] == EOS)
    assert len(ends)
    assert all(ids[window, position + 1] > EOS for window, position in ends)
    assert len(np.unique(ids[:, 0])) > 10
    assert len(np.unique(ids)) > 300


def test_seeds(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    first, again, other = (
        sample(checkpoint, CalibrationSettings(windows=2, window=9, seed=seed)).tolist() for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(("windows", "window"), [(1, 2), (1, 3), (3, 17), (5, 8)])
@pytest.mark.parametrize("leading", [False, True])
def test_shapes_and_batches(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, windows: int, window: int, leading: bool
) -> None:
    monkeypatch.setattr(sampling, "SAMPLED_TOKENS", 20)
    ids = sample(open_checkpoint(str(tiny_llama)), CalibrationSettings(windows=windows, window=window), leading=leading)
    assert ids.shape == (windows, window)
    assert ((ids == BOS).sum(axis=1) == leading).all()


def test_the_weights_are_taken_out_again(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    model = StreamedModel(checkpoint)
    sampling.sample(model, tokenizer_of(checkpoint), CalibrationSettings(windows=1, window=4), lambda *step: None)
    assert {parameter.device.type for parameter in model.model.parameters()} == {"meta"}


def test_logits_that_are_not_finite(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_checkpoint("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] *= 1e38
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="logits are NaN or infinite"):
        sample(open_checkpoint(str(folder)), CalibrationSettings(windows=1, window=8))
