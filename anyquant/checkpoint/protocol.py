"""What a checkpoint is: named weights, read one at a time, and the files that go with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from anyquant import ir


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor from the header alone.

    Attributes:
        name: Hugging Face name; "name#e" is expert e of a tensor that is stored in 3-D.
        shape: in the orientation of the IR ([out, in] for matrices).
        dtype: "F64", "F32", "F16", "BF16" or a ggml type ("Q4_1"), as stored.
        nbytes: stored bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class Checkpoint(Protocol):
    """A model's weights, lazily read.

    Attributes:
        kind: "huggingface" or "gguf".
        name: what the user called it (file name or hub id), for messages.
        config: the model's config.json; synthesized for GGUF.
        tensors: in the order of transformers' ``state_dict``; aliases left out.
        aliases: tied name -> name of the tensor that holds the values.
        transposed: tensors that transformers keeps as [in, out] (Conv1D) or [experts, in, out]; they are shown
            and read as [out, in] here, whichever way the file stores them.
    """

    kind: str
    name: str
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    transposed: frozenset[str]

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) over names, shapes, dtypes, config and file contents."""

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Return the values in float32, C order: all, or the rows of a slice along the first axis.

        Raises:
            NonFiniteError: a value that was asked for is NaN or Inf; index and count are those of the whole tensor.
        """

    def spec(self, name: str) -> ir.Spec:
        """Return the form of ``raw(name)``, from the header alone."""

    def raw(self, name: str) -> ir.Tensor:
        """Return the tensor as stored: dense in its dtype, or the blocks of a stock ggml type.

        Raises:
            NonFiniteError: a value is NaN or Inf.
        """

    def side_files(self) -> dict[str, Path]:
        """Return the side files that exist before anything is written: name in the IR folder -> where it is now.

        Of a GGUF file that is "source.gguf", the file itself.
        """

    def code_folder(self) -> Path | None:
        """Return where code lies that the model ships and that is trusted; None if there is none."""

    def write_side_files(self, folder: Path) -> None:
        """Write what goes with the weights into a folder: config, tokenizer, generation settings."""

    def matrices(self) -> list[str]:
        """Name the 2-D weights of linear layers (not embeddings, head, norms, routers, positions)."""

    def embeddings(self) -> list[str]:
        """Name the token embedding and the output head, if stored."""
