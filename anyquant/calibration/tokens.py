"""Windows of token ids from a text file or a dataset."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant.calibration.settings import CalibrationSettings
from anyquant.checkpoint import Checkpoint
from anyquant.errors import AnyquantError, InputError, MissingDependency, UsageError
from anyquant.validation import texts

_SHUFFLED = 1000
"""Rows of a dataset that are read ahead and drawn from: a stream has no other random order."""


@dataclass(frozen=True)
class Tokens:
    """What a calibration runs on.

    Attributes:
        ids: int64 [windows, window].
        notes: what is to be said of them.
    """

    ids: NDArray[np.int64]
    notes: list[str]


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer that goes with a checkpoint, by way of a temporary folder; of its own code if that is trusted.

    Raises:
        InputError: there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="anyquant-") as folder:
        checkpoint.write_side_files(Path(folder))
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=checkpoint.code_folder() is not None)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(
                f"{checkpoint.name}: transformers cannot load its tokenizer, by which texts are cut "
                f"({type(error).__name__}). Put tokenizer.json and tokenizer_config.json beside the weights."
            ) from error


def require_context(checkpoint: Checkpoint, settings: CalibrationSettings) -> None:
    """Refuse windows longer than what the model was made for.

    Raises:
        UsageError: with both numbers.
    """
    context = texts.context_length(checkpoint.config)
    if context is not None and settings.window > context:
        raise UsageError(
            f"a calibration window of {settings.window:,} tokens is longer than the context of {checkpoint.name}, "
            f"{context:,}. Choose at most that."
        )


def from_text(tokenizer: Any, settings: CalibrationSettings) -> Tokens:
    """Windows drawn from a UTF-8 text file, in the order of the text.

    Raises:
        InputError: the file cannot be read, or is shorter than one window.
    """
    path = Path(settings.source)
    return _cut(texts.token_ids(tokenizer, texts.read_text(path)), tokenizer, settings, path.name)


def from_dataset(tokenizer: Any, settings: CalibrationSettings) -> Tokens:
    """Windows from the column "text" of a dataset's split "train", read as a stream.

    A row gives at most one window, from a place drawn at random, so that long rows do not crowd out others.

    Raises:
        MissingDependency: the package datasets is not installed.
        InputError: the dataset cannot be reached, has no such column, or is shorter than one window.
    """
    try:
        datasets: Any = import_module("datasets")
    except ImportError:
        raise MissingDependency("datasets", "datasets", "a dataset as calibration text") from None
    name, _, configuration = settings.source.partition(":")
    leading = texts.leading_token(tokenizer)
    body = settings.window - (leading is not None)
    rng = np.random.default_rng(settings.seed)
    ids: list[int] = []
    try:
        stream = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        for text in _texts(stream.shuffle(seed=settings.seed, buffer_size=_SHUFFLED), settings.source):
            row = texts.token_ids(tokenizer, f"{text}\n\n")
            start = int(rng.integers(max(1, len(row) - body + 1)))
            ids += row[start : start + body]
            if len(ids) >= settings.windows * body:
                break
    except AnyquantError:
        raise
    except Exception as error:  # the package lets through whatever its readers and the network raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the dataset {settings.source!r} cannot be read ({type(error).__name__}: {reason}). Check the spelling "
            "('owner/name', or 'owner/name:configuration'), the network and HF_HUB_OFFLINE, or give a text file."
        ) from error
    return _cut(ids, tokenizer, settings, f"the dataset {settings.source}")


def _texts(rows: Any, source: str) -> Iterator[str]:
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise InputError(
                f"the dataset {source!r} has no column 'text' of strings, but {', '.join(sorted(row))}. Save the "
                "column that holds the text as a file, and give that."
            )
        yield row["text"]


def _cut(ids: list[int], tokenizer: Any, settings: CalibrationSettings, name: str) -> Tokens:
    found = texts.cut_windows(
        ids, settings.window, settings.windows, seed=settings.seed, leading=texts.leading_token(tokenizer), name=name
    )
    count = len(found.ids)
    if count == settings.windows:
        return Tokens(found.ids, [])
    note = (
        f"{name} has {found.tokens:,} tokens, enough for {count} of the {settings.windows} windows of "
        f"{settings.window} that were asked for"
    )
    return Tokens(found.ids, [note])
