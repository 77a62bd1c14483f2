"""Quantized models on their way from who makes them to who measures them.

A candidate is a folder: what ``anyquant quantize`` wrote, or values.safetensors, the matrices in FP32 under their
names in the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from accuracy.interface import Floats, Shape
from anyquant import ir
from anyquant.ir.safetensors_io import Entry, SafetensorsReader

_VALUES = "values.safetensors"
_FLOAT = np.dtype("<f4")


def write_values(folder: Path, shapes: dict[str, Shape], values: Iterator[Floats]) -> str:
    """Write matrices one by one, and return the digest of all of them.

    Args:
        folder: new.
        shapes: name -> [out, in].
        values: float32, in the order of ``shapes``.
    """
    sha = hashlib.sha256()

    def each() -> Iterator[Floats]:
        for name, matrix in zip(shapes, values, strict=True):
            sha.update(f"{name} {ir.digest(matrix)}\n".encode())
            yield np.ascontiguousarray(matrix, np.float32)

    folder.mkdir(parents=True)
    entries: list[Entry] = [(name, _FLOAT, shape) for name, shape in shapes.items()]
    ir.write_safetensors(folder / _VALUES, entries, each(), None)
    return sha.hexdigest()


def digest(folder: Path) -> str:
    """A digest of all values of what anyquant wrote: the same for models that compute the same."""
    entries = ir.open_ir(folder).entries
    return hashlib.sha256("".join(f"{n} {e.sha256}\n" for n, e in entries.items()).encode()).hexdigest()


def reader(folder: Path, otherwise: Callable[[str], Floats]) -> Callable[[str], Floats]:
    """A function that gives the values of a tensor by its name.

    Args:
        folder: of the candidate.
        otherwise: gives those that it does not have.
    """
    if (folder / ir.MANIFEST).is_file():
        return ir.open_ir(folder).dequantize
    values = SafetensorsReader(folder / _VALUES)
    return lambda name: np.array(values.read(name)) if name in values.entries else otherwise(name)
