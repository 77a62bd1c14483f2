"""GGUF: one file for llama.cpp and its relatives: in stock tensor types where they are exact, else in our own.

Values are written exactly or refused. ``check`` and ``export`` share one path up to the header, so the bytes
promised are the bytes written.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from anyquant import ir
from anyquant.errors import UsageError
from anyquant.exporters.gguf import container, metadata
from anyquant.exporters.gguf.layout import Layout, Piece, arrange, chunks
from anyquant.exporters.gguf.metadata import Metadata
from anyquant.exporters.gguf.reader import read_tensors
from anyquant.exporters.gguf.stock import NotExact
from anyquant.exporters.gguf.write import encoded, refuse_existing, write_file
from anyquant.exporters.protocol import LAYOUTS, ExportOptions, ExportPlan
from anyquant.gguf_container import padded

_NO_METADATA = (
    "No metadata or tokenizer files are at hand yet, so the bytes count tensors only; the vocabulary adds a few MB."
)
_CHUNK = 1 << 22  # weights encoded at a time
_PER_WEIGHT = 40  # bytes of temporaries per weight of a chunk


class GGUFExporter:
    """Writes GGUF files; see ``anyquant.exporters.protocol.Exporter``."""

    name = "gguf"
    summary = "stock llama.cpp types where exact, else ours, which need a plug-in"

    def check(self, model: ir.Model, options: ExportOptions) -> ExportPlan:
        """Say what would be written, in exactly how many bytes, or which tensors do not fit and why.

        Raises:
            UsageError: unknown layout.
            UnknownArchitecture: the family has no known GGUF names.
            CorruptFileError: config.json lacks a number that is needed, or has an odd one.
            ExportRefused: llama.cpp's converter cannot take the tokenizer or configuration.
        """
        return self._prepare(model, options)[0]

    def export(
        self, model: ir.Model, path: Path, options: ExportOptions, progress: ir.Progress | None = None
    ) -> ExportPlan:
        """Write the file; nothing is left under its name unless it is whole.

        Raises:
            ExportRefused: a tensor cannot be written exactly in this layout.
            MachineError: the disk is full.
            UsageError: the path exists; and see :meth:`check`.
            UnknownArchitecture: see :meth:`check`.
        """
        path = Path(path)
        refuse_existing(path)
        if not model.has_values:
            raise UsageError("this model is a plan and holds no values: quantize it before exporting")
        # Most tensors fit the type made for their width, so they are read once, to be written.
        prepared = self._prepare(model, options, examine=False)
        if not prepared[0].refusals:
            try:
                return self._write(model, path, options, progress, *prepared)
            except NotExact:
                pass
        prepared = self._prepare(model, options)
        prepared[0].require(self.name)
        return self._write(model, path, options, progress, *prepared)

    def _write(
        self,
        model: ir.Model,
        path: Path,
        options: ExportOptions,
        progress: ir.Progress | None,
        plan: ExportPlan,
        header: bytes,
        base: Metadata,
        layout: Layout,
    ) -> ExportPlan:
        def tensors() -> Iterator[tuple[str, int, Iterator[np.ndarray]]]:
            count = len(layout.pieces)
            for name, _, _, raw in base.tensors:
                yield name, len(raw), iter([np.frombuffer(raw, np.uint8)])
            for done, piece in enumerate(layout.pieces, 1):
                yield piece.name, piece.nbytes, encoded(model.tensor(piece.name), piece, options.allow_rounding)
                if progress:
                    progress(piece.name, done, count)

        write_file(path, header, tensors(), base.alignment, plan.bytes)
        return plan

    def read(self, path: Path) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (IR name, float32 values in IR order) of every tensor; the values are decoded by gguf-py.

        Raises:
            InputError, CorruptFileError: not a GGUF file, or a damaged one.
        """
        return read_tensors(Path(path))

    def _prepare(
        self, model: ir.Model, options: ExportOptions, examine: bool = True
    ) -> tuple[ExportPlan, bytes, Metadata, Layout]:
        """Decide everything before the first byte: the plan, the file's header, and what goes behind it."""
        if options.layout not in LAYOUTS:
            raise UsageError(f"unknown layout {options.layout!r}; GGUF has {', '.join(LAYOUTS)}")
        base = metadata.load(model)
        layout = arrange(model, base, options, examine)
        extra = [(name, type_name, shape) for name, type_name, shape, _ in base.tensors]
        own = [(piece.gguf, piece.type, piece.shape) for piece in layout.pieces]
        values = metadata.finish(base, model, options, [(t, s) for _, t, s in own], layout.names)
        header = container.header_bytes(values, extra + own, base.alignment)
        sizes = [padded(container.nbytes(t, s), base.alignment) for _, t, s in extra + own]
        notes = []
        if not base.complete:
            notes.append(_NO_METADATA)
        if layout.assumed:
            notes.append(
                f"{layout.assumed} tensors are assumed to fit the type made for their width; whether each one does "
                "shows in its values, at export."
            )
        if options.allow_rounding:
            notes.append("Values that do not fit may be rounded; the file says so in anyquant.allow_rounding.")
        plan = ExportPlan(
            options.layout,
            {"": len(header) + sum(sizes)},
            {piece.name: piece.type for piece in layout.pieces} | {r.tensor: "" for r in layout.refusals},
            layout.refusals,
            tuple(notes),
            temporary_disk=0 if metadata.SOURCE in model.files else len(header),
            peak_memory=len(header) * 2 + max((_memory(model, piece) for piece in layout.pieces), default=0),
        )
        return plan, header, base, layout


def _memory(model: ir.Model, piece: Piece) -> int:
    """Bytes that one tensor takes while it is read, checked and encoded, estimated from its shape."""
    spec = model.entries[piece.name].spec
    at_once = spec.numel if len(chunks(spec)) == 1 else _CHUNK
    permuted = 0 if piece.order is None else 2 * piece.nbytes
    return spec.nbytes + 3 * spec.numel + _PER_WEIGHT * min(spec.numel, at_once) + permuted
