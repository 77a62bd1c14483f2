"""Writing an IR folder: tensor by tensor, under a temporary name, renamed when it is whole and on the disk."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from anyquant.errors import AnyquantError, CorruptFileError, InputError, MachineError, UsageError
from anyquant.ir.container import (
    INDEX,
    SHARD_BYTES,
    Model,
    array_entries,
    config_json,
    index_json,
    open_ir,
    shards,
)
from anyquant.ir.dequantize import tensor_digest
from anyquant.ir.json_io import check_tree
from anyquant.ir.manifest import MANIFEST, Manifest, check_name, manifest_json, parse_manifest
from anyquant.ir.safetensors_io import write_safetensors
from anyquant.ir.tensor import Tensor, as_stored

Progress = Callable[[str, int, int], None]
"""Called with (name, done, all) as work goes on."""


class Loss(NamedTuple):
    """What a quantized tensor lost; see :class:`anyquant.ir.Entry`."""

    error: float
    output_error: float | None = None


def refuse_existing(path: Path) -> None:
    """Refuse to write over what is there, or where a finished folder could not be renamed to.

    Raises:
        UsageError: the path is a link, the current folder or a mount point, or exists and is not an empty folder.
    """
    if path.is_symlink():
        raise UsageError(f"{path} is a symbolic link. Name the folder that is to be made.")
    if not path.exists():
        return
    if not path.is_dir() or any(path.iterdir()):
        raise UsageError(f"{path} exists and is not empty. Choose another -o, or remove it first.")
    if path.is_mount() or path.resolve() == Path.cwd():
        raise UsageError(f"{path} is the current folder or a mount point. Name a new folder in it: {path / 'model'}")


def _refuse_unreadable(model: Model) -> None:
    """Refuse, before any work, what could not be read back as it is."""
    try:
        for name in (*model.entries, *model.aliases):
            check_name(name)
        check_tree(model.source, finite=True)
        check_tree(model.config, finite=False)
    except (ValueError, CorruptFileError) as error:
        raise InputError(
            f"what the model {model.source.get('name')!a:.80} says of itself could not be read back: {error}. "
            "Rename its file or tensor, or repair its config.json."
        ) from error
    try:
        check_tree(json.loads(config_json(model)), finite=False)
        value = json.loads(manifest_json(model, planned=True))
        check_tree(value, finite=True)
        manifest = parse_manifest(value)
    except (TypeError, ValueError, RecursionError, CorruptFileError) as error:
        raise AnyquantError(f"the description of the model could not be read back: {error}") from error
    for field in Manifest.__dataclass_fields__:
        if field != "entries" and getattr(manifest, field) != getattr(model, field):
            raise AnyquantError(
                f"{field} would not come back from JSON as it is: {getattr(model, field)!r:.200}. "
                "Use lists instead of tuples, and strings as keys."
            )


def sync(path: Path) -> None:
    """Wait until a file, or the list of names that a folder is, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def _publish(temporary: Path, path: Path) -> None:
    """Give a whole folder its name; after a power cut it is there as a whole or not at all."""
    for file in temporary.rglob("*"):
        if not file.is_symlink():
            sync(file)
    sync(temporary)
    temporary.rename(path)  # replaces an empty folder
    sync(path.parent)


def write_ir(
    path: str | Path,
    model: Model,
    quantize: Callable[[str], tuple[Tensor, Loss | None]],
    write_side_files: Callable[[Path], None] | None = None,
    *,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Model:
    """Write the folder that ``model``, a plan, describes, and open it.

    Args:
        path: the folder to make; must not exist, or be empty.
        model: the description; its entries give the order and the specs.
        quantize: name -> (tensor of the promised spec, what it lost), called once per name in order.
        write_side_files: writes tokenizer and other files into the folder it is given.
        progress: called after each tensor.
        shard_bytes: most bytes of tensors in one safetensors file.

    Raises:
        UsageError: the folder exists and is not empty.
        MachineError: the disk is full. Nothing is left under the final name.
        InputError: a name or the config of the source could not be read back.
        AnyquantError: the rest of the description could not, or a tensor is not what was promised.
    """
    path = Path(os.path.abspath(path))
    refuse_existing(path)
    _refuse_unreadable(model)
    temporary = path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise MachineError(f"cannot make a folder in {path.parent}: {error.strerror or error}") from error
    try:
        if write_side_files:
            write_side_files(temporary)
        _write_files(temporary, model, quantize, progress, shard_bytes)
        try:
            _publish(temporary, path)
        except OSError as error:
            raise MachineError(f"cannot write {path}: {error.strerror or error}. Nothing was left there.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_ir(path)


def _write_files(
    folder: Path,
    model: Model,
    quantize: Callable[[str], tuple[Tensor, Loss | None]],
    progress: Progress | None,
    shard_bytes: int,
) -> None:
    done = dict(model.entries)
    count = 0

    def arrays(names: list[str]) -> Iterator[np.ndarray]:
        nonlocal count
        for name in names:
            tensor, loss = quantize(name)
            entry = model.entries[name]
            if tensor.spec != entry.spec:
                raise AnyquantError(f"{name}: became {tensor.spec}, promised was {entry.spec}")
            tensor.check(name)
            done[name] = replace(entry, sha256=tensor_digest(tensor), **(loss._asdict() if loss else {}))
            for suffix, (dtype, _) in entry.spec.arrays().items():
                yield as_stored(tensor.arrays[suffix], dtype)
            count += 1
            if progress:
                progress(name, count, len(done))

    files = shards(model.entries, shard_bytes)
    for file in (*files, INDEX, MANIFEST):
        if (folder / file).exists():
            raise AnyquantError(f"{file} is among the side files, but is a name that the format itself uses")
    for file, names in files.items():
        entries = array_entries({name: model.entries[name] for name in names})
        write_safetensors(folder / file, entries, arrays(names), {"format": "anyquant"})
    finished = replace(model, entries=done)
    texts = {"config.json": config_json(finished), MANIFEST: manifest_json(finished)}
    if len(files) > 1:
        texts[INDEX] = index_json(done, files)
    for file, text in texts.items():
        try:
            (folder / file).write_bytes(text.encode())
        except OSError as error:
            raise MachineError(f"cannot write {file} in {folder.parent}: {error.strerror or error}") from error
