"""What both readers share: float32 reading with the finite check, fingerprint, classes of tensors."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from anyquant import ir
from anyquant.checkpoint import names
from anyquant.checkpoint.finite import is_finite, raise_nonfinite
from anyquant.checkpoint.protocol import TensorInfo

_HASH_FULLY = 1 << 30
_SAMPLES = 4096
_PAGE = 4096

Rows = slice | None


class BaseCheckpoint(ABC):
    """A reader; subclasses fill the attributes of the Checkpoint protocol and say how values are read."""

    kind: str
    name: str
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    transposed: frozenset[str]

    @abstractmethod
    def _values(self, name: str, rows: Rows) -> np.ndarray:
        """Return new float32 values in C order and IR orientation, unchecked."""

    @abstractmethod
    def _stored(self, name: str) -> ir.Tensor:
        """Return the tensor as stored, in IR orientation, unchecked."""

    @abstractmethod
    def spec(self, name: str) -> ir.Spec:
        """Return the form of ``raw(name)``, from the header alone."""

    @abstractmethod
    def side_files(self) -> dict[str, Path]:
        """Return the side files that exist already; see the protocol."""

    def code_folder(self) -> Path | None:
        """Return where trusted code lies; see the protocol. Without trust it is no side file."""
        return next((path.parent for path in self.side_files().values() if path.suffix == ".py"), None)

    @abstractmethod
    def _where(self, name: str) -> str:
        """Return the name of the file that holds a tensor."""

    @abstractmethod
    def _files(self) -> list[Path]:
        """Return the files that hold weights."""

    @abstractmethod
    def write_side_files(self, folder: Path) -> None:
        """Write config, tokenizer and generation settings into a folder."""

    def _resolve(self, name: str) -> str:
        name = self.aliases.get(name, name)
        if name not in self.tensors:
            raise KeyError(f"{self.name} has no tensor {name!r}")
        return name

    def read(self, name: str, rows: Rows = None) -> np.ndarray:
        """Return float32 values, all or a slice of rows; see the protocol. Aliases are followed."""
        name = self._resolve(name)
        values = self._values(name, rows)
        if not is_finite(values):
            self._refuse(name, self._values)
        return values

    def raw(self, name: str) -> ir.Tensor:
        """Return the tensor as stored; see the protocol. Aliases are followed."""
        name = self._resolve(name)
        for rows in ir.row_chunks(self.tensors[name].shape):
            if not is_finite(self._values(name, rows)):
                self._refuse(name, self._values)
        return self._stored(name)

    def _refuse(self, name: str, values: Callable[[str, Rows], np.ndarray]) -> None:
        shape = self.tensors[name].shape
        raise_nonfinite(name, shape, (values(name, rows) for rows in ir.row_chunks(shape)), self._where(name))

    def matrices(self) -> list[str]:
        """Name the weights of linear layers, in checkpoint order."""
        return [info.name for info in self.tensors.values() if names.is_matrix(info)]

    def embeddings(self) -> list[str]:
        """Name the token embedding and the output head, if stored."""
        return names.embeddings(self.tensors.values())

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) over config, names, shapes, dtypes, aliases and file contents, read once.

        Files up to 1 GiB are hashed whole. Of a larger file the size, the first MiB (header) and 4096 evenly
        spaced pages of 4 KiB, the last page among them, are hashed: enough to tell checkpoints apart, not a proof
        against someone who edits a file on purpose.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        sha = hashlib.sha256()
        head = {
            "config": self.config,
            "tensors": [[t.name, list(t.shape), t.dtype] for t in self.tensors.values()],
            "aliases": self.aliases,
        }
        sha.update(json.dumps(head, sort_keys=True, default=str).encode())
        for path in self._files():
            sha.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
            for block in _contents(path):
                sha.update(block)
        return sha.hexdigest()


def _contents(path: Path, hash_fully: int = _HASH_FULLY) -> Iterator[bytes]:
    """Yield what the fingerprint covers of a file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= hash_fully:
            while block := file.read(1 << 20):
                yield block
            return
        yield file.read(1 << 20)
        for i in range(_SAMPLES):
            file.seek((size - _PAGE) * i // (_SAMPLES - 1))
            yield file.read(_PAGE)
