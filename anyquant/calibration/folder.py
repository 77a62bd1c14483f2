"""Writing the folder of a calibration; :mod:`anyquant.calibration.store` says what is in it and reads it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant.calibration.store import (
    ABOUT,
    FORMAT,
    GUIDED,
    TOKENS,
    Floats,
    Moment,
    Statistics,
    gradients_file,
    moments_file,
    read_about,
    read_array,
    read_metadata,
)
from anyquant.errors import MachineError
from anyquant.ir import sync, write_safetensors
from anyquant.ir.safetensors_io import SafetensorsReader

_NAMED = 5
"""Matrices that a note names."""


class CalibrationFolder:
    """A calibration in the making. Every method that writes leaves a whole file under its name, or none."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if there is none.

        Raises:
            MachineError: it cannot be made.
        """
        self.folder = folder
        with _guarded(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob(".*.partial"):
                stale.unlink()

    def about(self) -> dict[str, Any] | None:
        """The content of about.json; None before :meth:`begin`.

        Raises:
            InputError: another version wrote it.
            CorruptFileError: it was damaged.
        """
        return read_about(self.folder) if (self.folder / ABOUT).exists() else None

    def begin(self, identity: dict[str, Any], versions: dict[str, str], threads: int) -> dict[str, Any]:
        """Write and return the first about.json."""
        about = {
            "format": FORMAT, "complete": False, "identity": identity, "versions": versions, "threads": threads,
        }  # fmt: skip
        self._write(ABOUT, lambda path: path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8"))
        return about

    def save_tokens(self, ids: NDArray[np.int64], notes: Sequence[str]) -> None:
        """Keep the tokens [windows, window], and what is to be said of them."""
        self._arrays(TOKENS, {"ids": ids.astype(np.uint32)}, {"notes": json.dumps(list(notes))})

    def tokens(self) -> NDArray[np.int64] | None:
        """The tokens int64 [windows, window]; None if there are none yet."""
        path = self.folder / TOKENS
        return read_array(path, "ids").astype(np.int64) if path.exists() else None

    def has_moments(self, section: int) -> bool:
        """Whether the moments of a section are stored."""
        return (self.folder / moments_file(section)).exists()

    def save_moments(self, section: int, moments: Sequence[Moment]) -> None:
        """Store the moments of a section."""
        arrays: dict[str, np.ndarray] = {}
        for number, moment in enumerate(moments):
            arrays[f"{number}.diagonal"] = moment.diagonal
            if moment.triangle is not None:
                arrays[f"{number}.moment"] = moment.triangle
        inputs = [{"names": list(moment.names), "tokens": moment.tokens} for moment in moments]
        self._arrays(moments_file(section), arrays, {"inputs": json.dumps(inputs)})

    def has_gradients(self, section: int) -> bool:
        """Whether the gradients of a section are stored."""
        return (self.folder / gradients_file(section)).exists()

    def save_gradients(self, section: int, gradients: dict[str, Floats]) -> None:
        """Store what :meth:`anyquant.calibration.gradients.GradientSums.result` gives for a section."""
        self._arrays(gradients_file(section), gradients, None)

    def scratch(self, shape: tuple[int, ...]) -> Floats:
        """An array float32 in a file without a name, which is gone with the array.

        Raises:
            MachineError: the disk has no room for it.
        """
        with _guarded(self.folder / "hidden states"), tempfile.TemporaryFile(dir=self.folder) as file:
            # A page for which there is no room later would end the process.
            os.posix_fallocate(file.fileno(), 0, max(1, 4 * math.prod(shape)))
            array: Floats = np.memmap(file, np.float32, "r+", shape=shape)
        return array

    def finish(self, wanted: Sequence[str]) -> Statistics:
        """Write the index, the notes and the fingerprint over all files: the calibration is complete."""
        about = self.about()
        assert about is not None
        files = [p.name for p in sorted(self.folder.glob("*.safetensors")) if p.name != TOKENS]
        inputs: list[dict[str, Any]] = []
        gradients: dict[str, str] = {}
        for file in files:
            if file.startswith("gradients"):
                found = SafetensorsReader(self.folder / file).entries
                gradients |= {name: file for name in found if not name.endswith(GUIDED)}
                continue
            for number, entry in enumerate(read_metadata(self.folder / file, "inputs")):
                inputs.append({**entry, "file": file, "key": str(number)})
        tokens = read_array(self.folder / TOKENS, "ids").size
        diagonals: dict[str, Floats] = {}
        for entry in inputs:
            diagonal = read_array(self.folder / entry["file"], f"{entry['key']}.diagonal")
            diagonals |= dict.fromkeys(entry["names"], diagonal)
        about |= {
            "complete": True,
            "tokens": tokens,
            "notes": [*read_metadata(self.folder / TOKENS, "notes"), *notes(wanted, diagonals)],
            "fingerprint": _fingerprint(self.folder, [TOKENS, *files]),
            "inputs": inputs,
            "gradients": gradients,
        }
        self._write(ABOUT, lambda path: path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8"))
        return Statistics(self.folder, about)

    def _arrays(self, file: str, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None) -> None:
        entries = [(key, array.dtype, array.shape) for key, array in arrays.items()]
        self._write(file, lambda path: write_safetensors(path, entries, arrays.values(), metadata))

    def _write(self, file: str, write: Callable[[Path], object]) -> None:
        """Write a file under a temporary name, wait for the disk, and rename it."""
        temporary, final = self.folder / f".{file}.partial", self.folder / file
        with _guarded(final):
            temporary.unlink(missing_ok=True)
            write(temporary)
            sync(temporary)
            os.replace(temporary, final)
            sync(self.folder)


def notes(wanted: Sequence[str], diagonals: Mapping[str, Floats]) -> list[str]:
    """What a user should know of the statistics.

    Args:
        wanted: the matrices that were to be recorded.
        diagonals: of those that were, the mean squares of their inputs.
    """
    dead = {name: int(np.count_nonzero(diagonals[name] == 0)) for name in wanted if name in diagonals}
    dead = {name: count for name, count in dead.items() if count}
    unseen = [name for name in wanted if name not in diagonals]
    experts = [name for name in unseen if "experts" in name]
    others = [name for name in unseen if "experts" not in name]
    found = []
    if dead:
        each = (f"{name} ({count:,} of {len(diagonals[name]):,})" for name, count in dead.items())
        found.append(f"inputs that were 0 at every token, in {len(dead):,} matrices: {_some(each, len(dead))}")
    if experts:
        found.append(f"experts that saw no token, {len(experts):,} matrices: {_some(experts, len(experts))}")
    if others:
        found.append(
            f"matrices that nothing was seen to be multiplied with, {len(others):,}: {_some(others, len(others))}"
        )
    return found


def _some(items: Iterable[str], count: int) -> str:
    text = ", ".join(item for item, _ in zip(items, range(_NAMED), strict=False))
    return f"{text}, ..." if count > _NAMED else text


def _fingerprint(folder: Path, files: Sequence[str]) -> str:
    """SHA-256 (hex) over names and contents of files."""
    sha = hashlib.sha256()
    for file in files:
        sha.update(f"\0{file}\0{(folder / file).stat().st_size}\0".encode())
        with (folder / file).open("rb") as stream:
            while block := stream.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Turn the system's errors into ours.

    Raises:
        MachineError: the disk is full or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"cannot write {path.name} in {path.parent}: {error.strerror or error}. Free some space, or choose another "
            "work folder; what is there already will be used again."
        ) from error
