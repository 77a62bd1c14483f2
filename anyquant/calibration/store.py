"""The folder of a calibration: tokens, moments, gradients, and what they were made from.

    about.json                  identity, versions, threads; once complete also notes, fingerprint and index
    tokens.safetensors          ids: uint32 [windows, window]
    moments-0000.safetensors    of each block, for each distinct input k: "k.diagonal" F32 [in] and, unless only norms
                                were recorded, "k.moment", the upper triangle of the mean of x x^T row by row,
                                F32 [in * (in + 1) / 2]
    gradients-0000.safetensors  of each block, under the names of its matrices: F32 [out, in] (fisher) or [out]; and
                                name + ".guided", F32 [groups, in * (in + 1) / 2], where groups were asked for

The number after the last block's is that of everything outside of the blocks (output head, embeddings). Every file
appears under its name only when it is whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant.errors import CorruptFileError, InputError
from anyquant.ir import read_json
from anyquant.ir.safetensors_io import SafetensorsReader

FORMAT = 2
ABOUT = "about.json"
TOKENS = "tokens.safetensors"
GUIDED = ".guided"
"""Suffix of a matrix' name: its moments by group of rows."""

_FIELDS: dict[str, type] = {"complete": bool, "identity": dict, "versions": dict, "threads": int}
_RESULTS: dict[str, type] = {"tokens": int, "notes": list, "fingerprint": str, "inputs": list, "gradients": dict}

Floats = NDArray[np.float32]


def moments_file(section: int) -> str:
    """Name of the file with the second moments of a block."""
    return f"moments-{section:04}.safetensors"


def gradients_file(section: int) -> str:
    """Name of the file with the gradients of a block."""
    return f"gradients-{section:04}.safetensors"


@dataclass(frozen=True)
class Moment:
    """What was summed over one input.

    Attributes:
        names: the matrices that read it.
        tokens: seen.
        diagonal: float32 [in], mean of x_j^2.
        triangle: float32 [in * (in + 1) / 2], the upper triangle of the mean of x x^T, row by row; None where the
            diagonal is all that was recorded.
    """

    names: tuple[str, ...]
    tokens: int
    diagonal: Floats
    triangle: Floats | None


@dataclass(frozen=True)
class MatrixStatistics:
    """What is known of the input of one matrix, and of its gradient.

    Attributes:
        tokens: that it saw; of an expert, those routed to it.
        diagonal: float32 [in], mean over these tokens of x_j^2.
    """

    tokens: int
    diagonal: Floats
    _moment: tuple[Path, str] | Floats | None = field(repr=False)
    _gradient: tuple[Path, str] | Floats | None = field(default=None, repr=False)

    @classmethod
    def of(cls, moment: Floats, gradients: Floats | None = None, tokens: int = 1) -> MatrixStatistics:
        """Statistics from elsewhere, all in memory.

        Args:
            moment: float32 [in, in], the mean of x x^T; or [in], its diagonal, where inputs are independent.
            gradients: float32 [out], the mean of g_i^2, or [out, in], that of g_i^2 x_j^2.
            tokens: seen.
        """
        full = np.diag(moment) if moment.ndim == 1 else moment
        triangle = np.concatenate([full[row, row:] for row in range(len(full))])
        return cls(tokens, np.diag(full).copy(), triangle, gradients)

    @property
    def has_moment(self) -> bool:
        """Whether there is more than the diagonal."""
        return self._moment is not None

    def full(self) -> Floats:
        """Mean over the tokens of x x^T, float32 [in, in], symmetric; made anew, or read, at every call.

        Raises:
            CorruptFileError: the file was damaged.
            InputError: the file is gone, or the calibration recorded norms alone.
        """
        if self._moment is None:
            raise InputError(
                "the calibration recorded the norms of inputs, not how they go together; calibrate with --importance "
                "activation or gradient"
            )
        triangle = read_array(*self._moment) if isinstance(self._moment, tuple) else self._moment
        where = ": ".join(map(str, self._moment)) if isinstance(self._moment, tuple) else "a moment"
        return _square(triangle, len(self.diagonal), where)

    def guided(self) -> Floats | None:
        """Mean over all tokens of g^2 x x^T, float32 [groups, in, in]; None where it was not recorded.

        Each is of one of the groups of rows that ``np.array_split`` makes, with g^2 the mean over the group.

        Raises:
            CorruptFileError: the file was damaged.
            InputError: the file is gone.
        """
        if not isinstance(self._gradient, tuple):
            return None
        path, name = self._gradient
        if name + GUIDED not in SafetensorsReader(path).entries:
            return None
        triangles = read_array(path, name + GUIDED)
        return np.stack([_square(each, len(self.diagonal), f"{path}: {name}{GUIDED}") for each in triangles])

    def fisher(self) -> Floats | None:
        """Mean over all tokens of g_i^2 x_j^2, float32 [out, in]; None where it was not recorded.

        Raises:
            CorruptFileError: the file was damaged.
            InputError: the file is gone.
        """
        found = self._recorded()
        return found if found is not None and found.ndim == 2 else None

    def gradient(self) -> Floats | None:
        """Mean over all tokens of g_i^2, float32 [out]; None where it was not recorded.

        Raises:
            CorruptFileError: the file was damaged.
            InputError: the file is gone.
        """
        found = self._recorded()
        return found if found is not None and found.ndim == 1 else None

    def _recorded(self) -> Floats | None:
        return read_array(*self._gradient) if isinstance(self._gradient, tuple) else self._gradient


def _square(triangle: Floats, n: int, where: str) -> Floats:
    """The symmetric [n, n] of an upper triangle, row by row."""
    if triangle.shape != (n * (n + 1) // 2,):
        raise CorruptFileError(f"{where} has not the size of {n} columns")
    result = np.empty((n, n), np.float32)
    at = 0
    for i in range(n):
        row = triangle[at : at + n - i]
        result[i, i:] = row
        result[i:, i] = row
        at += n - i
    return result


def read_array(path: Path, key: str) -> np.ndarray:
    """An array of a file.

    Raises:
        CorruptFileError: it is not there, or the file was damaged.
        InputError: the file is gone.
    """
    reader = SafetensorsReader(path)
    if key not in reader.entries:
        raise CorruptFileError(f"{path}: holds no {key}; calibrate again into an empty folder")
    return reader.read(key)


class Statistics:
    """A complete calibration.

    Attributes:
        identity: JSON of what determines the result: settings, model, matrices.
        fingerprint: SHA-256 (hex) over the tokens and all that was recorded.
        threads: of torch, with which it was computed.
        tokens: in all windows.
        notes: what a user should know: fewer windows than wanted, dead columns, experts without tokens.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        """Take the content of about.json; :func:`open_statistics` checks it."""
        self._folder = folder
        self.identity: dict[str, Any] = about["identity"]
        self.fingerprint: str = about["fingerprint"]
        self.threads: int = about["threads"]
        self.tokens: int = about["tokens"]
        self.notes: list[str] = about["notes"]
        self._index: list[dict[str, Any]] = about["inputs"]
        self._inputs = {name: entry for entry in self._index for name in entry["names"]}
        self._gradients: dict[str, str] = about["gradients"]

    @property
    def norms_alone(self) -> bool:
        """Whether of all moments only the diagonals were recorded."""
        return bool(self.identity.get("importance") == "norms")

    def has_gradient(self, name: str) -> bool:
        """Whether a gradient was recorded: not of an expert that saw no token, nor of an embedding that is no head."""
        return name in self._gradients

    def matrix(self, name: str) -> MatrixStatistics | None:
        """What is known of a matrix; None if nothing is (an expert that saw no token, a matrix that was not asked for).

        Raises:
            CorruptFileError: a file was damaged.
            InputError: a file is gone.
        """
        entry = self._inputs.get(name)
        if entry is None:
            return None
        path, key = self._folder / entry["file"], entry["key"]
        diagonal = read_array(path, f"{key}.diagonal")
        moment = None if self.norms_alone else (path, f"{key}.moment")
        return MatrixStatistics(entry["tokens"], diagonal, moment, self._gradient(name))

    def with_moment(self, name: str, moment: Moment) -> MatrixStatistics:
        """What is known of a matrix, but with another moment of its input, which stays in memory."""
        return MatrixStatistics(moment.tokens, moment.diagonal, moment.triangle, self._gradient(name))

    def groups(self) -> list[list[str]]:
        """The matrices that read the same input, each group in the order in which the model called it first."""
        return [list(entry["names"]) for entry in self._index]

    def ids(self) -> NDArray[np.int64]:
        """The tokens int64 [windows, window].

        Raises:
            CorruptFileError: the file was damaged.
            InputError: the file is gone.
        """
        return read_array(self._folder / TOKENS, "ids").astype(np.int64)

    def _gradient(self, name: str) -> tuple[Path, str] | None:
        file = self._gradients.get(name)
        return None if file is None else (self._folder / file, name)


def open_statistics(folder: Path) -> Statistics:
    """Open a complete calibration.

    Raises:
        InputError: there is none, it was interrupted, or another version wrote it.
        CorruptFileError: about.json was damaged.
    """
    about = read_about(folder)
    if not about["complete"]:
        raise InputError(f"the calibration in {folder} was interrupted; run the same command again to go on with it")
    return Statistics(folder, about)


def read_about(folder: Path) -> dict[str, Any]:
    """The content of about.json.

    Raises:
        InputError: there is none, or another version wrote it.
        CorruptFileError: it was damaged.
    """
    about = read_json(folder / ABOUT)
    if about.get("format") != FORMAT:
        raise InputError(
            f"the calibration in {folder} has the format {about.get('format')!r}; this version reads {FORMAT}. Remove "
            "the folder, or name another work folder."
        )
    fields = _FIELDS | _RESULTS if about.get("complete") else _FIELDS
    wrong = [name for name, kind in fields.items() if not isinstance(about.get(name), kind)]
    if wrong:
        raise CorruptFileError(
            f"{ABOUT} in {folder} was edited: it has no proper {wrong[0]!r}. Remove the folder and calibrate again."
        )
    return about


def read_metadata(path: Path, key: str) -> Any:
    """JSON in the metadata of a safetensors file.

    Raises:
        CorruptFileError: there is none.
    """
    from safetensors import SafetensorError, safe_open

    untyped: Any = safe_open
    try:
        with untyped(path, framework="numpy") as file:
            return json.loads((file.metadata() or {})[key])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CorruptFileError(
            f"{path} is damaged ({error}). Remove the folder {path.parent} and calibrate again."
        ) from error
