"""The findings of a validation, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from anyquant.errors import ValidationFailed
from anyquant.reporting.estimate import Estimate

SCHEMA = "anyquant.validation/1"


@dataclass(frozen=True)
class TopDifference:
    """A position where the most probable token differs.

    ``gap`` is how much the reference's logit of its own first token exceeds that of the candidate's.
    """

    window: int
    position: int
    reference: int
    candidate: int
    gap: float
    near_tie: bool


@dataclass(frozen=True)
class LogitIndex:
    """Where a logit is: counted from 0."""

    window: int
    position: int
    token: int


@dataclass(frozen=True)
class Comparison:
    """Logits of one runner against those of another, over all windows.

    Attributes:
        reference: name of the runner compared with.
        candidate: name of the runner compared.
        max_abs_logit: largest |difference of a logit|.
        max_abs_at: where that is; the first NaN, if there is one.
        logit_scale: largest |logit| of the reference, which the line above is to be read against.
        nonfinite: logits of the candidate that are NaN or Inf.
        kl_mean: mean of KL(reference || candidate) per token, nats; and its quantiles.
        kl_median: see kl_mean.
        kl_p99: see kl_mean.
        kl_max: see kl_mean.
        top1: share of tokens with the same first choice; near ties count as differing.
        near_ties: differing first choices that are near ties.
        differences: the first differing positions, the widest gaps first.
        perplexity_change: candidate's perplexity minus the reference's, paired over windows.
        kl_per_token: KL of every token, for plots; not part of the JSON report.
    """

    reference: str
    candidate: str
    max_abs_logit: float
    max_abs_at: LogitIndex
    logit_scale: float
    nonfinite: int
    kl_mean: Estimate
    kl_median: Estimate
    kl_p99: Estimate
    kl_max: Estimate
    top1: Estimate
    near_ties: int
    differences: tuple[TopDifference, ...]
    perplexity_change: Estimate
    kl_per_token: tuple[float, ...] = field(default=(), repr=False, metadata={"json": False})


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not what it should be.

    Attributes:
        tensor: its name.
        problem: in words.
        index: of the first value that differs; None where the tensor is missing, unreadable or has another shape.
        expected: the IR's value there.
        found: the file's.
        rounded: all that differs is that the IR's values were rounded as exporters may where they are allowed to.
    """

    tensor: str
    problem: str
    index: tuple[int, ...] | None = None
    expected: float | None = None
    found: float | None = None
    rounded: bool = False


@dataclass(frozen=True)
class TensorComparison:
    """Dequantized tensors of one file against the IR's manifest.

    Attributes:
        file: "IR", "GGUF" or "ONNX".
        equal: tensors whose SHA-256 is the manifest's.
        total: tensors of the manifest.
        differences: the others, and what the file has too many.
        rounding: why values may be rounded, "" where they must be equal.
        n_values: numbers compared.
    """

    file: str
    equal: int
    total: int
    differences: tuple[TensorDifference, ...]
    rounding: str = ""
    n_values: int = 0


@dataclass(frozen=True)
class Gate:
    """One requirement: what was measured, and the limit."""

    name: str
    subject: str
    value: float | None
    limit: float
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class ModelRow:
    """One model in one runtime.

    Attributes:
        name: "source", "IR", "GGUF", "ONNX", or "IR, A bfp6": the IR with quantized activations.
        runtime: program that computed its logits, with version.
        nbytes: bytes on disk (of the tensors, for a model from a hub or an IR folder).
        bits_per_weight: 8 * nbytes / number of all weights, quantized or not.
        arithmetic: "fp32"; "rounded": the runtime rounds activations on the way; or "quantized": they are quantized
            on purpose. ``arithmetic_reason`` says where.
        perplexity: over the windows.
        text: greedy continuation of the prompt.
        token_ids: of the text.
        seconds: spent in this runner for all windows; ``load_seconds`` before them.
        seconds_per_window: mean.
        load_seconds: to open the model.
        peak_memory: bytes, of the runner's process.
    """

    name: str
    runtime: str
    nbytes: int
    bits_per_weight: float
    arithmetic: str
    arithmetic_reason: str
    perplexity: Estimate
    text: str
    token_ids: tuple[int, ...]
    seconds: float
    seconds_per_window: float
    load_seconds: float
    peak_memory: int | None


@dataclass(frozen=True)
class ValidationReport:
    """Everything a validation found; see the fields' types.

    Attributes:
        model: name of the IR folder, and what is known of it (method, settings, bits, source).
        data: text file, tokens, windows, seed.
        environment: versions, CPU, threads.
        rows: one per model and runtime.
        comparisons: against the source and against the IR in PyTorch.
        tensors: equality bit for bit, per file.
        gates: what had to hold.
        notes: what a reader should know, one sentence each.
        prompt: what the texts continue.
        seconds: of the whole validation.
        schema: version of this structure.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    rows: tuple[ModelRow, ...]
    comparisons: tuple[Comparison, ...]
    tensors: tuple[TensorComparison, ...]
    gates: tuple[Gate, ...]
    notes: tuple[str, ...]
    prompt: str
    seconds: float
    schema: str = SCHEMA

    @property
    def failed(self) -> list[Gate]:
        """Gates that were not met."""
        return [gate for gate in self.gates if not gate.passed]

    def comparison(self, reference: str, candidate: str) -> Comparison | None:
        """The comparison of two rows by name, None if it was not made."""
        for found in self.comparisons:
            if (found.reference, found.candidate) == (reference, candidate):
                return found
        return None

    def require(self) -> None:
        """Raise if a gate failed; to be called after the report is written.

        Raises:
            ValidationFailed: naming every failed gate.
        """
        if self.failed:
            lines = "\n".join(f"  {gate.subject}: {gate.detail}" for gate in self.failed)
            raise ValidationFailed(f"{len(self.failed)} of {len(self.gates)} gates failed:\n{lines}")
