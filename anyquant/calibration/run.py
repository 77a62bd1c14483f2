"""Calibration from start to finish, or from where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyquant.calibration.folder import CalibrationFolder
from anyquant.calibration.settings import GRADIENT_FREE, CalibrationSettings
from anyquant.calibration.store import Statistics, open_statistics
from anyquant.checkpoint import Checkpoint
from anyquant.errors import InputError, UsageError
from anyquant.ir import Progress

if TYPE_CHECKING:
    from anyquant.calibration.blocks import StreamedModel
    from anyquant.calibration.tokens import Tokens

_WORDS = {
    "source": "kind of source", "dataset": "data set", "sha256": "content of the text", "model": "model",
    "matrices": "set of matrices",
}  # fmt: skip


def calibrate(
    checkpoint: Checkpoint,
    names: list[str],
    settings: CalibrationSettings,
    folder: Path,
    progress: Progress | None = None,
) -> Statistics:
    """Run the calibration, or go on with one that was interrupted; a complete folder is just opened.

    The number of threads is torch's own when the calibration begins; it is kept in the folder and set again when one
    is gone on with, since sums depend on it. So the files of an interrupted calibration are, byte for byte, those of
    one that was not.

    Args:
        checkpoint: the model. It is held one block at a time, but whole, in FP32, while it samples a text ("self").
        names: the checkpoint's names of the matrices to be quantized.
        settings: which text, how much of it, and what is recorded.
        folder: for the files; made if there is none.
        progress: called as things advance, with the name of the stage: sampling, moments, gradients.

    Raises:
        UsageError: a setting is out of range, a name is not in the checkpoint, or the folder holds a calibration of
            something else.
        InputError: the text, the tokenizer or the model cannot be used (see its subclasses).
        MissingDependency: a dataset was asked for, and the package datasets is not installed.
        MachineError: the disk is full.
    """
    settings = settings.resolved()
    settings.check()
    unknown = [name for name in names if name not in checkpoint.tensors]
    if unknown:
        raise UsageError(f"{checkpoint.name} has no tensor {unknown[0]!r} to calibrate")
    identity = {
        **settings.identity(),
        "model": checkpoint.fingerprint(),
        "matrices": {"count": len(names), "sha256": hashlib.sha256(json.dumps(names).encode()).hexdigest()},
    }
    work = CalibrationFolder(folder)
    about = work.about()
    if about is not None:
        _require_same(folder, about["identity"], identity)
        if about["complete"]:
            return open_statistics(folder)

    import torch

    versions = {package: version(package) for package in ("anyquant", "torch", "transformers", "tokenizers")}
    if about is None:
        about = work.begin(identity, versions, torch.get_num_threads())
    _require_same(folder, about["versions"], versions)
    with torch_threads(about["threads"]):
        _run(checkpoint, names, settings, work, progress or (lambda name, done, whole: None))
    return work.finish(names)


def _run(
    checkpoint: Checkpoint, names: list[str], settings: CalibrationSettings, work: CalibrationFolder, progress: Progress
) -> None:
    import torch

    from anyquant.calibration.backward import FisherPass
    from anyquant.calibration.blocks import StreamedModel
    from anyquant.calibration.passes import ForwardPass

    model = StreamedModel(checkpoint)
    ids = work.tokens()
    if ids is None:
        found = _tokens(checkpoint, model, settings, progress)
        ids = found.ids
        work.save_tokens(ids, found.notes)
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    if ids.max() >= vocabulary:
        raise InputError(
            f"{checkpoint.name}: its tokenizer gives the token {ids.max()}, but its embedding has only {vocabulary:,} "
            "rows. The tokenizer files belong to another model."
        )
    arguments = (model, torch.from_numpy(ids), set(names), work, progress)
    if settings.importance in GRADIENT_FREE:
        ForwardPass(*arguments, diagonals_alone=not settings.has_moments).run()
    else:
        FisherPass(*arguments, rows_alone=settings.importance == "gradient", row_groups=settings.row_groups).run()


def _tokens(checkpoint: Checkpoint, model: StreamedModel, settings: CalibrationSettings, progress: Progress) -> Tokens:
    from anyquant.calibration import sampling, tokens

    tokenizer = tokens.load_tokenizer(checkpoint)
    tokens.require_context(checkpoint, settings)
    if settings.kind == "self":
        return sampling.sample(model, tokenizer, settings, progress)
    if settings.kind == "text":
        return tokens.from_text(tokenizer, settings)
    return tokens.from_dataset(tokenizer, settings)


def _require_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse the folder of another calibration.

    Raises:
        UsageError: names what differs.
    """
    differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if differing:
        each = "; ".join(
            f"{_WORDS.get(key, key)}: {_brief(found.get(key))} there, {_brief(wanted.get(key))} now"
            for key in differing
        )
        raise UsageError(
            f"{folder} holds a calibration of something else ({each}). Name another work folder, or remove this one."
        )


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads while this lasts."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
