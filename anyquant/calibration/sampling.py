"""Text that the model itself samples, so that a calibration needs no data (cf. LLM-QAT, arXiv 2305.17888).

How to begin and how to draw was measured on SmolLM2-135M, 8,192 tokens each, by the second moments of all inputs: the
relative difference of their diagonals (scaled to mean 1, median over the matrices) to those of news and of Wikipedia,
which differ by .10 from each other. A random ordinary token, documents of 128 tokens: .10 and .07. Documents of 256
tokens: .14 and .09. Temperature .8: .12 and .09; the likeliest 95 %: .11 and .07; the first three tokens greedily, as
LLM-QAT does: .09 and .07; <|endoftext|> as the first token: .16 and .11, and left out of the window: .15 and .10; BOS:
.09 and .10. Tokens drawn evenly, which are no language: .40 and .39.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from anyquant.calibration.blocks import StreamedModel
from anyquant.calibration.settings import DOCUMENTS, SAMPLED_TOKENS, CalibrationSettings
from anyquant.calibration.tokens import Tokens
from anyquant.errors import InputError
from anyquant.ir import Progress
from anyquant.validation import texts


def sample(model: StreamedModel, tokenizer: Any, settings: CalibrationSettings, progress: Progress) -> Tokens:
    """Sample windows of text from a model, at temperature 1 from its FP32 logits.

    A window is made of two documents of half its length. Each begins with a token drawn evenly from the ordinary ones
    and is continued by the model, many documents at once. Where the tokenizer puts a token before a text (BOS), every
    document has it before it, and the window once. A document that the model ends early is followed by another one,
    as in training data; no other special tokens are drawn. Equal seeds draw equal texts.

    Args:
        model: without weights, and so it will be left; meanwhile all of it is in memory.
        tokenizer: the model's.
        settings: how many windows of how many tokens, and the seed.
        progress: called after each token of a batch of documents.

    Raises:
        InputError: the logits are not finite, or the tokenizer has no ordinary token.
    """
    sampler = _Sampler(model, tokenizer, settings.seed)
    body = settings.window - (sampler.leading is not None)
    length = -(-body // DOCUMENTS)
    count = settings.windows * DOCUMENTS
    batch = max(1, SAMPLED_TOKENS // length)
    sizes = [min(batch, count - start) for start in range(0, count, batch)]
    sections = range(model.outside + 1)
    try:
        for section in sections:
            model.load(section)
        parts = []
        for number, size in enumerate(sizes):
            tokens = range(number * length, len(sizes) * length)
            parts.append(sampler.documents(size, length, partial(_advance, progress, tokens)))
    finally:
        for section in sections:
            model.free(section)
    ids = torch.cat(parts).reshape(settings.windows, -1)[:, :body]
    if sampler.leading is not None:
        ids = torch.nn.functional.pad(ids, (1, 0), value=sampler.leading)
    return Tokens(ids.numpy(), [])


def _advance(progress: Progress, tokens: range, done: int) -> None:
    progress("sampling", tokens.start + done, tokens.stop)


class _Sampler:
    """Draws documents; every draw is one of a seeded generator."""

    def __init__(self, model: StreamedModel, tokenizer: Any, seed: int) -> None:
        rows = int(model.model.get_output_embeddings().weight.shape[0])
        known = {i for i in tokenizer.get_vocab().values() if i < rows}
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        stops = known & texts.stop_ids(tokenizer, {"eos_token_id": getattr(model.model.config, "eos_token_id", None)})
        ordinary = sorted(known - special - stops)
        if not ordinary:
            raise InputError(f"{model.name}: its tokenizer has no ordinary tokens; calibrate on a text instead")
        self.leading = texts.leading_token(tokenizer)
        self._model, self._name = model.model, model.name
        self._ordinary, self._stops = (torch.tensor(sorted(ids), dtype=torch.long) for ids in (ordinary, stops))
        self._bias = torch.full((rows,), -torch.inf)
        self._bias[self._ordinary] = 0
        self._bias[self._stops] = 0
        self._generator = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def documents(self, count: int, length: int, progress: Callable[[int], None]) -> torch.Tensor:
        """Token ids int64 [count, length]."""
        columns = [self._beginnings(count)]
        step, cache = columns[0][:, None], None
        if self.leading is not None:
            step = torch.nn.functional.pad(step, (1, 0), value=self.leading)
        for n in range(1, length):
            output = self._model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            token = self._draw(output.logits[:, -1])
            ended = torch.isin(columns[-1], self._stops)
            token[ended] = self._beginnings(int(ended.sum()))
            columns.append(token)
            step = token[:, None]
            progress(n + 1)
        return torch.stack(columns, dim=1)

    def _beginnings(self, count: int) -> torch.Tensor:
        return self._ordinary[torch.randint(len(self._ordinary), (count,), generator=self._generator)]

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        """One token of each row of logits, by inverting the cumulative distribution in FP64."""
        cumulative = (logits.float() + self._bias).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        whole = cumulative[:, -1:]
        if not whole.isfinite().all():
            raise InputError(
                f"{self._name}: its logits are NaN or infinite, so it cannot sample a text. The checkpoint is "
                "damaged, or its config.json belongs to another model."
            )
        drawn = torch.rand(whole.shape, generator=self._generator, dtype=torch.float64) * whole
        return torch.searchsorted(cumulative, drawn, right=True).clamp(max=logits.shape[1] - 1)[:, 0]
