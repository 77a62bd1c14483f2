"""How much memory and time a quantization will take, from shapes and a fraction of a second of trying."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from anyquant import ir
from anyquant.calibration.settings import DOCUMENTS, GRADIENT_FREE, LEARNED_TOKENS, SAMPLED_TOKENS
from anyquant.checkpoint import Checkpoint
from anyquant.forms import Forms

if TYPE_CHECKING:
    from anyquant.job import Job

# Measured on SmolLM2: interpreter and libraries; what a worker's arithmetic takes beside its matrix, being done on a
# few rows at a time; transformers with torch, which make the tokenizer files of a GGUF source; and torch with a
# model of no weights, on which a calibration runs.
_BASE, _WORKER, _TOKENIZER, _TORCH = 220 << 20, 60 << 20, 80 << 20, 560 << 20
_SAMPLE_ROWS = 16
STAGES = ("calibration", "errors", "quantizing", "refining")
_DRAWING = 24  # bytes for each logit that a token is drawn from: FP32, its probability, the FP64 sums
_SAMPLING = 5  # a token drawn after the other takes so much longer than tokens of a text
_REST = 2.0  # all that is no product of large matrices, as a factor
_REFINING = 150  # operations for each pair of inputs of each row, at the speed of products; measured on SmolLM2
_MULTIPLY = 512  # side of the matrices by which the speed of products is measured


def peak_memory(checkpoint: Checkpoint, job: Job, forms: Forms, model: ir.Model) -> int:
    """Bytes of memory that measuring and quantizing need at their height."""
    largest = max(4 * out * columns for out, columns in forms.shapes)
    # The weights and what they became; with statistics also the moment of the inputs, in FP64, and a product with it.
    held = 3 * largest
    if job.needs_statistics and job.calibration_settings.has_moments:
        held += max(16 * columns**2 + 16 * out * columns for out, columns in forms.shapes)
    peak = _BASE + job.workers * (held + _WORKER)
    peak += max(entry.spec.nbytes for entry in model.entries.values())
    peak += _TOKENIZER if checkpoint.kind == "gguf" else 0
    return max(peak, _calibration_memory(checkpoint, job) if job.needs_statistics else 0)


def _calibration_memory(checkpoint: Checkpoint, job: Job) -> int:
    """Sampling text from the model needs the model; statistics need a block of it, gradients copies of the states."""
    weights = sum(4 * prod(info.shape) for info in checkpoint.tensors.values())
    layers = max(1, _size(checkpoint, "num_hidden_layers", "n_layer"))
    hidden = _size(checkpoint, "hidden_size", "n_embd")
    tokens = job.calibration_settings.windows * job.calibration_settings.window
    # Of the hidden states of all tokens; those that wait for the next block lie on disk, unless it is sequential.
    copies = 5 if job.has_gradients else 3 if job.quantize_embeddings else 2 if job.sequential else 0
    states = copies * 4 * hidden * tokens
    embeddings = sum(4 * prod(checkpoint.tensors[name].shape) for name in checkpoint.embeddings())
    needed = embeddings + 3 * (weights - embeddings) // layers + states
    if job.calibration_settings.source == "self":
        heads = _size(checkpoint, "num_attention_heads", "n_head")
        width = _size(checkpoint, "head_dim") or hidden // max(1, heads)
        kept = 2 * 4 * layers * width * (_size(checkpoint, "num_key_value_heads") or heads)
        documents = min(tokens, SAMPLED_TOKENS) * DOCUMENTS // job.calibration_settings.window
        drawing = _DRAWING * documents * _size(checkpoint, "vocab_size")
        needed = max(needed, weights + kept * min(tokens, SAMPLED_TOKENS) + drawing)
    return _BASE + _TORCH + needed


def _size(checkpoint: Checkpoint, *keys: str) -> int:
    """A number of the configuration under the first of its names that is there; else 0."""
    return next((int(checkpoint.config[key]) for key in keys if checkpoint.config.get(key)), 0)


def seconds(checkpoint: Checkpoint, job: Job, forms: Forms, stages: Collection[str] = STAGES) -> dict[str, float]:
    """Stage -> seconds that it may take here, on as many threads as the job has workers; takes half a second itself."""
    rows: Counter[int] = Counter()
    for out, columns in forms.shapes:
        rows[columns] += out
    rates = {columns: _row_seconds(forms, columns) for columns in rows}
    measuring, quantizing = (sum(count * rates[columns][i] for columns, count in rows.items()) for i in (0, 1))
    found = {"errors": measuring / job.workers, "quantizing": quantizing / job.workers}
    if job.needs_statistics and job.calibration_settings.has_moments:  # what outputs lose, in FP64
        found["quantizing"] += sum(8 * out * columns**2 for out, columns in forms.shapes) / _multiplications()
    if job.refine:
        found["refining"] = sum(_REFINING * out * columns**2 for out, columns in forms.shapes) / _multiplications()
    if job.needs_statistics and "calibration" in stages:
        found["calibration"] = _calibration_seconds(checkpoint, job)
    return {stage: found[stage] for stage in STAGES if stage in stages and stage in found}


def in_words(stages: dict[str, float]) -> str:
    """ "roughly 190 s (calibration 170, errors 20)"."""
    parts = ", ".join(f"{name} {value:.0f}" for name, value in stages.items())
    return f"roughly {sum(stages.values()):.0f} s ({parts})"


def _row_seconds(forms: Forms, columns: int) -> tuple[float, float]:
    """Seconds of measuring and of quantizing one row of some length."""
    weight = np.random.default_rng(0).standard_normal((_SAMPLE_ROWS, columns)).astype(np.float32)
    levels = forms.method.levels((_SAMPLE_ROWS, columns), forms.settings)
    chosen = np.full(levels.units, levels.count // 2, np.uint8)
    found: list[float] = []
    calls: tuple[Any, ...] = (
        lambda: forms.method.errors(weight, None, forms.settings),
        lambda: forms.method.quantize(weight, chosen, None, forms.settings),
    )
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) / _SAMPLE_ROWS)
    return found[0], found[1]


def _calibration_seconds(checkpoint: Checkpoint, job: Job) -> float:
    settings, shapes = job.calibration_settings, [checkpoint.tensors[name].shape for name in checkpoint.matrices()]
    tokens = settings.windows * settings.window
    few = 0 if settings.importance in GRADIENT_FREE else min(tokens, LEARNED_TOKENS)
    learned = tokens if settings.importance == "fisher" or settings.row_groups else few
    sampled = tokens if settings.source == "self" else 0
    forward = sum(2 * out * columns for out, columns in shapes)
    moments = sum(2 * columns**2 for _, columns in shapes) / 2  # q, k and v, or gate and up, share theirs
    work = (tokens + 4 * learned + _SAMPLING * sampled) * forward + (tokens * moments if settings.has_moments else 0)
    work += settings.row_groups * learned * sum(columns**2 for _, columns in shapes)
    return _REST * work / _multiplications()


@cache
def _multiplications() -> float:
    """Operations per second in products of FP32 matrices, on all threads."""
    a = np.ones((_MULTIPLY, _MULTIPLY), np.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * _MULTIPLY**3 / min(times)
