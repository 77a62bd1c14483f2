"""Names and layout of GGUF tensors against those of Hugging Face checkpoints, both ways.

llama.cpp's converter renames every tensor, permutes the query and key rows of llama-like models (its
rotary embedding pairs neighbouring rows, transformers pairs the halves of a head), adds 1 to the norms
of Gemma and transposes GPT-2's Conv1D weights. The reader undoes this and the exporter does it again,
both from the tables here. This module imports nothing but NumPy and the errors.

Every function takes the architecture either as GGUF calls it (``general.architecture``) or as transformers
does (``model_type``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from anyquant.errors import CorruptFileError

_LARGEST_SIZE = 1 << 20  # of a width or a number of heads; no model comes near it

_ROTARY_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROTARY_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_LAYERS: dict[str, dict[str, str]] = {
    "llama": _ROTARY_LAYER,
    "qwen2": _ROTARY_LAYER,
    "qwen3": {**_ROTARY_LAYER, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    "gemma": _ROTARY_LAYER,
    "gemma2": {
        **_ROTARY_LAYER,
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    "phi3": {
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
    "gpt2": {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
}
_GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}

SUPPORTED_ARCHITECTURES: tuple[str, ...] = tuple(_LAYERS)
"""GGUF architectures whose tensors this module can name."""

MODEL_TYPES: dict[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
"""transformers ``model_type`` -> GGUF architecture."""

MODEL_CLASSES = frozenset(
    {
        "LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen2Model",
        "Qwen3ForCausalLM", "Qwen3Model", "GemmaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel",
    }
)  # fmt: skip
"""The ``architectures`` of config.json that these families have."""

ROPE_TENSORS: tuple[str, ...] = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""GGUF tensors that hold rotary scaling factors: part of config.json, not of a Hugging Face checkpoint."""

_LAYER_IN_GGUF = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_TOP_IN_GGUF = re.compile(r"(\w+)\.(weight|bias)")
_LAYER_IN_HF = re.compile(r"(?:model\.layers|layers|transformer\.h|h)\.(\d+)\.([\w.]+)\.(weight|bias)")
_TOP_IN_HF = re.compile(r"([\w.]+)\.(weight|bias)")
_CONV1D = re.compile(r"(?:attn\.c_attn|attn\.q_attn|c_proj|mlp\.c_fc)\.weight$")


def gguf_architecture(arch: str) -> str | None:
    """Return the GGUF architecture for a GGUF architecture or a transformers ``model_type``; None if unknown."""
    return arch if arch in _LAYERS else MODEL_TYPES.get(arch)


def _top(arch: str) -> dict[str, str]:
    return _GPT2_TOP if arch == "gpt2" else _ROTARY_TOP


def gguf_to_hf_name(arch: str, name: str) -> str | None:
    """Translate a GGUF tensor name ("blk.0.attn_q.weight") to the Hugging Face one.

    Returns:
        The name as in the ``state_dict`` of the model for causal language modelling, or None when the
        architecture or the tensor is unknown (also for ROPE_TENSORS, which Hugging Face keeps in the config).
    """
    family = gguf_architecture(arch)
    if family is None:
        return None
    if match := _LAYER_IN_GGUF.fullmatch(name):
        module = _LAYERS[family].get(match[2])
        layers = "transformer.h" if family == "gpt2" else "model.layers"
        return None if module is None else f"{layers}.{match[1]}.{module}.{match[3]}"
    if match := _TOP_IN_GGUF.fullmatch(name):
        module = _top(family).get(match[1])
        return None if module is None else f"{module}.{match[2]}"
    return None


def hf_to_gguf_name(arch: str, name: str) -> str | None:
    """Translate a Hugging Face tensor name to the GGUF one; None when architecture or tensor is unknown.

    Names without the base model's prefix ("layers.0...", "h.0...", "wte.weight"), as checkpoints of the
    bare model have them, are understood too.
    """
    family = gguf_architecture(arch)
    if family is None:
        return None
    if match := _LAYER_IN_HF.fullmatch(name):
        for gguf, module in _LAYERS[family].items():
            if module == match[2]:
                return f"blk.{match[1]}.{gguf}.{match[3]}"
        return None
    if match := _TOP_IN_HF.fullmatch(name):
        for gguf, module in _top(family).items():
            if match[1] in (module, module.partition(".")[2]):
                return f"{gguf}.{match[2]}"
    return None


def checked_size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a width or a count of a configuration, which anyone may have written.

    Args:
        config: a model's config.json.
        key: what to look up.
        default: stands in for a key that is absent or null; None where there must be one.

    Raises:
        CorruptFileError: absent, no whole number, or beyond any model; names the key.
    """
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or not 0 < value <= _LARGEST_SIZE:
        raise CorruptFileError(
            f"{key} of the configuration is {value!r:.40}, must be a whole number in 1..{_LARGEST_SIZE}. "
            "Compare with the config.json of the original model."
        )
    return value


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the rows of one attention head.

    Raises:
        CorruptFileError: the sizes that it follows from are missing or odd.
    """
    if config.get("head_dim") is not None:
        size = checked_size(config, "head_dim")
    else:
        size = checked_size(config, "hidden_size") // checked_size(config, "num_attention_heads")
    if size < 2 or size % 2:
        raise CorruptFileError(
            f"a head has {size} rows by head_dim, or hidden_size and num_attention_heads, of the configuration, "
            "must be an even number. Compare with the config.json of the original model."
        )
    return size


def rows_by_heads(arch: str, hf_name: str, config: Mapping[str, Any]) -> int | None:
    """Return how many rows the configuration gives a tensor whose rows GGUF reorders; None for any other tensor.

    Raises:
        CorruptFileError: the heads in the configuration are missing or odd.
    """
    if gguf_architecture(arch) != "llama":
        return None
    match = re.search(r"\.self_attn\.([qk])_proj\.(?:weight|bias)$", "." + hf_name)
    if match is None:
        return None
    heads = checked_size(config, "num_attention_heads")
    if match[1] == "k":
        heads = checked_size(config, "num_key_value_heads", heads)
    return heads * head_dim(config)


def row_permutation(arch: str, hf_name: str, config: Mapping[str, Any]) -> np.ndarray | None:
    """Return the order in which GGUF keeps the rows of a tensor.

    Where the configuration is not to be trusted, compare :func:`rows_by_heads` with the tensor first: the array
    has as many items.

    Args:
        arch: architecture.
        hf_name: Hugging Face name of the tensor (weight or bias).
        config: the model's config.json; the head counts and sizes are read from it.

    Returns:
        int64 index array p of length rows with ``gguf_rows = hf_rows[p]``, or None where the order is the same.
        ``hf_rows = gguf_rows[inverse_permutation(p)]``.

    Raises:
        CorruptFileError: the heads in the configuration are missing or odd.
    """
    rows = rows_by_heads(arch, hf_name, config)
    if rows is None:
        return None
    order = np.arange(rows, dtype=np.int64)
    return order.reshape(-1, 2, head_dim(config) // 2).swapaxes(1, 2).reshape(-1)


def inverse_permutation(order: np.ndarray) -> np.ndarray:
    """Return the int64 array q with ``x[order][q] == x``."""
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size, dtype=order.dtype)
    return inverse


def norm_offset(arch: str, hf_name: str) -> float:
    """Return what GGUF adds to the values of a tensor: 1.0 for the norms of Gemma, else 0.0.

    ``gguf = hf + offset`` and ``hf = gguf - offset``, both in float32.
    """
    return 1.0 if gguf_architecture(arch) in ("gemma", "gemma2") and hf_name.endswith("norm.weight") else 0.0


def is_conv1d(model_type: str, hf_name: str) -> bool:
    """Say whether Hugging Face stores this matrix as [in, out] (GPT-2's Conv1D). GGUF stores [out, in]."""
    return model_type in CONV1D_MODEL_TYPES and _CONV1D.search(hf_name) is not None


CONV1D_MODEL_TYPES = frozenset({"gpt2", "imagegpt", "openai-gpt", "decision_transformer"})
"""transformers model types built from Conv1D layers."""


def layer_tensors(arch: str, layers: int) -> list[str]:
    """List the GGUF weights that a model with so many layers must have (no biases, no output head)."""
    family = gguf_architecture(arch)
    if family is None:
        return []
    top = [f"{name}.weight" for name in _top(family) if name != "output"]
    return top + [f"blk.{i}.{name}.weight" for i in range(layers) for name in _LAYERS[family]]
