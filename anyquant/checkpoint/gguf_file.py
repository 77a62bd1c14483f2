"""A GGUF file as a checkpoint: its header, checked against the tensor types that gguf knows, and a memory map."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anyquant.errors import InputError, MissingDependency
from anyquant.gguf_container import map_file, opening, padded, parse


def ggml_types() -> dict[int, tuple[str, int, int]]:
    """Return type number -> (name, elements per block, bytes per block), as the gguf package knows them.

    Raises:
        MissingDependency: the gguf package is not installed.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise MissingDependency("gguf", "gguf", "reading a GGUF file") from error
    return {int(t): (t.name, *GGML_QUANT_SIZES[t]) for t in GGML_QUANT_SIZES}


class GGUFFile:
    """A GGUF file whose header was read and checked.

    Attributes:
        path: the file.
        header: key-values, and tensors as the header describes them.
        get: decodes a key-value, see :meth:`anyquant.gguf_container.Header.get`.
        tensors: GGUF name -> where it is stored, in file order.
    """

    def __init__(self, path: Path) -> None:
        """Parse and check the header.

        Raises:
            CorruptFileError: truncated, or the header contradicts itself or the file's size.
            InputError: big-endian, version 1, one part of a split file, or a tensor type that gguf does not know.
            MissingDependency: the gguf package is not installed.
        """
        types = ggml_types()
        self.path = path
        data = map_file(path)
        self.header = parse(data, path.name)
        self.get = self.header.get
        parts = self.get("split.count", int, 0)
        if parts > 1:
            raise InputError(
                f"{path.name}: is one part of {parts}. Join them first: llama-gguf-split --merge FIRST_PART OUTPUT."
            )
        for name, tensor in self.header.tensors.items():
            if tensor.type_id not in types:
                raise InputError(
                    f"{path.name}: {name} has the tensor type {tensor.type_id}, which the installed gguf package does "
                    "not know: a private type of a fork, or a newer one. Upgrade gguf, or start from a file in a "
                    "stock type."
                )
        self.tensors = self.header.stored(types)
        self._data: np.ndarray = np.frombuffer(data, np.uint8)

    def blocks(self, name: str) -> np.ndarray:
        """Return a read-only uint8 view [..., row bytes] of a tensor's data."""
        t = self.tensors[name]
        flat = self._data[t.offset : t.offset + t.nbytes]
        return flat.reshape(*t.shape[:-1], t.shape[-1] // t.block * t.block_bytes)

    def header_only(self) -> bytes:
        """Return a GGUF file that has every key-value of this one, byte for byte, and no tensors."""
        content = opening(self.header.values, 0)
        return content.ljust(padded(len(content), self.header.alignment), b"\0")
