"""Equality of dequantized tensors, bit for bit, by SHA-256 (-0 counts as +0)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from anyquant import ir
from anyquant.errors import CorruptFileError
from anyquant.validation.results import TensorComparison, TensorDifference


def compare_ir(model: ir.Model, progress: ir.Progress | None = None) -> TensorComparison:
    """Dequantize every tensor of the IR again and compare with the manifest."""
    differences = []
    values = 0
    for done, (name, entry) in enumerate(model.entries.items(), 1):
        values += entry.spec.numel
        try:
            digest = ir.tensor_digest(model.tensor(name))
        except CorruptFileError as error:
            differences.append(TensorDifference(name, f"unreadable: {error}"))
        else:
            if digest != entry.sha256:
                differences.append(
                    TensorDifference(name, "its values are not those the manifest recorded: the file was edited")
                )
        if progress:
            progress("tensors of the IR", done, len(model.entries))
    return TensorComparison(
        "IR", len(model.entries) - len(differences), len(model.entries), tuple(differences), n_values=values
    )


def compare_file(
    model: ir.Model,
    file: str,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    rounding: str = "",
    progress: ir.Progress | None = None,
) -> TensorComparison:
    """Compare what an exporter reads back from its file with the IR's manifest.

    Args:
        model: the IR, with values.
        file: "GGUF" or "ONNX", for messages.
        tensors: (IR tensor name, float32 values in the IR's orientation), of ``Exporter.read``. A tied tensor may
            come under either name, or under both.
        rounding: why values may be rounded, "" if they must be equal.
        progress: called after each tensor.
    """
    differences: list[TensorDifference] = []
    good: set[str] = set()
    bad: set[str] = set()
    values = 0
    for name, found in tensors:
        stored = model.aliases.get(name, name)
        entry = model.entries.get(stored)
        if entry is None:
            differences.append(TensorDifference(name, "the IR has no tensor of this name"))
            continue
        values += int(found.size)
        if tuple(found.shape) == tuple(entry.spec.shape) and ir.digest(found) == entry.sha256:
            good.add(stored)
        else:
            bad.add(stored)
            differences.append(_locate(model, name, stored, found))
        if progress:
            progress(f"tensors of the {file} file", len(good | bad), len(model.entries))
    differences += [
        TensorDifference(name, "missing in the file") for name in model.entries if name not in good and name not in bad
    ]
    return TensorComparison(file, len(good - bad), len(model.entries), tuple(differences), rounding, values)


def _locate(model: ir.Model, name: str, stored: str, found: np.ndarray) -> TensorDifference:
    """The first index where a tensor differs from the IR's."""
    shape = tuple(model.entries[stored].spec.shape)
    if tuple(found.shape) != shape:
        return TensorDifference(name, f"has shape {list(found.shape)}, the IR {list(shape)}")
    expected = model.dequantize(stored)
    different = ~(found == expected)
    count = int(np.count_nonzero(different))
    if not count:
        return TensorDifference(name, "equals the IR's values, but those are not what the manifest recorded")
    index = tuple(int(i) for i in np.unravel_index(int(different.argmax()), shape))
    return TensorDifference(
        name,
        f"{count:,} of {found.size:,} values differ",
        index,
        float(expected[index]),
        float(found[index]),
        _is_rounded(expected, found),
    )


def _is_rounded(values: np.ndarray, found: np.ndarray) -> bool:
    """Whether a tensor is what --allow-rounding allows: the values in FP16, or a norm that is stored plus 1 in FP32."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16).astype(np.float32)
    if np.isfinite(half).all() and np.array_equal(found, half):
        return True
    one = np.float32(1)
    return values.ndim == 1 and np.array_equal(found, (values + one) - one)


def compare_export(
    model: ir.Model, exporter: str, path: Path, *, rounding: str = "", progress: ir.Progress | None = None
) -> TensorComparison:
    """Read a file back through its exporter and compare.

    Args:
        model: the IR, with values.
        exporter: "gguf" or "onnx": a name of the entry-point group ``anyquant.exporters``.
        path: the exported file or folder.
        rounding: as for :func:`compare_file`.
        progress: likewise.
    """
    from anyquant.exporters.registry import get_exporter

    return compare_file(
        model, exporter.upper(), get_exporter(exporter).read(path), rounding=rounding, progress=progress
    )
