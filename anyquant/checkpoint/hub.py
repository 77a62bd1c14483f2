"""Hub ids: finding the folder of a model that is on the Hugging Face hub or in its cache."""

from __future__ import annotations

import re
from pathlib import Path

from anyquant.checkpoint.huggingface import INDEX, SINGLE, read_index
from anyquant.errors import InputError, UsageError

_HUB_ID = re.compile(r"[\w][\w.-]*(?:/[\w][\w.-]*)?")
_PATTERNS = ["*.json", "tokenizer*", "*.jinja", "*.model", "*.txt"]


def split_revision(model: str, revision: str | None) -> tuple[str, str | None]:
    """Split "id@revision".

    Raises:
        UsageError: a revision in the id and another one given beside it.
    """
    name, _, inner = model.partition("@")
    if inner and revision and inner != revision:
        raise UsageError(f"{model!r} names revision {inner!r}, but --revision is {revision!r}. Give one of them.")
    return name, inner or revision


def download(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[str, Path]:
    """Return (what to call the model, local folder) for a hub id, downloading what is not in the cache.

    Only configuration and tokenizer files are fetched (and Python files, with trust_remote_code), then the shards
    that the index names, or model.safetensors: not a second copy of the weights under another name or in a
    subfolder. Weights are fetched whole, also for what needs only their headers (inspect, plan). HF_HUB_OFFLINE and
    the other settings of huggingface_hub hold.

    Raises:
        InputError: it is no hub id, or the hub cannot be reached or does not know it.
        CorruptFileError: a damaged index.
    """
    name, revision = split_revision(model, revision)
    neither = f"{model!r} is neither a folder, a .gguf file nor a reachable hub id"
    if not _HUB_ID.fullmatch(name) or name.endswith((".gguf", ".safetensors", ".bin")):
        raise InputError(f"{neither}: there is no such file, and it does not look like 'owner/model'. Check the path.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))

    patterns = [*_PATTERNS, "*.py"] if trust_remote_code else _PATTERNS
    try:
        index = fetch(patterns) / INDEX
        weights = sorted(set(read_index(index).values())) if index.is_file() else [SINGLE]
        folder = fetch([*patterns, *weights])  # all again: should the branch have moved on, everything is of one commit
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{neither} ({type(error).__name__}: {reason}). Check the spelling and the network, log in for gated "
            "models, unset HF_HUB_OFFLINE, or give a folder."
        ) from error
    return (f"{name}@{revision}" if revision else name), folder
