"""config.json of a GGUF file, from its metadata and the shapes of its tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from anyquant.checkpoint.gguf_file import GGUFFile
from anyquant.checkpoint.gguf_names import SUPPORTED_ARCHITECTURES
from anyquant.checkpoint.gguf_rope import linear_or_yarn, llama3_scaling, longrope
from anyquant.errors import CorruptFileError, InputError, UnknownArchitecture

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def architecture(file: GGUFFile) -> str:
    """Return ``general.architecture``.

    Raises:
        CorruptFileError: the key is missing.
        UnknownArchitecture: not one that this reader knows; the message lists those.
    """
    name = file.get("general.architecture", str)
    if name is None:
        raise CorruptFileError(f"{file.path.name}: has no general.architecture. It is not a language model's file.")
    if name not in SUPPORTED_ARCHITECTURES:
        raise UnknownArchitecture(
            f"{file.path.name}: the architecture {name!r} is not among those read from GGUF "
            f"({', '.join(SUPPORTED_ARCHITECTURES)}). Start from the model's Hugging Face folder."
        )
    return str(name)


def short_float(value: float) -> float:
    """Return the shortest decimal number with the same float32 value (1e-05, not 9.999999747378752e-06)."""
    return float(str(np.float32(value)))


class _Keys:
    """The keys of one architecture, required or not."""

    def __init__(self, file: GGUFFile, arch: str) -> None:
        self.file, self.arch = file, arch

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; a list of equal ones (a value per layer) counts as one."""
        full = f"{self.arch}.{key}"
        value = self.file.get(full, default=default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise InputError(
                f"{self.file.path.name}: {full} differs from layer to layer, which no {self.arch} model of "
                "transformers can express. Start from the model's Hugging Face folder."
            )
        if type(value) is not int or value < 1:
            raise CorruptFileError(f"{self.file.path.name}: {full} is {value!r}, expected a positive integer.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.file.get(f"{self.arch}.{key}", float, default)
        if value is None or not np.isfinite(value):
            raise CorruptFileError(f"{self.file.path.name}: {self.arch}.{key} is {value!r}, expected a number.")
        return short_float(value)

    def rows(self, tensor: str) -> int:
        """Return the first axis' length of a tensor that must be there."""
        if tensor not in self.file.tensors:
            raise CorruptFileError(f"{self.file.path.name}: has no tensor {tensor}.")
        return self.file.tensors[tensor].shape[0]


def synthesize_config(file: GGUFFile) -> dict[str, Any]:
    """Return a config.json for the file's model.

    Raises:
        UnknownArchitecture: see :func:`architecture`.
        CorruptFileError: a key is missing or contradicts the tensors.
        InputError: a setting that transformers' model of this architecture cannot express.
    """
    arch = architecture(file)
    keys = _Keys(file, arch)
    config: dict[str, Any] = {
        "architectures": [_CLASSES[arch]],
        "model_type": arch,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float32",
        "vocab_size": keys.rows("token_embd.weight"),
        **_special_tokens(file),
    }
    config |= _gpt2(keys) if arch == "gpt2" else _rotary(keys)
    return config


def _special_tokens(file: GGUFFile) -> dict[str, int | None]:
    # Said even when absent: the defaults of transformers' config classes are other models' ids.
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {ours: file.get(f"tokenizer.ggml.{theirs}_token_id", int) for ours, theirs in names.items()}


def _gpt2(keys: _Keys) -> dict[str, Any]:
    return {
        "n_ctx": keys.integer("context_length"),
        "n_positions": keys.rows("position_embd.weight"),
        "n_embd": keys.integer("embedding_length"),
        "n_layer": keys.integer("block_count"),
        "n_head": keys.integer("attention.head_count"),
        # llama.cpp's converter writes 4 n_embd as feed_forward_length whatever the model has.
        "n_inner": keys.rows("blk.0.ffn_up.weight"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
    }


def _rotary(keys: _Keys) -> dict[str, Any]:
    arch, file = keys.arch, keys.file
    heads = keys.integer("attention.head_count")
    hidden = keys.integer("embedding_length")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "max_position_embeddings": keys.integer("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": keys.integer("block_count"),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
    }
    head_dim = _head_dim(keys, config)
    rotated = keys.integer("rope.dimension_count", head_dim)
    if rotated != head_dim and arch != "phi3":
        raise InputError(
            f"{file.path.name}: rotates {rotated} of {head_dim} columns of a head, which no {arch} model of "
            "transformers does. Start from the model's Hugging Face folder."
        )
    if arch in ("llama", "qwen3", "gemma", "gemma2"):
        config["head_dim"] = head_dim
    elif head_dim * heads != hidden:
        raise InputError(f"{file.path.name}: {heads} heads of {head_dim} are not the embedding length {hidden}.")
    if arch in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if arch == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if arch == "gemma":
        config["hidden_act"] = "gelu_pytorch_tanh"
    if arch == "gemma2":
        config |= _gemma2(keys, config)
    if arch == "phi3":
        window = file.get("phi3.attention.sliding_window", int, 0)
        config["sliding_window"] = window or None  # 0 stands for none
        if rotated != head_dim:
            config["partial_rotary_factor"] = rotated / head_dim
        config["original_max_position_embeddings"] = keys.integer(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        )
    scaling = (
        llama3_scaling(file, config["rope_theta"], head_dim)
        or longrope(file, arch, config)
        or linear_or_yarn(file, arch)
    )
    if scaling:
        config["rope_scaling"] = scaling
    return config


def _gemma2(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    # The file does not hold the scale of the queries. llama.cpp knows the 27B model by its 46 layers: there it is the
    # width per head, elsewhere the head's dimension.
    large = config["num_hidden_layers"] == 46
    width = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": width if large else config["head_dim"],
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        "sliding_window": keys.integer("attention.sliding_window", 4096),
    }


def _head_dim(keys: _Keys, config: dict[str, Any]) -> int:
    """Return the dimension of a head, as the projections' shapes say, checked against the metadata."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    fused = keys.arch == "phi3"
    rows, parts = (
        (keys.rows("blk.0.attn_qkv.weight"), heads + 2 * kv_heads)
        if fused
        else (keys.rows("blk.0.attn_q.weight"), heads)
    )
    head_dim: int = rows // parts
    said = keys.integer("attention.key_length", head_dim)
    values = keys.integer("attention.value_length", head_dim)
    if rows % parts or head_dim % 2 or said != head_dim or values != head_dim:
        raise CorruptFileError(
            f"{keys.file.path.name}: {rows} rows of queries for {heads} heads (and {kv_heads} of keys) contradict the "
            f"head's dimension ({said} for keys, {values} for values)."
        )
    if not fused and keys.rows("blk.0.attn_k.weight") != kv_heads * head_dim:
        raise CorruptFileError(
            f"{keys.file.path.name}: blk.0.attn_k.weight has {keys.rows('blk.0.attn_k.weight')} rows, "
            f"{kv_heads} heads of {head_dim} need {kv_heads * head_dim}."
        )
    return head_dim
