"""A step of the benchmark in a process of its own, so that its memory is known and nothing of it is left.

    python -m accuracy.worker TASK.json

The task names the step and its arguments; the answer is one JSON document on standard output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accuracy import auto_rounding, candidates, embeddings
from accuracy.commands import job_of
from accuracy.evaluation import Lost, Reference
from accuracy.interface import Contender, Floats, Shape, WholeModel
from accuracy.mixes import Model
from accuracy.peers import contenders
from anyquant.calibration import MatrixStatistics, calibrate, open_statistics
from anyquant.calibration.sequential import quantize_in_sequence
from anyquant.checkpoint import Checkpoint, open_checkpoint
from anyquant.errors import AnyquantError, InputError, UsageError
from anyquant.forms import chosen_matrices
from anyquant.reporting.environment import environment

Task = Mapping[str, Any]


def opened(path: str) -> Checkpoint:
    """A checkpoint of a language model."""
    return open_checkpoint(path)


def shapes_of(checkpoint: Checkpoint) -> dict[str, Shape]:
    """Name -> [out, in] of the matrices that are quantized."""
    names = chosen_matrices(checkpoint, False)
    return {name: (checkpoint.tensors[name].shape[0], checkpoint.tensors[name].shape[1]) for name in names}


def peers_of(checkpoint: Checkpoint, note: Callable[[str], None]) -> list[Contender | WholeModel]:
    """The peers that can quantize a model, those last that have to run it."""
    config = checkpoint.config
    heads = int(config["num_attention_heads"])
    model = Model(int(config["num_hidden_layers"]), heads // int(config.get("num_key_value_heads") or heads))
    found: list[Contender | WholeModel] = [*contenders(model, shapes_of(checkpoint), note)]
    if auto_rounding.available():
        found += [auto_rounding.auto_round(bits) for bits in auto_rounding.WIDTHS]
    return found


def named(found: list[Contender | WholeModel], name: str) -> Contender | WholeModel:
    """The peer of this name.

    Raises:
        UsageError: there is none.
    """
    for contender in found:
        if contender.name == name:
            return contender
    raise UsageError(f"there is no peer {name!r} here")


def list_peers(task: Task) -> dict[str, Any]:
    """Names and bits of all peers, and who is missing."""
    notes: list[str] = []
    checkpoint = opened(task["model"])
    shapes = shapes_of(checkpoint)
    found = peers_of(checkpoint, notes.append)
    return {
        "peers": {peer.name: peer.bits(shapes) for peer in found if isinstance(peer, Contender)},
        "optional": {peer.name: peer.bits(shapes) for peer in found if isinstance(peer, WholeModel)},
        "notes": notes,
    }


def take_statistics(task: Task) -> dict[str, Any]:
    """The calibration that a command of anyquant would take."""
    checkpoint = opened(task["model"])
    job = job_of(task["model"], task["arguments"])
    found = calibrate(checkpoint, list(shapes_of(checkpoint)), job.calibration_settings, Path(task["folder"]))
    return {"tokens": found.tokens, "notes": found.notes}


def make_peer(task: Task) -> dict[str, Any]:
    """A model as a peer quantizes it."""
    checkpoint, statistics = opened(task["model"]), open_statistics(Path(task["statistics"]))
    shapes = shapes_of(checkpoint)
    peer = named(peers_of(checkpoint, lambda note: None), task["name"])
    if isinstance(peer, WholeModel):
        whole = peer.quantize(checkpoint, statistics.ids(), list(shapes))
        digest = candidates.write_values(Path(task["candidate"]), shapes, (whole[name] for name in shapes))
        return {"bits": peer.bits(shapes), "digest": digest}

    def quantized(name: str, known: MatrixStatistics | None) -> Floats:
        if known is None:
            raise InputError(f"{name}: the calibration text never reaches it, so that peers cannot quantize it.")
        return peer.quantize(name, checkpoint.read(name), known.full())

    def group(names: list[str], known: dict[str, MatrixStatistics | None]) -> list[tuple[str, Floats]]:
        found = {name: quantized(name, known[name]) for name in names}
        made.update(found)
        return list(found.items())

    made: dict[str, Floats] = {}
    if peer.sequential:
        quantize_in_sequence(checkpoint, list(shapes), statistics, group)
    values = (made[name] if peer.sequential else quantized(name, statistics.matrix(name)) for name in shapes)
    digest = candidates.write_values(Path(task["candidate"]), shapes, values)
    return {"bits": peer.bits(shapes), "digest": digest}


def run_source(task: Task) -> dict[str, Any]:
    """The source's answers to the evaluation text."""
    import torch

    checkpoint, reference = opened(task["model"]), Reference(Path(task["folder"]))
    text = Path(task["text"])
    windows = reference.cut(checkpoint, text, task["windows"], task["window"], task["seed"])
    lost, rounding = reference.run(checkpoint, windows.ids, _tick("the source"))
    lost.save(Path(task["result"]))
    return {
        "text": text.name,
        "tokens_of_text": windows.tokens,
        "rounding_kl": rounding,
        "environment": environment(torch.get_num_threads()),
    }


def measure(task: Task) -> dict[str, Any]:
    """What a candidate loses."""
    checkpoint = opened(task["model"])
    read = candidates.reader(Path(task["candidate"]), checkpoint.read)
    reference = Reference(Path(task["folder"]))
    lost: Lost = reference.measure(checkpoint, read, task["name"], task["activations"], _tick(task["name"]))
    lost.save(Path(task["result"]))
    return {}


def _tick(name: str) -> Callable[[int, int], None]:
    started = time.monotonic()

    def tick(done: int, whole: int) -> None:
        print(f"{name}: window {done} of {whole}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    return tick


STEPS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "peers": list_peers,
    "calibrate": take_statistics,
    "peer": make_peer,
    "source": run_source,
    "measure": measure,
    "encoder-peers": embeddings.list_peers,
    "encoder-calibrate": embeddings.take_statistics,
    "encoder-peer": embeddings.make_peer,
    "encoder-method": embeddings.make_method,
    "encoder-source": embeddings.run_source,
    "encoder-measure": embeddings.measure,
}


def main(arguments: list[str]) -> int:
    """Do the step that a file describes."""
    from anyquant.runtime import native

    task = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    native.install()
    try:
        answer = STEPS[task["step"]](task)
    except AnyquantError as error:
        print(f"{error}", file=sys.stderr)
        feasible = getattr(error, "feasible", None)
        if feasible is not None:
            print(json.dumps({"error": str(error), "feasible": feasible}))
        return error.exit_code
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
