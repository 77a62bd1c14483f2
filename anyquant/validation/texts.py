"""From a text file to windows of token ids, the same for every runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant.errors import InputError, MissingDependency

RELIABLE_WINDOW = 512
"""Tokens a window needs for the bootstrap over windows to be meaningful."""
_FEW_WINDOWS = 8
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")


def read_text(path: Path) -> str:
    """A UTF-8 file.

    Raises:
        InputError: missing, unreadable, or not UTF-8 (with the position).
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte {error.start} cannot be decoded. Convert it, for instance with "
            f"iconv -f latin1 -t utf-8"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read the text {path}: {error.strerror or error}") from None


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies in a model's folder.

    Raises:
        InputError: the folder holds none that transformers can load.
        MissingDependency: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingDependency("transformers", "", "validate") from None
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise InputError(
            f"no tokenizer can be loaded from {folder}: {reason[0] if reason else type(error).__name__}. "
            "validate needs the tokenizer files that quantize puts there (tokenizer.json, tokenizer_config.json)."
        ) from None


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens added."""
    return [int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def leading_token(tokenizer: Any) -> int | None:
    """The token that this tokenizer itself puts before a text (BOS), None if it puts none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a", verbose=False)["input_ids"]
    return int(bos) if bos is not None and len(ids) and ids[0] == bos else None


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens the model was made for, from config.json (of the text part, if it has several)."""
    for part in (config, config.get("text_config") or {}):
        for key in _CONTEXT_KEYS:
            value = part.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return None


@dataclass(frozen=True)
class Windows:
    """Windows of equal length, none overlapping another.

    Attributes:
        ids: [windows, length] int64.
        tokens: in the whole text.
        available: windows the whole text has.
        leading: the token put before each window, if any; part of ``length``.
    """

    ids: NDArray[np.int64]
    tokens: int
    available: int
    leading: int | None


def cut_windows(
    ids: Sequence[int], length: int, count: int, *, seed: int = 0, leading: int | None = None, name: str = "the text"
) -> Windows:
    """Cut a text into windows and draw some.

    Args:
        ids: of the whole text.
        length: tokens per window, with the leading one.
        count: windows wanted; where the text has more, they are drawn at random and kept in order.
        seed: of the draw.
        leading: put before each window.
        name: of the text, for messages.

    Raises:
        InputError: the text is shorter than one window.
    """
    body = length - (leading is not None)
    available = len(ids) // body
    if not available:
        raise InputError(
            f"{name} has {len(ids):,} tokens, but one window needs {body:,}. "
            f"Give a text of at least {body:,} tokens (better {body * 16:,}), or a smaller window."
        )
    chosen = np.arange(available)
    if available > count:
        chosen = np.sort(np.random.default_rng(seed).choice(available, size=count, replace=False))
    table = np.asarray(ids[: available * body], dtype=np.int64).reshape(available, body)[chosen]
    if leading is not None:
        table = np.concatenate([np.full((len(table), 1), leading, dtype=np.int64), table], axis=1)
    return Windows(np.ascontiguousarray(table), len(ids), available, leading)


def cut_text(
    path: Path, tokenizer: Any, config: Mapping[str, Any], *, window: int, windows: int, seed: int
) -> tuple[Windows, list[str]]:
    """The windows of a text file that a model is measured on.

    Args:
        path: UTF-8 file.
        tokenizer: of the model.
        config: of the model; its context cuts ``window``.
        window: tokens in each.
        windows: at most this many.
        seed: of the draw, where the text has more.

    Returns:
        The windows, and notes: how far errors from them can be trusted.

    Raises:
        InputError: the text cannot be read, or is shorter than one window.
    """
    length = min(window, context_length(config) or window)
    ids, leading = token_ids(tokenizer, read_text(path)), leading_token(tokenizer)
    found = cut_windows(ids, length, windows, seed=seed, leading=leading, name=str(path))
    notes, count = [], len(found.ids)
    if length < RELIABLE_WINDOW:
        notes.append(
            f"Windows have {length} tokens: neighbours depend on each other, and errors from windows of fewer than "
            f"{RELIABLE_WINDOW} tokens are too small."
        )
    if count == 1:
        notes.append("There is a single window, so that no error can be given. Use more windows, or a longer text.")
    elif count < _FEW_WINDOWS:
        notes.append(f"Errors from {count} windows are rough. Use more windows, or a longer text.")
    return found, notes


def chat_text(tokenizer: Any, prompt: str) -> str | None:
    """A prompt through the chat template; None where the tokenizer has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turn = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt through the chat template; as plain text where the tokenizer has none."""
    text = chat_text(tokenizer, prompt)
    if text is not None:
        return token_ids(tokenizer, text)
    leading = leading_token(tokenizer)
    return ([] if leading is None else [leading]) + token_ids(tokenizer, prompt)


def stop_ids(tokenizer: Any, generation_config: Mapping[str, Any]) -> set[int]:
    """Tokens that end an answer: the tokenizer's and those of generation_config.json."""
    found: set[int] = set()
    for value in (getattr(tokenizer, "eos_token_id", None), generation_config.get("eos_token_id")):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int):
                found.add(item)
    return found


def decode(tokenizer: Any, ids: Sequence[int], stops: set[int]) -> str:
    """The text of ids, up to the first that ends an answer."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return str(tokenizer.decode(list(ids[:end]), skip_special_tokens=False))
