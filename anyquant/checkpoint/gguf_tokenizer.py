"""Tokenizer files of a GGUF model, made by transformers from the file's key-values."""

from __future__ import annotations

import logging
from pathlib import Path

from anyquant.checkpoint.gguf_file import GGUFFile
from anyquant.errors import InputError

log = logging.getLogger(__name__)


def write_tokenizer(folder: Path, header: str, name: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template into a folder.

    Args:
        folder: holds the GGUF file ``header`` and gets the files.
        header: name of a GGUF file with the tokenizer's key-values (it needs no tensors).
        name: of the source, for messages.

    Raises:
        InputError: the file describes a tokenizer that transformers cannot build.
    """
    kind = GGUFFile(folder / header).get("tokenizer.ggml.model", str)
    if kind in (None, "none", "no_vocab"):
        log.warning("%s: holds no tokenizer; texts can be used only with tokenizer files put beside the model", name)
        return
    # Not AutoTokenizer: it parses the whole file once more to guess a class, and does not know the first Gemma. The
    # class for any tokenizer.json encodes the same.
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=header)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # transformers raises whatever its converters run into
        raise InputError(
            f"{name}: transformers cannot build a tokenizer from its key-values (kind {kind!r}): "
            f"{type(error).__name__}: {error}. Start from the model's Hugging Face folder."
        ) from error
