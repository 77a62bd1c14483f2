"""Whether a model family ties its embeddings when config.json does not say."""

from __future__ import annotations

# The defaults of transformers' config classes, for the families that are met most.
_TIES = """
bloom cohere cohere2 falcon gemma gemma2 gemma3 gemma3_text gpt2 gpt_bigcode gpt_neo mamba mpt openai-gpt opt
smollm3 starcoder2
"""
_TIES_NOT = """
gpt_neox gpt_oss gptj granite llama llama4_text mistral mixtral olmo olmo2 phi phi3 phimoe qwen2 qwen2_moe qwen3
qwen3_moe stablelm
"""
_TIED, _UNTIED = frozenset(_TIES.split()), frozenset(_TIES_NOT.split())


def ties_by_default(model_type: str) -> bool:
    """Return the default of ``tie_word_embeddings`` for a transformers ``model_type``.

    Families that are not in the tables are looked up in transformers, which is imported for that; unknown ones
    (remote code) count as not tied.
    """
    if model_type in _TIED or model_type in _UNTIED:
        return model_type in _TIED
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return False
    return bool(getattr(CONFIG_MAPPING[model_type](), "tie_word_embeddings", False))
