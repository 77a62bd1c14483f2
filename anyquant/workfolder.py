"""The work folder of a quantization: what was computed so far, so that it can be gone on with or used again.

    job.json        of what: model, method, settings, calibration, version
    calibration/    texts and statistics of the inputs; see anyquant.calibration
    tables/         errors of every unit at every level, a file per matrix
    searched.json   levels that a search has found, and for which target
    tensors/        quantized matrices, a file each; target.json says for which target
    lock            held while a process works here

Statistics and tables do not depend on the target, so any later target of the same job uses them again. Every file
appears whole under its name or not at all; killing the process at any moment loses at most the file it was at.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from anyquant import ir
from anyquant.calibration.store import ABOUT
from anyquant.errors import AnyquantError, CorruptFileError, InputError, MachineError, UsageError
from anyquant.ir.safetensors_io import SafetensorsReader

_JOB, _TARGET, _LOCK, _SEARCHED = "job.json", "target.json", "lock", "searched.json"
_LOSS, _PARTIAL = "loss", ".partial"


class WorkFolder:
    """An opened work folder; see :func:`work_folder`."""

    def __init__(self, path: Path) -> None:
        """Remember where; nothing is checked."""
        self.path = path

    @property
    def calibration(self) -> Path:
        """The folder of the calibration."""
        return self.path / "calibration"

    def notes(self) -> list[str]:
        """What a user should know of the calibration, if there is one: short texts, dead columns, unseen experts."""
        about = _read_json(self.calibration / ABOUT) or {}
        found: list[str] = about.get("notes", [])
        return found

    def table(self, index: int, name: str, shape: tuple[int, int]) -> np.ndarray | None:
        """Errors float64 [units, levels] of a matrix, if they are there."""
        found = self._read(self.path / "tables" / f"{index:05d}.safetensors", {name: (np.dtype("<f8"), shape)})
        return None if found is None else found[name]

    def save_table(self, index: int, name: str, errors: np.ndarray) -> None:
        """Keep the errors of a matrix."""
        self._write(self.path / "tables" / f"{index:05d}.safetensors", {name: errors})

    def searched(self, target: dict[str, Any]) -> list[int] | None:
        """The levels of all matrices that a search has found for a target, if it was made here."""
        found = _read_json(self.path / _SEARCHED)
        levels: list[int] | None = found["levels"] if found and found["target"] == target else None
        return levels

    def save_searched(self, target: dict[str, Any], levels: list[int]) -> None:
        """Keep the levels that a search has found."""
        self._write_json(self.path / _SEARCHED, {"target": target, "levels": levels})

    def begin_tensors(self, target: dict[str, Any], *, resume: bool) -> None:
        """Say what the tensors are for; those of another target are thrown away, or refused when resuming.

        Raises:
            UsageError: resuming, and the folder is for another target.
        """
        folder = self.path / "tensors"
        found = _read_json(folder / _TARGET)
        if found == target and resume:
            return
        if found is not None and resume:
            raise UsageError(_differences(f"{self.path} was begun for another target", found, target))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._write_json(folder / _TARGET, target)

    def tensor(self, index: int, name: str, spec: ir.Spec) -> tuple[ir.Tensor, ir.Loss] | None:
        """A quantized matrix and what it lost, if it is there."""
        expected = {name + suffix: about for suffix, about in spec.arrays().items()}
        found = self._read(self._tensor_file(index), {**expected, _LOSS: (np.dtype("<f8"), (2,))})
        if found is None:
            return None
        tensor = ir.Tensor(spec, {suffix: found[name + suffix] for suffix in spec.arrays()})
        try:
            tensor.check(name)
        except CorruptFileError:
            return None
        error, output_error = found[_LOSS].tolist()
        return tensor, ir.Loss(error, output_error if output_error >= 0 else None)

    def save_tensor(self, index: int, name: str, tensor: ir.Tensor, loss: ir.Loss) -> None:
        """Keep a quantized matrix and what it lost."""
        arrays = {name + suffix: array for suffix, array in tensor.arrays.items()}
        lost = np.array([loss.error, -1.0 if loss.output_error is None else loss.output_error])
        self._write(self._tensor_file(index), {**arrays, _LOSS: lost})

    def _tensor_file(self, index: int) -> Path:
        return self.path / "tensors" / f"{index:05d}.safetensors"

    def _read(self, path: Path, expected: ir.Arrays) -> dict[str, np.ndarray] | None:
        """The arrays of a file; None where there is no such file, or a power cut left it damaged."""
        if not path.exists():
            return None
        try:
            reader = SafetensorsReader(path)
            for key, (dtype, shape) in expected.items():
                reader.expect(key, dtype, shape)
            return {key: reader.read(key) for key in expected}
        except (CorruptFileError, InputError):
            return None

    def _write(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        entries = [(key, array.dtype, array.shape) for key, array in arrays.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + _PARTIAL)
        temporary.unlink(missing_ok=True)
        ir.write_safetensors(temporary, entries, iter(arrays.values()), None)
        self._publish(temporary, path)

    def _write_json(self, path: Path, value: dict[str, Any]) -> None:
        temporary = path.with_name(path.name + _PARTIAL)
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
        self._publish(temporary, path)

    def _publish(self, temporary: Path, path: Path) -> None:
        try:
            ir.sync(temporary)
            os.replace(temporary, path)
        except OSError as error:
            raise MachineError(f"cannot write {path}: {error.strerror or error}") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    return ir.read_json(path) if path.exists() else None


def _differences(what: str, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    lines = [f"  {key}: {_short(found.get(key))} there, {_short(wanted.get(key))} asked for" for key in keys]
    return "\n".join(
        [f"{what}:", *lines, "Choose another --work-dir, repeat what it was begun with, or remove the folder."]
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "..."


@contextmanager
def temporary_work_folder(job: dict[str, Any]) -> Iterator[WorkFolder]:
    """A work folder for the time of the context, where the user has named none."""
    with (
        tempfile.TemporaryDirectory(prefix="anyquant-") as parent,
        work_folder(Path(parent) / "work", job, resume=False, keep=True) as work,
    ):
        yield work


def beside(output: Path) -> Path:
    """The work folder of an output whose user has named none."""
    return output.with_name(output.name + ".work")


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Make a folder, if there is none, and lock it against other processes until the end of the context.

    Raises:
        UsageError: another process holds it.
        MachineError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / _LOCK).open("w")
    except OSError as error:
        raise MachineError(f"cannot make the work folder {path}: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"the work folder {path} is in use by another process.") from None
        yield


@contextmanager
def work_folder(path: Path, job: dict[str, Any], *, resume: bool, keep: bool) -> Iterator[WorkFolder]:
    """Open or make a work folder, locked against other processes until the end of the context.

    Args:
        path: the folder.
        job: all that statistics and tables depend on, as JSON.
        resume: go on with an interrupted run; there must be one.
        keep: whether the folder stays after success. It stays after any failure, unless nothing was computed yet: a
            request that is refused leaves nothing in the way of the next.

    Raises:
        UsageError: it belongs to another job (which fields differ is said), is used by another process, is not a work
            folder, or there is nothing to resume.
        MachineError: it cannot be made.
    """
    known = path / _JOB
    if resume and not known.exists():
        raise UsageError(f"there is nothing to resume: {path} holds no {_JOB}. Leave out --resume to begin.")
    begun = {_LOCK, _JOB + _PARTIAL}
    if not known.exists() and path.exists() and (not path.is_dir() or set(os.listdir(path)) - begun):
        raise UsageError(f"{path} exists and is not a work folder of anyquant's. Choose another --work-dir.")
    with held(path):
        folder = WorkFolder(path)
        found = _read_json(known)
        if found is not None and found != job:
            raise UsageError(_differences(f"the work folder {path} belongs to another job", found, job))
        if found is None:
            folder._write_json(known, job)
        try:
            yield folder
        except AnyquantError:
            if not any(path.rglob("*.safetensors")):
                _remove(path)
            raise
        if not keep:
            _remove(path)


def _remove(path: Path) -> None:
    """The whole folder, its job last: what a kill leaves behind is still a work folder, to be resumed or used again."""
    for part in path.glob("*"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        elif part.name not in (_JOB, _LOCK):
            part.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
