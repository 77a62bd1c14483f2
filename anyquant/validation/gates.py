"""The gates: what has to hold for a validation to pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from anyquant.validation.arithmetic import Arithmetic
from anyquant.validation.results import Comparison, Gate, TensorComparison
from anyquant.validation.settings import ValidationSettings

MAX_ABS_LOGIT, LOGIT_SCALE = 1e-3, 20.0
"""FP32 paths: most |difference of a logit| where logits reach 20; in proportion where they reach further, as the
rounding of FP32 sums does."""
MAX_KL_FP32 = 3e-4
MAX_KL_ROUNDED = 1e-2
REFERENCE = "IR"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def tensor_gate(tensors: TensorComparison) -> Gate:
    """All tensors equal; what was only rounded is reported, not failed, where the file records that it was allowed."""
    bad = len(tensors.differences)
    detail = f"{tensors.equal} of {tensors.total} tensors equal bit for bit"
    if bad:
        first = tensors.differences[0]
        where = "" if first.index is None else f" at {list(first.index)}: {first.expected!r} became {first.found!r}"
        detail += f"; {first.tensor}: {first.problem}{where}"
    allowed = bool(tensors.rounding) and all(d.rounded for d in tensors.differences)
    if bad and allowed:
        detail += f" (rounded: {tensors.rounding})"
    return Gate("tensors equal", tensors.file, float(bad), 0.0, not bad or allowed, detail)


def runtime_gates(comparison: Comparison, arithmetic: Arithmetic) -> list[Gate]:
    """Logits of a runtime against PyTorch on the same weights."""
    exact = arithmetic.kind == "fp32"
    limit = MAX_KL_FP32 if exact else MAX_KL_ROUNDED
    kl = comparison.kl_mean.value
    gates = []
    if exact:
        largest, at = comparison.max_abs_logit, comparison.max_abs_at
        most = MAX_ABS_LOGIT * max(1.0, comparison.logit_scale / LOGIT_SCALE)
        gates.append(
            Gate(
                "max |d logit| to PyTorch",
                comparison.candidate,
                _finite(largest),
                most,
                largest <= most,
                f"max |difference of a logit| {largest:.3g}, limit {most:.3g} "
                f"(FP32 path; logits reach {comparison.logit_scale:.1f}), "
                f"in window {at.window}, position {at.position}, token {at.token}",
            )
        )
    gates.append(
        Gate(
            "KL to PyTorch",
            comparison.candidate,
            _finite(kl),
            limit,
            kl <= limit,
            f"mean KL to PyTorch on the same weights {kl:.3g}, limit {limit:g} "
            f"({'FP32 path' if exact else arithmetic.reason})",
        )
    )
    return gates


def quality_gates(comparison: Comparison, settings: ValidationSettings) -> list[Gate]:
    """The user's own limits on the distance to the source."""
    gates = []
    if settings.max_kl is not None:
        kl = comparison.kl_mean.value
        gates.append(
            Gate(
                "--max-kl",
                comparison.candidate,
                _finite(kl),
                settings.max_kl,
                kl <= settings.max_kl,
                f"mean KL to the source {kl:.3g}, limit {settings.max_kl:g}",
            )
        )
    if settings.min_top1 is not None:
        top1 = comparison.top1.value
        gates.append(
            Gate(
                "--min-top1",
                comparison.candidate,
                _finite(top1),
                settings.min_top1,
                top1 >= settings.min_top1,
                f"top-1 agreement with the source {top1:.4f}, limit {settings.min_top1:g}",
            )
        )
    return gates


def finite_gate(name: str, nonfinite: int) -> Gate:
    """No NaN and no infinity among the logits."""
    return Gate(
        "finite logits", name, float(nonfinite), 0.0, not nonfinite, f"{nonfinite:,} logits are NaN or infinite"
    )


def all_gates(
    settings: ValidationSettings,
    tensors: Iterable[TensorComparison],
    comparisons: Iterable[Comparison],
    arithmetic: Mapping[str, Arithmetic],
    nonfinite: Mapping[str, int],
) -> tuple[Gate, ...]:
    """Every gate of a validation, in the order tensors, logits, quality.

    Args:
        settings: with the user's limits.
        tensors: per file.
        comparisons: against the IR and against the source.
        arithmetic: per exported file ("GGUF", "ONNX").
        nonfinite: per runner, logits that are NaN or infinite.
    """
    gates = [tensor_gate(found) for found in tensors]
    gates += [finite_gate(name, count) for name, count in nonfinite.items() if count]
    comparisons = list(comparisons)
    for comparison in comparisons:
        if comparison.reference == REFERENCE:
            gates += runtime_gates(comparison, arithmetic[comparison.candidate])
    for comparison in comparisons:
        if comparison.reference == "source":
            gates += quality_gates(comparison, settings)
    return tuple(gates)
