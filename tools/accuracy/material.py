"""The models and texts that the benchmark runs on, fetched and made where they are missing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import fetch  # the script tools/fetch.py

from accuracy.encoder import unpack
from accuracy.sources import dithered
from accuracy.texts import shared_lines, write_texts
from anyquant.errors import UsageError

DITHERED, STOCK, ENCODER = "dithered", "stock", "encoder"
CALIBRATIONS = ("wikipedia", "news")

WORDS = {
    DITHERED: "SmolLM2-135M-Instruct, Q4_1 weights dithered to float",
    STOCK: "SmolLM2-135M-Instruct as it comes, in Q4_1",
    ENCODER: "all-MiniLM-L6-v2, a natively float sentence encoder",
}


@dataclass(frozen=True)
class Material:
    """A model with its texts.

    Attributes:
        name: of the source: one of those above, or the name of a folder.
        model: folder or .gguf file.
        calibration: text, or "self" for what the model says.
        evaluation: text.
    """

    name: str
    model: Path
    calibration: str
    evaluation: Path

    @property
    def is_encoder(self) -> bool:
        """Whether it makes embeddings, not text."""
        return self.name == ENCODER


def material(source: str, calibration: str, evaluation: Path | None, folder: Path) -> Material:
    """Fetch and make what a source needs.

    Args:
        source: dithered, stock, encoder, or the path of another language model.
        calibration: wikipedia, news, self or a file.
        evaluation: a file; None for the pages of Wikipedia that are for this.
        folder: for what is made.

    Raises:
        UsageError: there is no such source or text, or the texts share lines.
    """
    known = source in WORDS
    if not known and not Path(source).exists():
        raise UsageError(f"--source is {source!r}: neither {', '.join(WORDS)} nor a model that is there.")
    if source == ENCODER and calibration == "self":
        raise UsageError("--calib self: an encoder cannot sample text. Choose wikipedia, news or a file.")
    if evaluation is None or calibration in CALIBRATIONS:
        found = fetch.fetch("text", "wiki")
        texts = write_texts(found["text"], found["wiki"], folder / "texts")
        evaluation = evaluation or texts.evaluation
        if calibration in CALIBRATIONS:
            calibration = str(texts.wikipedia if calibration == "wikipedia" else texts.news)
    if calibration != "self" and not Path(calibration).is_file():
        raise UsageError(f"--calib is {calibration!r}: neither wikipedia, news, self nor a file.")
    if calibration != "self" and Path(calibration).resolve() == evaluation.resolve():
        raise UsageError(f"{evaluation} is the text of the calibration and of the evaluation. Choose another.")
    if calibration != "self" and (shared := shared_lines(Path(calibration), evaluation)):
        raise UsageError(
            f"{calibration} and {evaluation} have {len(shared)} lines in common, such as {min(shared)!r:.80}: what is "
            "calibrated on cannot be measured on. Remove them from one of the two."
        )
    if not known:
        return Material(Path(source).resolve().name, Path(source).resolve(), calibration, evaluation)
    if source == ENCODER:
        model = unpack(fetch.fetch("encoder")["encoder"], folder / "encoder-model")
    else:
        model = fetch.fetch("gguf")["gguf"]
        if source == DITHERED:
            model = dithered(model, folder / "dithered-model")
    return Material(source, model, calibration, evaluation)
