"""Readers of checkpoints: Hugging Face folders, hub ids and GGUF files, one tensor at a time.

Importing this package imports neither torch nor transformers nor gguf.
"""

from __future__ import annotations

from pathlib import Path

from anyquant.checkpoint.protocol import Checkpoint, TensorInfo
from anyquant.errors import InputError

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]


def open_checkpoint(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """Open a model for reading; only headers are read, though a hub id is first downloaded with its weights.

    Args:
        model: a folder with config.json and safetensors, a .gguf file, or a hub id ("owner/model", also
            "owner/model@revision").
        revision: branch, tag or commit of a hub id.
        trust_remote_code: keep a model's Python files among its side files, and let what runs the model run them.
            Nothing of a model is ever run here.

    Raises:
        InputError: not a model, or one that cannot be read (see its subclasses).
        UsageError: two revisions were given.
        MissingDependency: the gguf package is needed.
    """
    path = Path(model)
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise InputError(f"{model!r:.200} is not a usable path or hub id: {error}.") from error
    if is_dir:
        from anyquant.checkpoint.huggingface import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path, path.resolve().name, trust_remote_code=trust_remote_code)
    if is_file:
        if path.suffix == ".safetensors":
            raise InputError(f"{path.name}: give the folder that holds it, together with config.json.")
        with path.open("rb") as file:
            gguf = path.suffix == ".gguf" or file.read(4) == b"GGUF"
        if not gguf:
            raise InputError(f"{path.name}: is a file, but no GGUF. Give a model's folder, a .gguf file or a hub id.")
        from anyquant.checkpoint.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    from anyquant.checkpoint.hub import download
    from anyquant.checkpoint.huggingface import HuggingFaceCheckpoint

    name, folder = download(model, revision=revision, trust_remote_code=trust_remote_code)
    return HuggingFaceCheckpoint(folder, name, trust_remote_code=trust_remote_code)
