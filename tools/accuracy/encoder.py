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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from accuracy.interface import Floats, Shape
from anyquant.calibration import MatrixStatistics
from anyquant.calibration.folder import CalibrationFolder
from anyquant.calibration.store import gradients_file, moments_file, read_array, read_metadata
from anyquant.errors import CorruptFileError, InputError, MachineError
from anyquant.ir.safetensors_io import SafetensorsReader

if TYPE_CHECKING:
    import torch

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
        import torch

        result = np.empty((len(sentences), int(self._model.config.hidden_size)), np.float32)
        with torch.no_grad():
            for members, ids in _batches(self._tokens(sentences)):
                result[members] = self._embedded(input_ids=ids).numpy()
        return result

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

    def calibrate(self, sentences: Sequence[str], folder: Path) -> int:
        """Record the second moments of the inputs of all matrices, and what each of their rows counts.

        A row counts by the mean over tokens of g^2, as anyquant takes it of a language model's loss. Here g is the
        gradient of <v, embedding> with v normal and independent for each sentence: the mean of its square over v is the
        curvature (Gauss-Newton) of half the squared distance between embeddings, which 1 - cosine is. The gradient of 1
        - cosine itself is 0 at the source.

        Args:
            sentences: to calibrate on.
            folder: keeps what is recorded, for :func:`statistics_in`.

        Returns:
            Tokens seen.
        """
        import torch

        from anyquant.calibration.capture import Capture
        from anyquant.calibration.gradients import GradientSums
        from anyquant.calibration.moments import MomentSums
        from anyquant.calibration.weights import Piece

        tokens = self._tokens(sentences)
        seen = sum(map(len, tokens))
        moments, gradients = MomentSums(set(self.weights)), GradientSums(set(self.weights), seen, rows_alone=True)

        def both(*product: Any) -> None:
            moments.product(*product)
            gradients.product(*product)

        capture = Capture(both)
        capture.watch((Piece(name, name, len(weight)), weight) for name, weight in self._parameters.items())
        words, random = self._model.get_input_embeddings(), torch.Generator().manual_seed(0)
        with torch.enable_grad(), capture:
            for _, ids in _batches(tokens):
                start = words(ids).detach().requires_grad_()
                embedded = self._embedded(inputs_embeds=start)
                torch.autograd.grad((embedded * torch.randn(embedded.shape, generator=random)).sum(), start)
                moments.flush()
        found = CalibrationFolder(folder)
        found.save_gradients(0, gradients.result())
        found.save_moments(0, moments.result())
        return seen

    def _tokens(self, sentences: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(
            list(sentences), truncation=True, max_length=MOST_TOKENS, verbose=False
        )["input_ids"]
        return found

    def _embedded(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Embeddings [batch, hidden] of sentences of one length."""
        from torch.nn.functional import normalize

        return normalize(self._model(**inputs).last_hidden_state.mean(dim=1), dim=1)


def _batches(tokens: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Numbers of sentences of equal length, and their tokens [batch, length]."""
    import torch

    by_length: dict[int, list[int]] = defaultdict(list)
    for number, ids in enumerate(tokens):
        by_length[len(ids)].append(number)
    for _, members in sorted(by_length.items()):
        for start in range(0, len(members), _BATCH):
            part = members[start : start + _BATCH]
            yield part, torch.tensor([tokens[number] for number in part])


def statistics_in(folder: Path, *, gradients: bool) -> dict[str, MatrixStatistics]:
    """What :meth:`Encoder.calibrate` recorded of each matrix; the files must outlive it.

    Args:
        folder: of the calibration.
        gradients: whether they are wanted as well.
    """
    file, of_rows = folder / moments_file(0), folder / gradients_file(0)
    known = SafetensorsReader(of_rows).entries if gradients else {}
    return {
        name: MatrixStatistics(
            entry["tokens"], read_array(file, f"{number}.diagonal"), (file, f"{number}.moment"),
            (of_rows, name) if name in known else None,
        )
        for number, entry in enumerate(read_metadata(file, "inputs"))
        for name in entry["names"]
    }  # fmt: skip


def distances(reference: Floats, embeddings: Floats) -> NDArray[np.float64]:
    """1 - cosine of each pair of rows [n, hidden], float64 [n]; half the squared distance, which cancels nothing."""
    a, b = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in map(np.float64, (reference, embeddings)))
    result: NDArray[np.float64] = ((a - b) ** 2).sum(axis=1) / 2
    return result
