"""The float graph: a temporary checkpoint made from the IR, and the model builder run on it in a child process."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anyquant import ir
from anyquant.errors import AnyquantError, CorruptFileError, MachineError, MissingDependency, UnknownArchitecture
from anyquant.runtime.model import checkpoint_tensors

WORKER = "anyquant.exporters.onnx.graph_worker"
_SIDE_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_F32 = np.dtype("<f4")
_TABLES = 64 << 20  # of rotary positions: 131,072 of them for heads of 128


@dataclass(frozen=True)
class GraphSource:
    """What the builder made.

    Attributes:
        proto: model.onnx, serialized, its initializers external.
        folder: where model.onnx.data and the side files lie; None for a skeleton.
        norm_offset: what the builder added to norm weights.
    """

    proto: bytes
    folder: Path | None
    norm_offset: float


def require_packages() -> None:
    """Raise MissingDependency unless everything that writes a graph is installed."""
    for package, extra in (("onnx", "onnx"), ("onnx_ir", "onnx"), ("onnxruntime_genai", "onnxruntime")):
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(package.replace("_", "-"), extra, "The ONNX exporter")


def head_size(model: ir.Model) -> int:
    """Columns of an attention head, 0 if the config does not tell.

    Raises:
        CorruptFileError: one of the numbers that tell it is missing or none that makes sense.
    """
    config = model.config

    def number(key: str) -> int:
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise CorruptFileError(f"config.json: {key} is {value!r:.80}, not a whole number above 0. Repair it.")
        return value

    if config.get("head_dim") is not None:
        return number("head_dim")
    return number("hidden_size") // number("num_attention_heads") if "hidden_size" in config else 0


def checkpoint_config(model: ir.Model) -> dict[str, Any]:
    """config.json for the builder: plain FP32, and tied only where the IR holds one tensor for both ends."""
    head_size(model)  # raises before the builder would stumble
    config = {k: v for k, v in model.config.items() if k != "quantization_config"}
    config["torch_dtype"] = config["dtype"] = "float32"
    heads = [n for n in model.entries if n.rpartition(".")[0].endswith("lm_head")]
    if heads and config.get("tie_word_embeddings", True):
        config["tie_word_embeddings"] = False
    return config


def checkpoint_entries(model: ir.Model) -> list[tuple[str, np.dtype[Any], tuple[int, ...]]]:
    """(name, float32, shape) of the temporary checkpoint: source orientation, experts stacked again."""
    entries: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = []
    for name, members in _stacks(model).items():
        shape = model.entries[members[0]].spec.shape
        if model.entries[members[0]].source_transposed:
            shape = shape[::-1]
        entries.append((name, _F32, (len(members), *shape) if "#" in members[0] else shape))
    return entries


def checkpoint_bytes(model: ir.Model) -> int:
    """Bytes of the temporary checkpoint's weights."""
    return sum(4 * math.prod(shape) for _, _, shape in checkpoint_entries(model))


def temporary_disk(model: ir.Model) -> int:
    """Bytes of disk that an export needs: the checkpoint and the float graph, later the float graph and the result."""
    return 2 * (checkpoint_bytes(model) + _TABLES)


def _stacks(model: ir.Model) -> dict[str, list[str]]:
    """Checkpoint name -> the IR tensors that make it up."""
    stacks: dict[str, list[str]] = {}
    for name in model.entries:
        stacks.setdefault(name.rpartition("#")[0] or name, []).append(name)
    return stacks


def _checkpoint_arrays(model: ir.Model) -> Iterator[np.ndarray]:
    """Values in the order of :func:`checkpoint_entries`, which the file's header has announced."""
    for name, (found, values) in zip(_stacks(model), checkpoint_tensors(model), strict=True):
        if name != found:
            raise AnyquantError(f"the temporary checkpoint announces {name} where {found} comes")
        yield values


def _vectors(model: ir.Model) -> dict[str, float]:
    """Name -> what to fill each vector of a skeleton with: 0 where it is known to hold zeros alone."""
    fill: dict[str, float] = {}
    for name, entry in model.entries.items():
        if len(entry.spec.shape) < 2:
            fill[name] = 0.0 if model.has_values and not model.dequantize(name).any() else 1.0
    return fill


def _write_checkpoint(model: ir.Model, folder: Path, *, values: bool) -> None:
    try:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(checkpoint_config(model)), encoding="utf-8")
        for name, path in model.files.items():
            if path.suffix in _SIDE_SUFFIXES:
                shutil.copyfile(path, folder / name)
    except OSError as error:
        raise MachineError(f"cannot write the temporary checkpoint in {folder}: {error.strerror or error}") from error
    target = folder / "model.safetensors"
    if values:
        ir.write_safetensors(target, checkpoint_entries(model), _checkpoint_arrays(model), {"format": "pt"})
        return
    fill = _vectors(model)
    entries = [(name, _F32, model.entries[name].spec.shape) for name in fill]
    arrays = (np.full(shape, fill[name], _F32) for name, _, shape in entries)
    ir.write_safetensors(target, entries, arrays, {"format": "pt"})


def build_graph(model: ir.Model, work: Path) -> GraphSource:
    """Build the float graph with values in ``work``, an existing empty folder that the caller deletes.

    Raises:
        UnknownArchitecture: the builder does not know the model family.
        MissingDependency: a package that the builder imports is missing.
        MachineError: disk or memory did not suffice.
        AnyquantError: the builder failed otherwise; its last lines are in the message.
    """
    require_packages()
    _write_checkpoint(model, work / "checkpoint", values=True)
    result = _run(model, work, values=True)
    shutil.rmtree(work / "checkpoint")
    proto = (work / "graph" / "model.onnx").read_bytes()
    return GraphSource(proto, work / "graph", float(result["norm_offset"]))


_skeletons: dict[str, GraphSource] = {}


def build_skeleton(model: ir.Model) -> GraphSource:
    """The same graph without values, from config and shapes alone; a few seconds, remembered per model.

    Raises:
        As :func:`build_graph`.
    """
    require_packages()
    shapes = {name: entry.spec.shape for name, entry in model.entries.items()}
    key = json.dumps([checkpoint_config(model), shapes, _vectors(model), sorted(model.files)], sort_keys=True)
    key = hashlib.sha256(key.encode()).hexdigest()
    if key not in _skeletons:
        with tempfile.TemporaryDirectory(prefix="anyquant-graph-") as folder:
            work = Path(folder)
            _write_checkpoint(model, work / "checkpoint", values=False)
            result = _run(model, work, values=False)
            proto = (work / "graph" / "model.onnx").read_bytes()
        if len(_skeletons) >= 8:
            _skeletons.clear()
        _skeletons[key] = GraphSource(proto, None, float(result["norm_offset"]))
    return _skeletons[key]


def _run(model: ir.Model, work: Path, *, values: bool) -> dict[str, Any]:
    request, result_path = work / "request.json", work / "result.json"
    paths = {"checkpoint": str(work / "checkpoint"), "output": str(work / "graph"), "result": str(result_path)}
    request.write_text(json.dumps({**paths, "values": values}), encoding="utf-8")
    changed = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    # Nothing is imported from the folder that the user happens to be in.
    search = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    changed["PYTHONPATH"] = os.pathsep.join(search)
    done = subprocess.run(
        [sys.executable, "-P", "-m", WORKER, str(request)],
        env={**os.environ, **changed},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    try:
        result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        result = {"error": "killed" if done.returncode < 0 else "fault", "message": f"exit code {done.returncode}"}
    if "error" in result:
        _fail(model, result, (done.stderr or done.stdout)[-1500:])
    return result


def _fail(model: ir.Model, result: dict[str, Any], tail: str) -> None:
    category, message = result["error"], result["message"]
    if category == "architecture":
        names = model.config.get("architectures")
        names = names if isinstance(names, list) and names else [model.config.get("model_type")]
        raise UnknownArchitecture(
            f"the ONNX exporter does not know the architecture {names[0]!r}: onnxruntime-genai's model builder, "
            "which writes the float graph, does not support it. Export to GGUF instead, or upgrade onnxruntime-genai."
        )
    if category == "missing":
        raise MissingDependency(str(result.get("module") or "onnxruntime-genai"), "onnxruntime", "The ONNX exporter")
    if category == "machine":
        raise MachineError(f"the model builder of onnxruntime-genai could not finish: {message}. Free disk or memory.")
    if category == "killed":
        raise MachineError(
            f"the model builder of onnxruntime-genai was killed ({message}), most likely for want of memory. "
            "It holds the model in FP32; see the plan's peak memory."
        )
    raise AnyquantError(f"the model builder of onnxruntime-genai failed: {message}\nIts last lines:\n{tail}")
