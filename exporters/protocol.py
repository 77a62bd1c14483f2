"""What an exporter is: the protocol that built-in and third-party exporters share.

Exporters are found through the entry-point group ``anyquant.exporters``. They write the values of the
intermediate representation exactly or refuse; they never quantize.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from anyquant import ir
from anyquant.errors import ExportRefused

LAYOUTS = ("native", "f32", "f16")


@dataclass(frozen=True)
class ExportOptions:
    """Settings of one export; an exporter reads those that concern its format.

    Attributes:
        layout: one of LAYOUTS.
        allow_rounding: round values that do not fit the layout; recorded in the file.
        accuracy_level: ONNX: of MatMulNBits; 0 keeps activations in FP32, 4 rounds them to 8 bits.
        flavor: ONNX: "genai" (with what onnxruntime-genai needs) or "plain".
        fallback: ONNX: what codebook matrices are where no kernel for them is registered: "fold" (FP32 once loaded) or
            "stream" (packed, decoded in every run).
        with_runtime: ONNX: whether the library of that kernel lies beside the model.
    """

    layout: str = "native"
    allow_rounding: bool = False
    accuracy_level: int = 0
    flavor: str = "genai"
    fallback: str = "fold"
    with_runtime: bool = False


@dataclass(frozen=True)
class Refusal:
    """One tensor that the format cannot hold exactly, why, and what would fit."""

    tensor: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class ExportPlan:
    """What an export writes, told before it is written.

    Attributes:
        layout: the layout that the plan is for.
        files: relative file name -> exact bytes (one entry named "" for a single-file format).
        types: IR tensor name -> how it is stored ("Q4_0", "MatMulNBits 4-bit", "F32", ...).
        refusals: tensors that cannot be written exactly; the export fails while there are any.
        notes: what a user should know beforehand, one sentence each.
        temporary_disk: bytes of temporary files while exporting.
        peak_memory: bytes of memory needed while exporting, estimated from shapes.
    """

    layout: str
    files: dict[str, int]
    types: dict[str, str]
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    temporary_disk: int = 0
    peak_memory: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())

    def require(self, exporter: str) -> None:
        """Raise ExportRefused, naming the first tensors and the way out, if anything is refused."""
        if not self.refusals:
            return
        lines = [f"{r.tensor}: {r.reason}" for r in self.refusals[:3]]
        if len(self.refusals) > 3:
            lines.append(f"... and {len(self.refusals) - 3} more tensors")
        remedies = dict.fromkeys(r.remedy for r in self.refusals)
        raise ExportRefused(
            f"the {exporter} exporter cannot write {len(self.refusals)} of {len(self.types)} tensors exactly in "
            f"layout {self.layout}:\n  " + "\n  ".join(lines) + "\nNext: " + "; or ".join(list(remedies)[:3])
        )


class Exporter(Protocol):
    """The protocol; see the module's docstring."""

    name: str

    def check(self, model: ir.Model, options: ExportOptions) -> ExportPlan:
        """Say what would be written, and how many bytes, or why not.

        Works from headers alone when ``model.has_values`` is false; exactness that depends on values
        is then assumed and said in the notes.
        """

    def export(
        self, model: ir.Model, path: Path, options: ExportOptions, progress: ir.Progress | None = None
    ) -> ExportPlan:
        """Write the model under a temporary name and rename; raise ExportRefused where values do not fit."""

    def read(self, path: Path) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (IR tensor name, float32 values in IR order), read independently of the writer."""
