"""Making and measuring the systems of the benchmark, one after the other, as far as that was not done before."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accuracy import candidates, processes
from accuracy.commands import Calibration, complete, job_of, key
from accuracy.material import Material
from accuracy.processes import Finished
from accuracy.store import SOURCE, Record, Store, code_state, sha256
from accuracy.systems import System
from anyquant.checkpoint import open_checkpoint
from anyquant.errors import AnyquantError, UsageError
from anyquant.job import Job
from anyquant.planning import feasible_bits
from anyquant.reporting.environment import processor
from anyquant.workfolder import work_folder

_ANSWERED = "answered"  # an empty file: all that the source says is here, and not just what it lost


class Failed(AnyquantError):
    """A step ended with an error."""

    def __init__(self, what: str, found: Finished) -> None:
        """Keep its exit code."""
        super().__init__(f"{what}: {found.reason}")
        self.exit_code = found.code if found.code > 0 else 1


class Benchmark:
    """One source with its texts, and the store of what was measured."""

    def __init__(
        self,
        material: Material,
        store: Store,
        calibration: Calibration,
        windows: int,
        window: int,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        """Check that the store is of these.

        Args:
            material: model and texts.
            store: keeps everything.
            calibration: of methods and peers.
            windows: of the evaluation; of an encoder, sentences.
            window: tokens in each.
            seed: of the choice of windows.
            say: told what is being done.

        Raises:
            UsageError: the store is of something else.
        """
        self._material, self._store, self._calibration = material, store, calibration
        self._windows, self._window, self._seed, self._say = windows, window, seed, say
        model = str(material.model)
        if material.is_encoder:
            fingerprint = sha256(material.model / "model.safetensors")
        else:
            self._checkpoint = open_checkpoint(model)
            fingerprint = self._checkpoint.fingerprint()
        text = "self" if calibration.text == "self" else sha256(Path(calibration.text))
        size = {"windows": calibration.windows, "window": calibration.window, "seed": calibration.seed}
        store.claim(
            {"source": material.name, "model": fingerprint, "text": text, **({} if material.is_encoder else size)},
            {
                "source": material.name, "model": fingerprint, "text": sha256(material.evaluation),
                "windows": windows, "window": window, "seed": seed,
            },
        )  # fmt: skip
        store.note(store.calibrated, text=Path(calibration.text).name)

    def peers(self) -> tuple[list[str], list[str]]:
        """Names of the peers, and of those that run on request alone; says who is missing."""
        found = self._step("peers", "listing the peers", model=str(self._material.model))[0]
        for note in found["notes"]:
            self._say(note)
        self._store.note(self._store.calibrated, notes=found["notes"], peers=found["peers"])
        return list(found["peers"]), list(found.get("optional", {}))

    def source(self) -> None:
        """Run the source, unless its answers are there, and not just what it lost."""
        result, answered = self._store.evaluated / SOURCE, self._store.evaluated / _ANSWERED
        if result.is_file() and answered.is_file():
            return
        self._say(
            "running the source"
            if self._material.is_encoder
            else "running the source; its log-probabilities are kept in "
            f"{self._store.evaluated}, 2 bytes x {self._windows} x {self._window} x vocabulary"
        )
        temporary = result.with_name("source.new.npz")
        found, _ = self._step("source", "the source", **self._evaluation(temporary))
        machines = self._store.about(self._store.evaluated).get("machines", [])
        here = found.pop("environment")
        machines += [] if here in machines else [here]
        self._store.note(self._store.evaluated, **found, machines=machines)
        temporary.replace(result)
        answered.touch()

    def system(self, system: System) -> None:
        """Make and measure a system, unless that was done; what goes wrong is kept as its result."""
        record = self._store.made(system)
        if record is not None and ("infeasible" in record or self._store.is_measured(record)):
            return
        self._clear()
        try:
            made = self._make(system)
            # The first time is the one that tells what it takes from the start.
            if record is None or record.get("digest") != made.get("digest"):
                self._store.save_made(system, {**made, "code": code_state(), "cpu": processor()})
            record = self._store.made(system) or made
            if "infeasible" in record:
                self._say(f"{system.name}: infeasible")
            elif not self._store.is_measured(record):
                self._measure(system, record)
                self._say(f"{system.name}: {record['bits']:.3f} bits, {record['seconds']:.0f} s")
        except (Failed, UsageError) as error:
            self._store.save_made(system, {"failed": str(error)})
            self._say(f"{system.name}: failed: {error}")
        finally:
            self._clear()

    def _clear(self) -> None:
        folder = self._store.candidate
        for path in (folder, *folder.parent.glob(f".{folder.name}.partial-*")):
            shutil.rmtree(path, ignore_errors=True)

    def _make(self, system: System) -> Record:
        if system.role == "peer":
            return self._from_worker(f"{self._prefix}peer", system, name=system.name)
        if self._material.is_encoder:
            return self._from_worker("encoder-method", system, arguments=list(system.arguments))
        return self._quantize(system)

    def _from_worker(self, step: str, system: System, **task: Any) -> Record:
        statistics = self._peers_statistics()
        answer, found = self._step(
            step, system.name, prefix="", model=str(self._material.model), statistics=str(statistics),
            candidate=str(self._store.candidate), **task,
        )  # fmt: skip
        if "feasible" in answer:
            return {"infeasible": answer["error"], "feasible": answer["feasible"]}
        return {**answer, "seconds": found.seconds, "peak": found.peak, "command": None}

    def _quantize(self, system: System) -> Record:
        """Run ``anyquant quantize``; the calibration is there before."""
        model = str(self._material.model)
        arguments = complete(model, system.arguments, self._calibration)
        job = job_of(model, arguments)
        feasible = feasible_bits(self._checkpoint, job)
        if not feasible[0] - 1e-9 <= (job.target.bits or 0.0) <= feasible[1] + 1e-9:
            return {"infeasible": "outside the feasible interval", "feasible": feasible}
        identity = job.identity(self._checkpoint)
        work = self._store.calibrated / "jobs" / key(identity)
        statistics = self._statistics(job, arguments) if job.needs_statistics else None
        with work_folder(work, identity, resume=False, keep=True) as folder:
            if statistics and not folder.calibration.exists():
                _link(statistics, folder.calibration)
        if not any(made["label"] == system.label and made.get("fresh") for made in self._store.all_made()):
            shutil.rmtree(work / "tables", ignore_errors=True)  # each label is timed once with all that it takes
        fresh = not any((work / "tables").glob("*.safetensors"))
        command = ["quantize", model, "-o", str(self._store.candidate), *arguments, "--work-dir", str(work), "--json"]
        found = processes.anyquant(*command)
        shutil.rmtree(work / "tensors", ignore_errors=True)
        answer = _document(found)
        # The arguments were read before, and the work folder is this job's: what is left is a target that the planner
        # cannot meet, such as too few bits for one of the matrices.
        if found.code == UsageError.exit_code:
            return {"infeasible": answer.get("error", found.reason), "feasible": feasible}
        if found.code:
            raise Failed(f"anyquant quantize {' '.join(system.arguments)}", found)
        return {
            "bits": answer["bits"], "seconds": found.seconds, "peak": found.peak, "fresh": fresh,
            "digest": candidates.digest(self._store.candidate), "job": work.name, "calibrated": bool(statistics),
            "command": f"anyquant quantize MODEL {' '.join(system.arguments)}",
        }  # fmt: skip

    def _measure(self, system: System, record: Record) -> None:
        result = self._store.lost(record)
        temporary = result.with_name(f"{result.stem}.new.npz")
        self._step(
            "measure", system.name, candidate=str(self._store.candidate), name=system.name,
            activations=system.activations, **self._evaluation(temporary),
        )  # fmt: skip
        temporary.replace(result)

    def _evaluation(self, result: Path) -> dict[str, Any]:
        return {
            "model": str(self._material.model), "text": str(self._material.evaluation),
            "folder": str(self._store.evaluated), "result": str(result),
            "windows": self._windows, "window": self._window, "seed": self._seed,
        }  # fmt: skip

    def _peers_statistics(self) -> Path:
        """Moments of activations, which is what peers see; of the encoder also what methods see."""
        if not self._material.is_encoder:
            arguments = ["--method", "skim", "--importance", "activation", "--bits", "4"]
            arguments += self._calibration.arguments()
            return self._statistics(job_of(str(self._material.model), arguments), arguments)
        folder = self._store.calibrated / "calibrations" / "encoder"
        return self._calibrate(
            folder, {"importance": "gradient"}, text=self._calibration.text, seed=self._calibration.seed
        )

    def _statistics(self, job: Job, arguments: list[str]) -> Path:
        """The folder of a job's calibration, taken now unless it is there."""
        identity = job.calibration_settings.identity()
        folder = self._store.calibrated / "calibrations" / key(identity)
        known = {"importance": identity["importance"], "row_groups": identity["row_groups"]}
        return self._calibrate(folder, known, arguments=arguments)

    def _calibrate(self, folder: Path, known: Record, **task: Any) -> Path:
        done = self._store.about(self._store.calibrated).get("calibrations", {})
        if done.get(folder.name, {"elsewhere": True}).get("elsewhere"):
            self._say(f"calibrating: {', '.join(f'{name} {value}' for name, value in known.items())}")
            answer, found = self._step(
                "calibrate", "the calibration", model=str(self._material.model), folder=str(folder), **task
            )
            done[folder.name] = {**known, **answer, "seconds": found.seconds, "peak": found.peak}
            self._store.note(self._store.calibrated, calibrations=done)
        return folder

    @property
    def _prefix(self) -> str:
        return "encoder-" if self._material.is_encoder else ""

    def _step(self, step: str, what: str, *, prefix: str | None = None, **task: Any) -> tuple[Record, Finished]:
        """Run a step of :mod:`accuracy.worker`; its answer, and what it took.

        Raises:
            Failed: it ended with an error, and not for a target that cannot be met.
        """
        name = (self._prefix if prefix is None else prefix) + step
        with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
            path = Path(folder) / "task.json"
            path.write_text(json.dumps({"step": name, **task}), encoding="utf-8")
            found = processes.worker(path)
        answer = _document(found)
        if found.code and "feasible" not in answer:
            raise Failed(what, found)
        return answer, found


def _document(found: Finished) -> Record:
    """The JSON that a command wrote, alone or as the last line; empty where it wrote none."""
    for text in (found.out, found.out.rstrip().rpartition("\n")[2]):
        try:
            answer = json.loads(text)
        except ValueError:
            continue
        if isinstance(answer, dict):
            return answer
    return {}


def _link(source: Path, target: Path) -> None:
    """The same files under another folder; nobody writes to a finished calibration."""
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=os.link)
    temporary.replace(target)
