"""The work folder of the benchmark, in which everything stays that was measured.

    texts/, dithered-model/, ...       what the benchmark runs on
    SOURCE/EVALUATION/                 about.json, the source's answers, and what each model lost, by its digest
    SOURCE/CALIBRATION/                about.json, and:
        calibrations/                  statistics of the text, each kind taken once and shared by all methods
        jobs/                          work folders of anyquant, one for all targets of a method's settings
        made/                          a JSON for each system: bits, seconds, memory, digest; or why there is none
        candidate/                     the model that is being measured; removed after that

A file is there whole or not at all, so a run can be stopped at any time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accuracy.systems import System
from anyquant.errors import UsageError
from anyquant.ir import read_json

Record = dict[str, Any]
ABOUT, SOURCE = "about.json", "source.npz"


def write_json(path: Path, value: Record) -> None:
    """Write a JSON object, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def code_state() -> str:
    """A short digest of all code that a result may depend on: a row of another state may not be what this one gives."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for folder in ("anyquant", "kernels", "tools/accuracy"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Store:
    """The folders of one source, calibration and evaluation.

    Attributes:
        source: its folder.
        calibration: name of the calibration, a folder below it.
        evaluation: name of the evaluation, likewise.
    """

    source: Path
    calibration: str
    evaluation: str

    @property
    def calibrated(self) -> Path:
        """What depends on the calibration."""
        return self.source / self.calibration

    @property
    def evaluated(self) -> Path:
        """What depends on the evaluation."""
        return self.source / self.evaluation

    @property
    def candidate(self) -> Path:
        """Where a quantized model is, while it is measured."""
        return self.calibrated / "candidate"

    def claim(self, calibration: Record, evaluation: Record) -> None:
        """Say what the folders are of.

        Raises:
            UsageError: they are of something else.
        """
        for folder, about in ((self.calibrated, calibration), (self.evaluated, evaluation)):
            found = read_json(folder / ABOUT)["of"] if (folder / ABOUT).is_file() else None
            if found is None:
                write_json(folder / ABOUT, {"of": about})
            elif found != about:
                differing = [key for key in about if found.get(key) != about[key]]
                raise UsageError(
                    f"{folder} was measured with another {', '.join(differing)}. Choose another --work, or remove it."
                )

    def about(self, folder: Path) -> Record:
        """What a folder is of, and what was noted there; empty if nothing was."""
        return read_json(folder / ABOUT) if (folder / ABOUT).is_file() else {}

    def note(self, folder: Path, **more: Any) -> None:
        """Add to what is noted in a folder."""
        write_json(folder / ABOUT, {**self.about(folder), **more})

    def made(self, system: System) -> Record | None:
        """What is known of how a system was made."""
        path = self._made(system.slug)
        return read_json(path) if path.is_file() else None

    def save_made(self, system: System, record: Record) -> None:
        """Keep it."""
        known = {"name": system.name, "role": system.role, "label": system.label, "activations": system.activations}
        self.add({**known, **record})

    def add(self, record: Record) -> None:
        """Keep a whole record, as :meth:`all_made` gives them."""
        write_json(self._made(System(record["name"], record["role"]).slug), record)

    def all_made(self) -> Iterator[Record]:
        """All records, in the order of their files."""
        for path in sorted((self.calibrated / "made").glob("*.json")):
            yield read_json(path)

    def lost(self, record: Record) -> Path:
        """Where the losses of what was made are, or are to be."""
        suffix = f"-{record['activations']}" if record.get("activations") else ""
        return self.evaluated / f"{record['digest'][:24]}{suffix}.npz"

    def is_measured(self, record: Record) -> bool:
        """Whether it is known what that lost, not just how it was made."""
        return "digest" in record and self.lost(record).is_file()

    def forget(self, system: System) -> None:
        """Let a system be made and measured again; its tables of errors go as well."""
        record = self.made(system)
        if record is None:
            return
        if "digest" in record:
            self.lost(record).unlink(missing_ok=True)
        if record.get("job"):
            shutil.rmtree(self.calibrated / "jobs" / record["job"], ignore_errors=True)
        self._made(system.slug).unlink()

    def _made(self, slug: str) -> Path:
        return self.calibrated / "made" / f"{slug}.json"
