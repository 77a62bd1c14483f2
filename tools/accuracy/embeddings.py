"""The steps of :mod:`accuracy.worker` for the sentence encoder, in the place of a language model.

Calibration and evaluation are sentences of the two texts. Methods run through their Python interface, which knows
matrices and not models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from accuracy import candidates
from accuracy.commands import job_of
from accuracy.encoder import Encoder, distances, statistics_in
from accuracy.encoder_matrices import by_method, by_peer
from accuracy.evaluation import Lost
from accuracy.interface import Contender, Floats
from accuracy.mixes import Model
from accuracy.peers import contenders
from accuracy.texts import sentences
from anyquant.errors import InputError, UsageError
from anyquant.job import Job
from anyquant.reporting.environment import environment
from anyquant.validation.texts import read_text

CALIBRATION_SENTENCES = 512
EVALUATION_SENTENCES = 1000
_TOGETHER = 20  # sentences that the bootstrap draws together, so that what is kept of a system is short
Task = Mapping[str, Any]


def job_for(arguments: Sequence[str]) -> Job:
    """The job of the arguments of ``anyquant quantize``, as far as they concern matrices alone.

    Raises:
        UsageError: others do.
    """
    job = job_of("encoder", arguments)
    of_models = {
        "--sequential": job.sequential,
        "--row-groups": job.calibration.row_groups > 0,
        "--count index": job.target.count != "all",
        "--allocation uniform": job.scope == "uniform",
        "--importance fisher": job.has_gradients and job.calibration_settings.importance != "gradient",
    }
    if wrong := [name for name, given in of_models.items() if given]:
        raise UsageError(f"{', '.join(wrong)}: not for the encoder, whose methods see matrices alone")
    return job


def takes(arguments: Sequence[str]) -> bool:
    """Whether the encoder can be quantized so."""
    try:
        job_for(arguments)
    except UsageError:
        return False
    return True


def _peers(encoder: Encoder, notes: list[str]) -> list[Contender]:
    found = contenders(Model(encoder.layers, 1), encoder.shapes, notes.append)
    return [peer for peer in found if not peer.sequential]  # its matrices are quantized without running it


def list_peers(task: Task) -> dict[str, Any]:
    """Names and bits of all peers, and who is missing."""
    encoder, notes = Encoder(Path(task["model"])), list[str]()
    return {"peers": {peer.name: peer.bits(encoder.shapes) for peer in _peers(encoder, notes)}, "notes": notes}


def take_statistics(task: Task) -> dict[str, Any]:
    """Second moments of the inputs of all matrices, and the gradients of their outputs."""
    found = sentences(read_text(Path(task["text"])), CALIBRATION_SENTENCES, seed=task["seed"])
    tokens = Encoder(Path(task["model"])).calibrate(found, Path(task["folder"]))
    return {"tokens": tokens, "notes": [f"{len(found)} sentences"]}


def make_peer(task: Task) -> dict[str, Any]:
    """The encoder as a peer quantizes it."""
    encoder = Encoder(Path(task["model"]))
    peer = next((each for each in _peers(encoder, []) if each.name == task["name"]), None)
    if peer is None:
        raise UsageError(f"there is no peer {task['name']!r} here")
    values = by_peer(encoder, peer, statistics_in(Path(task["statistics"]), gradients=False))
    digest = candidates.write_values(Path(task["candidate"]), encoder.shapes, (values[n] for n in encoder.shapes))
    return {"bits": peer.bits(encoder.shapes), "digest": digest}


def make_method(task: Task) -> dict[str, Any]:
    """The encoder as a method of anyquant quantizes it."""
    encoder = Encoder(Path(task["model"]))
    job = job_for(task["arguments"])
    statistics = statistics_in(Path(task["statistics"]), gradients=job.has_gradients)
    values, stored = by_method(encoder, job, statistics)
    digest = candidates.write_values(Path(task["candidate"]), encoder.shapes, (values[n] for n in encoder.shapes))
    return {"bits": stored, "digest": digest}


def run_source(task: Task) -> dict[str, Any]:
    """The embeddings of the evaluation's sentences."""
    import torch

    encoder, text, folder = Encoder(Path(task["model"])), Path(task["text"]), Path(task["folder"])
    chosen = sentences(read_text(text), task["windows"], seed=task["seed"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sentences.txt").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    embedded = encoder.embed(chosen)
    np.save(folder / "embeddings.npy", embedded)
    _save(distances(embedded, embedded), Path(task["result"]))
    return {"text": text.name, "environment": environment(torch.get_num_threads())}


def measure(task: Task) -> dict[str, Any]:
    """1 - cosine of each sentence's embedding to the source's."""
    encoder, folder = Encoder(Path(task["model"])), Path(task["folder"])
    chosen = (folder / "sentences.txt").read_text(encoding="utf-8").splitlines()
    read = candidates.reader(Path(task["candidate"]), lambda name: encoder.weights[name])
    reference = cast(Floats, np.load(folder / "embeddings.npy"))
    with encoder.using({name: read(name) for name in encoder.weights}):
        found = distances(reference, encoder.embed(chosen))
    if found.shape != (task["windows"],):
        raise InputError(f"{folder} holds {len(found)} sentences, not {task['windows']}. Remove it.")
    _save(found, Path(task["result"]))
    return {}


def _save(found: NDArray[np.float64], result: Path) -> None:
    """Distances as what tokens of windows lost; there is no text that would be predicted."""
    windows = found.reshape(-1, _TOGETHER if len(found) % _TOGETHER == 0 else 1)
    nothing = np.zeros((len(windows), 0))
    Lost(nothing, windows, nothing.astype(np.bool_)).save(result)
