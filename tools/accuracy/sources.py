"""The model that methods and peers are measured on, as float weights that favour no format.

The real model of the tests is published in Q4_1: its weights lie on grids of 16 levels per 32 columns, which any
group-wise 4-bit format finds again. Noise that is uniform over each step of these grids removes them: what results is
a float model, drawn from those that would have been rounded to the published one. It is a worse one: weights move by a
tenth of their mean size, and its perplexity on 3,066 tokens of Wikipedia is 30.9, that of the published model 23.3.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant import ir
from anyquant.checkpoint import Checkpoint, open_checkpoint
from anyquant.checkpoint.gguf import SOURCE_HEADER
from anyquant.errors import InputError, MachineError, UsageError
from anyquant.ir.safetensors_io import Entry, write_safetensors

RECORD = "dither.json"
WEIGHTS = "model.safetensors"
_VERSION = 1

STEPS = {"Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32}
"""ggml types with a uniform step, and for how many columns a step holds: the FP16 at the start of each block."""

Floats = NDArray[np.float32]


def dithered(gguf: Path, folder: Path, seed: int = 0) -> Path:
    """Write a GGUF model as a Hugging Face folder in FP32, with noise of +-half a step on every quantized matrix.

    The embedding is dithered likewise, over its own steps. Tensors that are not quantized stay as they are.

    Args:
        gguf: model whose quantized matrices are in types of :data:`STEPS`.
        folder: to write; used again where it holds the same model with the same noise, intact.
        seed: of the noise, with the tensor's name: it does not depend on the order of the tensors.

    Returns:
        The folder, which anyquant and transformers open.

    Raises:
        UsageError: the folder holds something else.
        InputError: the model cannot be read, or has a matrix in another type.
        MachineError: the disk is full or cannot be written.
    """
    checkpoint = open_checkpoint(str(gguf))
    identity = {"version": _VERSION, "model": checkpoint.fingerprint(), "seed": seed}
    if _is_there(folder, identity):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            part = Path(temporary) / folder.name
            _write(checkpoint, part, seed)
            record = {"identity": identity, "sha256": _sha256(part / WEIGHTS)}
            (part / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)  # ours, by _is_there
            part.replace(folder)
    except OSError as error:
        raise MachineError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def dither(name: str, values: Floats, steps: Floats, seed: int) -> Floats:
    """Values with noise that is uniform over +-half a step.

    Args:
        name: of the tensor; with ``seed`` it determines the noise.
        values: float32 [out, in].
        steps: float32 [out, in / n], each for n columns.
        seed: of all tensors.

    Returns:
        float32 [out, in].
    """
    generator = np.random.default_rng([seed, *hashlib.sha256(name.encode()).digest()])
    noise = generator.random(values.shape, np.float32) - np.float32(0.5)
    noise *= np.repeat(np.abs(steps), values.shape[1] // steps.shape[1], axis=1)
    noise += values
    return noise


def steps_of(tensor: ir.Tensor) -> Floats:
    """Steps of the grids of a tensor in stock blocks, float32 [out, blocks].

    Raises:
        InputError: its type has no uniform step.
    """
    spec = tensor.spec
    if not isinstance(spec, ir.GGMLSpec) or spec.type not in STEPS:
        kind = spec.type if isinstance(spec, ir.GGMLSpec) else type(spec).__name__
        raise InputError(f"{kind} has no uniform step; noise can be added to {', '.join(STEPS)}.")
    blocks = tensor.arrays[".blocks"].reshape(spec.shape[0], spec.shape[1] // STEPS[spec.type], -1)
    return np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)


def _write(checkpoint: Checkpoint, folder: Path, seed: int) -> None:
    checkpoint.write_side_files(folder)
    (folder / SOURCE_HEADER).unlink(missing_ok=True)
    names = list(checkpoint.tensors)
    entries: list[Entry] = [(name, np.dtype("<f4"), checkpoint.tensors[name].shape) for name in names]
    write_safetensors(folder / WEIGHTS, entries, _values(checkpoint, names, seed), {"format": "pt"})


def _values(checkpoint: Checkpoint, names: list[str], seed: int) -> Iterator[Floats]:
    for name in names:
        values = checkpoint.read(name)
        if checkpoint.tensors[name].dtype not in ir.DENSE_DTYPES:
            values = dither(name, values, steps_of(checkpoint.raw(name)), seed)
        yield values


def _is_there(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether the folder holds this model intact; False also where it holds another that was made here.

    Raises:
        UsageError: it holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        found, sha256 = record["identity"], record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{folder} holds no dithered model ({RECORD} is missing or damaged). Name another.") from None
    weights = folder / WEIGHTS
    return bool(found == identity and weights.is_file() and _sha256(weights) == sha256)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
