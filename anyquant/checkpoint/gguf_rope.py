"""Rotary scaling: what GGUF keeps as tensors and keys, Hugging Face as ``rope_scaling`` in config.json."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from anyquant.checkpoint.gguf_file import GGUFFile
from anyquant.errors import CorruptFileError, InputError

# Llama 3.1 and its successors; GGUF stores the factors that follow from these, not the numbers themselves.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _factors(file: GGUFFile, name: str) -> np.ndarray | None:
    """Return a tensor of scaling factors in float64, or None."""
    if name not in file.tensors:
        return None
    tensor = file.tensors[name]
    if tensor.type != "F32" or len(tensor.shape) != 1:
        raise CorruptFileError(f"{file.path.name}: {name} is {tensor.type} {list(tensor.shape)}, expected F32 [n].")
    values = file.blocks(name).view("<f4").astype(np.float64)
    if not np.isfinite(values).all() or (values <= 0).any():
        raise CorruptFileError(f"{file.path.name}: {name} holds factors that are not positive numbers.")
    return values


def llama3_factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """Return what each of the head_dim / 2 frequencies is divided by, in float64."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (context / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelength < context / high, 1.0, np.where(wavelength > context / low, factor, between))


def llama3_scaling(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Recover ``rope_scaling`` from the tensor rope_freqs, if there is one.

    Raises:
        InputError: the factors are not those of Llama 3.1 and its successors.
    """
    factors = _factors(file, "rope_freqs.weight")
    if factors is None or (factors == 1).all():
        return None
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    if factors.size != head_dim // 2 or not np.allclose(
        factors, llama3_factors(theta, head_dim, scaling), rtol=1e-4, atol=0
    ):
        raise InputError(
            f"{file.path.name}: the factors in rope_freqs.weight do not follow Llama 3's rule, so config.json cannot "
            "express them. Start from the model's Hugging Face folder."
        )
    return scaling


def longrope(file: GGUFFile, arch: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return Phi-3's ``rope_scaling`` from the tensors rope_factors_long and _short, if they are there.

    Args:
        file: the file.
        arch: its architecture.
        config: holds max_position_embeddings and, for phi3, original_max_position_embeddings.

    Raises:
        CorruptFileError: one of the two is missing, or it is no phi3 model.
    """
    long, short = _factors(file, "rope_factors_long.weight"), _factors(file, "rope_factors_short.weight")
    if long is None and short is None:
        return None
    if arch != "phi3" or long is None or short is None or long.size != short.size:
        raise CorruptFileError(f"{file.path.name}: rope_factors_long and _short must come together, in a phi3 model.")
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": [float(str(np.float32(f))) for f in long],
        "short_factor": [float(str(np.float32(f))) for f in short],
    }
    attention = file.get(f"{arch}.rope.scaling.attn_factor", float)
    original = config["original_max_position_embeddings"]
    stretch = config["max_position_embeddings"] / original
    usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 and original > 1 else 1.0
    if attention is not None and not math.isclose(attention, usual, rel_tol=1e-6):
        scaling["attention_factor"] = float(str(np.float32(attention)))
    return scaling


def linear_or_yarn(file: GGUFFile, arch: str) -> dict[str, Any] | None:
    """Return ``rope_scaling`` from the keys ``rope.scaling.*``, if they call for one.

    Raises:
        InputError: a kind of scaling that is not linear or YaRN.
    """
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    factor = file.get(f"{arch}.rope.scaling.factor", float, 0.0)
    yarn_keys = sorted(key for key in file.header.values if key.startswith(f"{arch}.rope.scaling.yarn_"))
    if kind not in ("linear", "yarn") or not 0 < factor < math.inf or yarn_keys or arch == "phi3":
        detail = f", {', '.join(yarn_keys)}" if yarn_keys else ""
        raise InputError(
            f"{file.path.name}: the rotary scaling {kind!r} (factor {factor}{detail}) of a {arch} model cannot be "
            "expressed in config.json. Start from the model's Hugging Face folder."
        )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(str(np.float32(factor)))}
    original = file.get(f"{arch}.rope.scaling.original_context_length", int)
    if kind == "yarn" and original:
        scaling["original_max_position_embeddings"] = original
    return scaling
