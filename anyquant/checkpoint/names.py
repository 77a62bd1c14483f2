"""What a tensor is, told from its Hugging Face name: matrix, embedding, head, router; and the order of tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

from anyquant.checkpoint.protocol import TensorInfo

_LAYER = re.compile(r"(?P<stack>.*?\b(?:layers|layer|h|blocks|block)\.)(?P<index>\d+)\.(?P<rest>.+)")
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|tokens_embed|token_embedding|embeddings)\.weight$"
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")
_POSITION = re.compile(r"(?:^|\.)(?:wpe|embed_positions|position_embeddings|positions_embed|relative_attention_bias)\.")
_ROUTER = re.compile(r"\.(?:gate|router|gate_inp|shared_expert_gate|router\.(?:layer|classifier))\.weight$")
_NORM = re.compile(r"(?:norm|layernorm|ln_\w+|ln)\.weight$")
_OTHER_HEADS = re.compile(r"(?:^|\.)(?:score|classifier|value_head|v_head)\.")
_BUFFER = re.compile(r"(?:^|\.)(?:(?:attn|attention)\.(?:bias|masked_bias)|rotary_emb\.\w+|position_ids|inv_freq)$")

# Order of modules as in the state_dict of the common families; what is not listed follows, in natural order.
_MODULES = """
wte word_embeddings embed_tokens embed_in wpe embed_positions
ln_1 self_attn attn attention q_proj k_proj v_proj o_proj qkv_proj q_norm k_norm c_attn
ln_2 block_sparse_moe mlp feed_forward gate experts gate_proj up_proj gate_up_proj down_proj c_fc c_proj
input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm
weight bias
"""
_ORDER = {name: rank for rank, name in enumerate(_MODULES.split())}
_UNLISTED = len(_ORDER)

Key = tuple[object, ...]


def _natural(text: str) -> Key:
    """Make "layer.10" follow "layer.9"."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part)


def _modules(text: str) -> Key:
    return tuple((_ORDER.get(part, _UNLISTED), _natural(part)) for part in text.split("."))


def order_key(name: str) -> Key:
    """Sort key: embeddings, layers in numeric order, what remains (final norm), output head."""
    if match := _LAYER.fullmatch(name):
        return (1, _natural(match["stack"]), int(match["index"]), _modules(match["rest"]))
    if _EMBEDDING.search(name) or _POSITION.search(name):
        return (0, (), 0, _modules(name))
    last = 3 if _HEAD.search(name) or name.startswith(("lm_head.", "embed_out.")) else 2
    return (last, (), 0, _modules(name))


def layer_of(name: str) -> tuple[str, int, str] | None:
    """Split a name into what comes before the number of its layer, the number, and what follows; None outside."""
    match = _LAYER.fullmatch(name)
    return (match["stack"], int(match["index"]), match["rest"]) if match else None


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether old checkpoints store this although it is a constant (causal masks, rotary tables)."""
    return _BUFFER.search(name) is not None and not (name.endswith(".bias") and len(shape) < 3)


def is_stacked_experts(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a stored tensor holds one matrix per expert."""
    return len(shape) == 3 and "experts" in name and "bias" not in name.rpartition(".")[2]


def is_token_embedding(name: str) -> bool:
    """Say whether this is the token embedding."""
    return _EMBEDDING.search(name) is not None and _LAYER.fullmatch(name) is None


def is_head(name: str) -> bool:
    """Say whether this is the output head of a language model."""
    return _HEAD.search(name) is not None


def is_matrix(info: TensorInfo) -> bool:
    """Say whether this is the weight of a linear layer that is quantized by default."""
    if len(info.shape) != 2:
        return False
    if "#" in info.name:
        return True
    if not info.name.endswith(".weight") or is_token_embedding(info.name) or is_head(info.name):
        return False
    return not any(p.search(info.name) for p in (_POSITION, _ROUTER, _NORM, _OTHER_HEADS))


def embeddings(infos: Iterable[TensorInfo]) -> list[str]:
    """Name the token embedding and the output head among the stored tensors."""
    return [i.name for i in infos if len(i.shape) == 2 and (is_token_embedding(i.name) or is_head(i.name))]
