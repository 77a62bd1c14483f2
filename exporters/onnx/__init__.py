"""ONNX: a folder with model.onnx, its data, and what onnxruntime-genai needs to run it.

The float graph comes from onnxruntime-genai's model builder; a pass replaces float matrices by what the IR holds.
Values are written exactly or refused. ``check`` and ``export`` share one path up to the bytes of model.onnx.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from anyquant import ir
from anyquant.errors import UsageError
from anyquant.exporters.protocol import LAYOUTS, ExportOptions, ExportPlan
from anyquant.runtime.onnx_session import LIBRARY, operators

FLAVORS = ("genai", "plain")
FALLBACKS = ("fold", "stream")
ACCURACY_LEVELS = range(5)


class ONNXExporter:
    """Writes ONNX folders; see ``anyquant.exporters.protocol.Exporter``."""

    name = "onnx"
    summary = "MatMulNBits and CodebookMatMul graphs for stock ONNX Runtime and onnxruntime-genai"

    def check(self, model: ir.Model, options: ExportOptions) -> ExportPlan:
        """Say what would be written, in exactly how many bytes, or what does not fit and why.

        Runs the model builder on the model's shapes, without weights, in a child process: some seconds for the
        first check of a model, nothing for the next.

        Raises:
            UsageError: unknown layout, flavor, fallback or accuracy level.
            UnknownArchitecture: the builder does not know the family.
            CorruptFileError: config.json contradicts itself.
            MissingDependency: onnx, onnx-ir or onnxruntime-genai is not installed.
            MachineError: there is no library to put beside the model.
        """
        _check_options(options)
        from anyquant.exporters.onnx.graph_source import build_skeleton, require_packages

        require_packages()
        from anyquant.exporters.onnx.job import prepare
        from anyquant.exporters.onnx.layout import refusals

        return prepare(model, options, build_skeleton(model), refusals(model, options)).plan

    def export(
        self, model: ir.Model, path: Path, options: ExportOptions, progress: ir.Progress | None = None
    ) -> ExportPlan:
        """Write the folder; nothing is left under its name unless it is whole.

        Raises:
            ExportRefused: a matrix cannot be written exactly in this layout, or the graph source changed a weight.
            UsageError: the folder exists and is not empty; or see :meth:`check`.
            MachineError: disk or memory do not suffice, or there is no library to put beside the model.
            CorruptFileError: config.json contradicts itself.
        """
        _check_options(options)
        if not model.has_values:
            raise UsageError("this model is a plan and holds no values: quantize it before exporting")
        path = Path(path)
        ir.refuse_existing(path)
        from anyquant.exporters.onnx.graph_source import build_graph, require_packages, temporary_disk

        require_packages()
        from anyquant.exporters.onnx import write
        from anyquant.exporters.onnx.job import prepare
        from anyquant.exporters.onnx.layout import refusals

        refused = tuple(refusals(model, options))
        ExportPlan(options.layout, {}, dict.fromkeys(model.entries, ""), refused).require(self.name)
        need = temporary_disk(model)
        token = secrets.token_hex(4)
        temporary = path.parent / f".{path.name}.partial-{token}"
        work = path.parent / f".{path.name}.graph-{token}"
        try:
            with write.machine_errors(path, need):
                temporary.mkdir(parents=True)
                work.mkdir()
                write.require_space(path.parent, need)
                source = build_graph(model, work)
                job = prepare(model, options, source)
                write.write_files(model, job, source, temporary, progress)
                write.copy_side_files(source, temporary, options.flavor, runtime=LIBRARY in job.plan.files)
                if path.exists():
                    path.rmdir()
                temporary.rename(path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(temporary, ignore_errors=True)
        return job.plan

    def read(self, path: Path) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (IR tensor name, float32 values) of a folder that :meth:`export` wrote, in IR order.

        Raises:
            InputError: not such a folder.
            CorruptFileError: truncated or edited.
            MissingDependency: onnx is not installed.
        """
        from anyquant.exporters.onnx.reader import read_tensors

        return read_tensors(Path(path))


def _check_options(options: ExportOptions) -> None:
    if options.layout not in LAYOUTS:
        raise UsageError(f"unknown layout {options.layout!r}; known: {', '.join(LAYOUTS)}")
    if options.flavor not in FLAVORS:
        raise UsageError(f"the ONNX exporter cannot write flavor {options.flavor!r}; it knows: {', '.join(FLAVORS)}")
    if options.fallback not in FALLBACKS:
        raise UsageError(f"unknown fallback {options.fallback!r}; known: {', '.join(FALLBACKS)}")
    if options.accuracy_level not in ACCURACY_LEVELS:
        raise UsageError(f"accuracy level {options.accuracy_level!r} is not in 0..4")
    if options.with_runtime:
        operators()
