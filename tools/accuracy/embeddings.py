"""The steps of :mod:`accuracy.worker` for the sentence encoder, in the place of a language model.

Calibration and evaluation are sentences of the two texts. Methods run through their Python interface, which knows
matrices and not models, with statistics of activations alone: there is no next token, hence no gradient of a loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from accuracy import candidates
from accuracy.encoder import Encoder, by_method, by_peer, distances
from accuracy.evaluation import Lost
from accuracy.interface import Contender, Shape
from accuracy.mixes import Model
from accuracy.peers import contenders
from accuracy.texts import sentences
from anyquant.calibration import MatrixStatistics
from anyquant.calibration.store import moments_file, read_array, read_metadata
from anyquant.errors import InputError, UsageError
from anyquant.ir import Spec, Tensor
from anyquant.methods import LevelArray, Levels, Method, get_method
from anyquant.methods.options import parse
from anyquant.methods.protocol import Floats, Settings
from anyquant.refinement.calibrated import refine_for
from anyquant.reporting.environment import environment
from anyquant.validation.texts import read_text

CALIBRATION_SENTENCES = 512
EVALUATION_SENTENCES = 1000
Task = Mapping[str, Any]


class Refined(Method):
    """A method whose tensors are refined for the outputs, as --refine does it."""

    def __init__(self, method: Method) -> None:
        """Take what a method is."""
        self._method = method
        self.name, self.summary, self.options = method.name, method.summary, method.options

    def settings(self, options: Settings, bits: float | None = None) -> dict[str, Any]:
        """As the method."""
        return self._method.settings(options, bits)

    def levels(self, shape: Shape, settings: Settings) -> Levels:
        """As the method."""
        return self._method.levels(shape, settings)

    def spec(self, shape: Shape, chosen: LevelArray, settings: Settings) -> Spec:
        """As the method."""
        return self._method.spec(shape, chosen, settings)

    def errors(self, weight: Floats, statistics: MatrixStatistics | None, settings: Settings) -> NDArray[np.float64]:
        """As the method."""
        return self._method.errors(weight, statistics, settings)

    def quantize(
        self, weight: Floats, chosen: LevelArray, statistics: MatrixStatistics | None, settings: Settings
    ) -> Tensor:
        """As the method, then refined."""
        tensor = self._method.quantize(weight, chosen, statistics, settings)
        if statistics is None:
            return tensor
        return refine_for(weight, tensor, statistics, self._method.row_weights(weight, statistics, settings))


def method_of(arguments: list[str]) -> tuple[Method, dict[str, Any], float]:
    """Method, options and bits of the arguments of ``anyquant quantize``, as far as they concern matrices alone.

    Raises:
        UsageError: others do.
    """
    rest, given, bits, name, refined = list(arguments), [], 0.0, "", False
    while rest:
        word = rest.pop(0)
        if word == "--refine":
            refined = True
        elif word in ("--method", "--bits", "--set") and rest:
            value = rest.pop(0)
            if word == "--set":
                given.append(value)
            elif word == "--bits":
                bits = float(value)
            else:
                name = value
        else:
            raise UsageError(f"{word} has no meaning for the encoder, whose methods see matrices alone")
    method = get_method(name)
    return Refined(method) if refined else method, parse(name, method.options, given), bits


def takes(arguments: list[str]) -> bool:
    """Whether the encoder can be quantized so."""
    try:
        method_of(arguments)
    except UsageError:
        return False
    return True


def _peers(encoder: Encoder, notes: list[str]) -> list[Contender]:
    return contenders(Model(encoder.layers, 1), encoder.shapes, notes.append)


def list_peers(task: Task) -> dict[str, Any]:
    """Names and bits of all peers, and who is missing."""
    encoder, notes = Encoder(Path(task["model"])), list[str]()
    return {"peers": {peer.name: peer.bits(encoder.shapes) for peer in _peers(encoder, notes)}, "notes": notes}


def take_statistics(task: Task) -> dict[str, Any]:
    """Second moments of the inputs of all matrices."""
    encoder = Encoder(Path(task["model"]))
    found = sentences(read_text(Path(task["text"])), CALIBRATION_SENTENCES, seed=task["seed"])
    statistics = encoder.statistics(found, Path(task["folder"]))
    return {"tokens": next(iter(statistics.values())).tokens, "notes": [f"{len(found)} sentences"]}


def _statistics(folder: Path) -> dict[str, MatrixStatistics]:
    file = folder / moments_file(0)
    return {
        name: MatrixStatistics(entry["tokens"], read_array(file, f"{number}.diagonal"), (file, f"{number}.moment"))
        for number, entry in enumerate(read_metadata(file, "inputs"))
        for name in entry["names"]
    }


def make_peer(task: Task) -> dict[str, Any]:
    """The encoder as a peer quantizes it."""
    encoder = Encoder(Path(task["model"]))
    peer = next((each for each in _peers(encoder, []) if each.name == task["name"]), None)
    if peer is None:
        raise UsageError(f"there is no peer {task['name']!r} here")
    values = by_peer(encoder, peer, _statistics(Path(task["statistics"])))
    digest = candidates.write_values(Path(task["candidate"]), encoder.shapes, (values[n] for n in encoder.shapes))
    return {"bits": peer.bits(encoder.shapes), "digest": digest}


def make_method(task: Task) -> dict[str, Any]:
    """The encoder as a method of anyquant quantizes it."""
    encoder = Encoder(Path(task["model"]))
    method, options, bits = method_of(task["arguments"])
    values, stored = by_method(encoder, method, options, _statistics(Path(task["statistics"])), bits)
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
    """Distances as the losses of windows of one token; there is no text that would be predicted."""
    nothing = np.zeros((len(found), 0))
    Lost(nothing, found[:, None], nothing.astype(np.bool_)).save(result)
