"""A natively float model beside the language models: the sentence encoder all-MiniLM-L6-v2, in torch.

Source: Reimers and Gurevych, "Sentence-BERT" (arXiv 1908.10084): the mean of BERT's last hidden states over the tokens,
scaled to length 1. What quantization costs is 1 - cosine between the embeddings of the source and of the quantized
model. Sentences run in batches of equal length, so there is no padding that would have to be masked.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accuracy.interface import Contender, Floats, Shape
from anyquant.allocation import Table, allocate
from anyquant.calibration import MatrixStatistics
from anyquant.calibration.folder import CalibrationFolder
from anyquant.calibration.store import moments_file
from anyquant.errors import CorruptFileError, InfeasibleTarget, InputError, MachineError
from anyquant.ir import dequantize
from anyquant.methods import Method

MOST_TOKENS = 256  # what the model was trained with
_BATCH = 32


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the fetched model into a folder, unless it is there.

    Raises:
        CorruptFileError: the archive is damaged.
        MachineError: the folder cannot be written.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(Path(temporary) / folder.name)
            shutil.rmtree(folder, ignore_errors=True)
            (Path(temporary) / folder.name).replace(folder)
    except zipfile.BadZipFile as error:
        raise CorruptFileError(f"{archive} is damaged: {error}. Fetch it again.") from error
    except OSError as error:
        raise MachineError(f"cannot unpack {archive} to {folder}: {error.strerror or error}") from error
    return folder


class Encoder:
    """The encoder, with its linear matrices by name.

    Attributes:
        weights: name -> float32 [out, in] of the source, which stay as they are.
    """

    def __init__(self, folder: Path) -> None:
        """Load the model of a Hugging Face folder.

        Raises:
            InputError: it is not a BERT model, or its files are damaged.
        """
        from transformers import AutoTokenizer, BertModel
        from transformers.utils import logging

        quiet: Any = logging  # untyped
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder))
            untyped: Any = BertModel
            self._model = untyped.from_pretrained(str(folder)).eval()
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} holds no usable BERT model: {error}") from error
        self._parameters = {
            name: parameter
            for name, parameter in self._model.encoder.named_parameters(prefix="encoder")
            if parameter.ndim == 2
        }
        self.weights: dict[str, Floats] = {
            name: np.array(parameter.detach().numpy()) for name, parameter in self._parameters.items()
        }

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return int(self._model.config.num_hidden_layers)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name -> [out, in] of every matrix."""
        return {name: (weight.shape[0], weight.shape[1]) for name, weight in self.weights.items()}

    def embed(self, sentences: Sequence[str]) -> Floats:
        """Embeddings of length 1, float32 [sentences, hidden]."""
        return self._run(sentences, nullcontext(), lambda: None)

    @contextmanager
    def using(self, weights: Mapping[str, Floats]) -> Iterator[None]:
        """While this lasts, the model computes with these matrices in the place of its own.

        Raises:
            InputError: an unknown name, or another shape.
        """
        import torch

        for name, values in weights.items():
            expected = self.shapes.get(name)
            if values.shape != expected:
                raise InputError(f"{name} is {list(values.shape)}; the encoder has {expected} there")
        try:
            with torch.no_grad():
                for name, values in weights.items():
                    self._parameters[name].copy_(torch.from_numpy(values))
            yield
        finally:
            with torch.no_grad():
                for name in weights:
                    self._parameters[name].copy_(torch.from_numpy(self.weights[name]))

    def statistics(self, sentences: Sequence[str], folder: Path) -> dict[str, MatrixStatistics]:
        """Second moments of the inputs of all matrices, as methods of anyquant take them.

        Args:
            sentences: to calibrate on.
            folder: keeps the moments; must outlive the result.
        """
        from anyquant.calibration.capture import Capture
        from anyquant.calibration.moments import MomentSums
        from anyquant.calibration.weights import Piece

        sums = MomentSums(set(self._parameters))
        capture = Capture(sums.product)
        capture.watch((Piece(name, name, len(weight)), weight) for name, weight in self._parameters.items())
        self._run(sentences, capture, sums.flush)
        found, moments = CalibrationFolder(folder), sums.result()
        found.save_moments(0, moments)
        file = folder / moments_file(0)
        return {
            name: MatrixStatistics(moment.tokens, moment.diagonal, (file, f"{number}.moment"))
            for number, moment in enumerate(moments)
            for name in moment.names
        }

    def _run(
        self, sentences: Sequence[str], watching: AbstractContextManager[Any], after: Callable[[], None]
    ) -> Floats:
        import torch

        ids = self._tokenizer(list(sentences), truncation=True, max_length=MOST_TOKENS, verbose=False)["input_ids"]
        by_length: dict[int, list[int]] = defaultdict(list)
        for number, tokens in enumerate(ids):
            by_length[len(tokens)].append(number)
        result = np.empty((len(ids), int(self._model.config.hidden_size)), np.float32)
        with torch.no_grad(), watching:
            for _, members in sorted(by_length.items()):
                for start in range(0, len(members), _BATCH):
                    part = members[start : start + _BATCH]
                    hidden = self._model(input_ids=torch.tensor([ids[i] for i in part])).last_hidden_state
                    after()
                    mean = hidden.mean(dim=1)
                    result[part] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return result


def distances(reference: Floats, embeddings: Floats) -> NDArray[np.float64]:
    """1 - cosine of each pair of rows [n, hidden], float64 [n]; half the squared distance, which cancels nothing."""
    a, b = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in map(np.float64, (reference, embeddings)))
    result: NDArray[np.float64] = ((a - b) ** 2).sum(axis=1) / 2
    return result


def by_peer(encoder: Encoder, contender: Contender, statistics: Mapping[str, MatrixStatistics]) -> dict[str, Floats]:
    """All matrices as a peer quantizes them."""
    return {name: contender.quantize(name, weight, statistics[name].full()) for name, weight in encoder.weights.items()}


def by_method(
    encoder: Encoder,
    method: Method,
    options: Mapping[str, Any],
    statistics: Mapping[str, MatrixStatistics],
    bits: float,
) -> tuple[dict[str, Floats], float]:
    """All matrices as a method of anyquant quantizes them, with the bits spread over the whole model.

    Errors are relative, as there is no loss to take gradients of. ``anyquant quantize`` would give each matrix the same
    budget then where a matrix has rows or columns that can share one.

    Args:
        encoder: the model.
        method: of anyquant.
        options: of the method; the rest are its defaults.
        statistics: of every matrix.
        bits: stored bits per weight, everything counted.

    Returns:
        Name -> float32 [out, in], and the bits per weight that were stored.

    Raises:
        InfeasibleTarget: fewer bits than the method can do with.
    """
    settings = method.settings(options)
    names, shapes = list(encoder.weights), encoder.shapes
    levels = [method.levels(shapes[name], settings) for name in names]
    weights = sum(out * columns for out, columns in shapes.values())
    seen = [statistics[name] if method.needs_statistics(settings) else None for name in names]
    tables = [
        Table(level.nbytes, method.errors(encoder.weights[name], known, settings))
        for name, level, known in zip(names, levels, seen, strict=True)
    ]

    def stored(chosen: Sequence[NDArray[np.uint8]]) -> float:
        nbytes = sum(
            level.overhead + int(np.asarray(level.nbytes, np.int64)[each].sum())
            for level, each in zip(levels, chosen, strict=True)
        )
        return 8 * nbytes / weights

    least, most = (stored([np.full(level.units, at % level.count, np.uint8) for level in levels]) for at in (0, -1))
    if bits < least:
        raise InfeasibleTarget(
            f"{method.name} needs at least {least:.3f} bits per weight for the encoder, not {bits:g}.", (least, most)
        )
    chosen = allocate(tables, lambda each: stored(each) <= bits)
    values = {
        name: dequantize(method.quantize(encoder.weights[name], each, known, settings))
        for name, each, known in zip(names, chosen, seen, strict=True)
    }
    return values, stored(chosen)
