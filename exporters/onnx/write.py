"""Writing the folder: proof by value against the float graph, then the data file, then the rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from anyquant import ir
from anyquant.errors import AnyquantError, ExportRefused, MachineError
from anyquant.exporters.onnx.binding import Binding, Part
from anyquant.exporters.onnx.codebook import CodebookForm, stored_arrays
from anyquant.exporters.onnx.editing import DATA_FILE, Item
from anyquant.exporters.onnx.graph_source import GraphSource
from anyquant.exporters.onnx.job import MODEL_FILE, Job
from anyquant.exporters.onnx.layout import Group
from anyquant.exporters.onnx.matmul_nbits import integer_matrix
from anyquant.exporters.onnx.rewrite import TRANSPOSED
from anyquant.runtime.onnx_session import LIBRARY, operators

GENAI_CONFIG = "genai_config.json"


@contextmanager
def machine_errors(path: Path, need: int) -> Iterator[None]:
    """Turn OSError into MachineError; ``need`` is the bytes that the whole job takes."""
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"cannot write {path}: {error.strerror or error}. The export needs {need:,} bytes in {path.parent}, most "
            "of them for a short while. Nothing was left there."
        ) from error


def require_space(parent: Path, need: int) -> None:
    """Raise MachineError if the disk has less than ``need`` bytes free."""
    free = shutil.disk_usage(parent).free
    if free < need:
        raise MachineError(
            f"the export needs {need:,} bytes in {parent}, most of them for a short while, and {free:,} are free. "
            "Free some space or choose another folder."
        )


class FloatGraph:
    """The float graph's weights, and the proof that they are the IR's."""

    def __init__(self, job: Job, source: GraphSource) -> None:
        """Open the data file that the graph source wrote."""
        assert source.folder is not None
        self._data = np.memmap(source.folder / DATA_FILE, np.uint8, "r")
        self._places = job.source_places
        self._rows: dict[Part, list[tuple[Binding, int]]] = {}
        for binding in job.bindings.values():
            for i, part in enumerate(binding.parts):
                self._rows.setdefault(part, []).append((binding, sum(p.rows for p in binding.parts[:i])))

    def raw(self, initializer: str) -> np.ndarray:
        """The bytes of an initializer."""
        offset, length = self._places[initializer]
        return self._data[offset : offset + length]

    def prove(self, part: Part, rows: slice, values: np.ndarray) -> None:
        """Compare values, float32 of these rows of the part's tensor, with the graph's wherever it is; -0 equals +0.

        Raises:
            ExportRefused: they differ; nothing can be written exactly then.
        """
        for binding, start in self._rows[part]:
            self._prove(part, rows, values, binding, start)

    def _prove(self, part: Part, rows: slice, values: np.ndarray, binding: Binding, start: int) -> None:
        flat = self.raw(binding.initializer).view(np.float32)
        total = sum(p.rows for p in binding.parts)
        matrix = flat.reshape(-1, total).T if binding.transposed else flat.reshape(total, -1)
        first = start + rows.start - part.start
        found = matrix[first : first + rows.stop - rows.start]
        expected = values.reshape(found.shape)
        if binding.addend:
            expected = expected + np.float32(binding.addend)
        if not np.array_equal(found, expected):
            raise ExportRefused(
                f"{part.tensor}: {int((found != expected).sum()):,} of {expected.size:,} values of "
                f"{binding.initializer} in the float graph differ from the IR's, so the graph source changes this "
                "tensor and it cannot be written exactly. Export to GGUF instead."
            )


def prove_floats(model: ir.Model, job: Job, graph: FloatGraph) -> None:
    """Prove all that is bound but the parts that are stored as integers.

    Raises:
        ExportRefused: the graph holds other values than the IR.
    """
    for binding in job.bindings.values():
        for part in binding.parts:
            if part in job.integers:
                continue
            tensor = model.tensor(part.tensor)
            for rows in part_chunks(part, tensor.spec.shape):
                values = ir.dequantize(tensor, rows if tensor.spec.shape else None)
                graph.prove(part, rows, values)


def part_chunks(part: Part, shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of a tensor's rows that cover a part, a few at a time."""
    for rows in ir.row_chunks((part.rows, *shape[1:])):
        yield slice(part.start + rows.start, part.start + rows.stop)


class _Groups:
    """Arrays of one group at a time; items of a group follow one another in the file."""

    def __init__(self, model: ir.Model, graph: FloatGraph) -> None:
        self._model, self._graph = model, graph
        self._name = ""
        self._arrays: dict[str, np.ndarray] = {}

    def array(self, group: Group, suffix: str) -> np.ndarray:
        if self._name != group.name:
            self._name, self._arrays = group.name, self._load(group)
        return self._arrays[suffix] if group.form else self._floats(group, suffix)

    def _load(self, group: Group) -> dict[str, np.ndarray]:
        if isinstance(group.form, CodebookForm):
            return stored_arrays(self._model.tensor(group.parts[0].tensor))
        return self._integers(group) if group.form else {}

    def _integers(self, group: Group) -> dict[str, np.ndarray]:
        """What is stored, after the proof that it stands for the values of the float graph."""
        pieces: list[dict[str, np.ndarray]] = []
        for part in group.parts:
            tensor = self._model.tensor(part.tensor)
            for rows in part_chunks(part, tensor.spec.shape):
                matrix = integer_matrix(tensor, rows)
                self._graph.prove(part, rows, matrix.values(tensor.spec.shape[1]))
                pieces.append(matrix.arrays())
        return {suffix: np.concatenate([piece[suffix] for piece in pieces]) for suffix in pieces[0]}

    def _floats(self, group: Group, suffix: str) -> np.ndarray:
        values = np.concatenate(
            [ir.dequantize(self._model.tensor(part.tensor), slice(part.start, part.stop)) for part in group.parts]
        )
        if suffix == TRANSPOSED:
            values = np.ascontiguousarray(values.T)
        if group.dtype == "FLOAT16":
            with np.errstate(over="ignore"):
                return values.astype(np.float16)
        if group.dtype == "BFLOAT16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values


def write_files(model: ir.Model, job: Job, source: GraphSource, folder: Path, progress: ir.Progress | None) -> None:
    """Prove by value, and write model.onnx and model.onnx.data into ``folder``, synced.

    Raises:
        ExportRefused: the float graph holds other values than the IR.
        AnyquantError: an array has other bytes than promised.
        OSError: the disk is full.
    """
    graph = FloatGraph(job, source)
    prove_floats(model, job, graph)
    groups = _Groups(model, graph)
    with (folder / DATA_FILE).open("xb") as file:
        for done, (item, offset) in enumerate(zip(job.items, job.offsets, strict=True), 1):
            file.write(bytes(offset - file.tell()))
            file.write(_bytes(item, groups, graph))
            if progress:
                progress(item.name, done, len(job.items))
        file.flush()
        os.fsync(file.fileno())
    with (folder / MODEL_FILE).open("xb") as file:
        file.write(job.proto)
        file.flush()
        os.fsync(file.fileno())


def _bytes(item: Item, groups: _Groups, graph: FloatGraph) -> memoryview:
    if item.constant is not None:
        array: np.ndarray = np.asarray(item.constant)
    elif item.group is not None:
        array = groups.array(item.group, item.suffix)
    else:
        array = graph.raw(item.name)
    if array.nbytes != item.nbytes:
        raise AnyquantError(f"{item.name}: has {array.nbytes:,} bytes, promised were {item.nbytes:,}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def copy_side_files(source: GraphSource, folder: Path, flavor: str, *, runtime: bool) -> None:
    """Tokenizer files and genai_config.json, as the builder wrote them; "plain" goes without the latter.

    With the runtime, the library of operators too, which genai_config.json then names.
    """
    assert source.folder is not None
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and path.name not in (MODEL_FILE, DATA_FILE):
            if path.name == GENAI_CONFIG and flavor == "plain":
                continue
            shutil.copyfile(path, folder / path.name)
    if runtime:
        shutil.copyfile(operators(), folder / LIBRARY)
        if (folder / GENAI_CONFIG).exists():
            _name_library(folder / GENAI_CONFIG)


def _name_library(path: Path) -> None:
    """Let onnxruntime-genai load the library, which it looks for beside the file."""
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = LIBRARY
    path.write_text(json.dumps(config, indent=4) + "\n")
