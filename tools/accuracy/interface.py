"""What a peer is: another quantizer of one matrix, with the bits that it would store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyquant.checkpoint import Checkpoint

Floats = NDArray[np.float32]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Peer:
    """A quantizer of single matrices.

    Attributes:
        name: with its setting.
        bits: shape [out, in] -> stored bits per weight, scales and zeros included.
        quantize: (weight float32 [out, in], moment float32 [in, in], the mean of x x^T over the inputs) -> float32
            [out, in], what would be computed with. A pure function; the weight stays as it is.
    """

    name: str
    bits: Callable[[Shape], float]
    quantize: Callable[[Floats, Floats], Floats]


@dataclass(frozen=True)
class Contender:
    """A quantizer of whole models: it chooses a peer for each matrix.

    Attributes:
        name: of the row in a table.
        peer: (name of a matrix as in a Hugging Face checkpoint, shape) -> what quantizes it.
        sequential: whether each matrix is quantized for what the quantized ones before it make of the text.
    """

    name: str
    peer: Callable[[str, Shape], Peer]
    sequential: bool = False

    @classmethod
    def uniform(cls, peer: Peer, *, sequential: bool = False) -> Contender:
        """The same for all matrices."""
        return cls(f"{peer.name}{', sequential' if sequential else ''}", lambda name, shape: peer, sequential)

    def bits(self, shapes: Mapping[str, Shape]) -> float:
        """Stored bits per weight of a model with these matrices."""
        return _mean(shapes, {name: self.peer(name, shape).bits(shape) for name, shape in shapes.items()})

    def quantize(self, name: str, weight: Floats, moment: Floats) -> Floats:
        """What stands for a matrix; see :class:`Peer`."""
        return self.peer(name, (weight.shape[0], weight.shape[1])).quantize(weight, moment)


@dataclass(frozen=True)
class WholeModel:
    """A quantizer that has to run the model.

    Attributes:
        name: of the row in a table.
        stored: shape [out, in] -> stored bits per weight.
        quantize: (checkpoint, tokens int64 [windows, window], names of the matrices) -> their float32 [out, in].
    """

    name: str
    stored: Callable[[Shape], float]
    quantize: Callable[[Checkpoint, NDArray[np.int64], list[str]], dict[str, Floats]]

    def bits(self, shapes: Mapping[str, Shape]) -> float:
        """Stored bits per weight of a model with these matrices."""
        return _mean(shapes, {name: self.stored(shape) for name, shape in shapes.items()})


def _mean(shapes: Mapping[str, Shape], bits: Mapping[str, float]) -> float:
    """The mean over matrices, each counted by its number of weights."""
    weights = {name: out * columns for name, (out, columns) in shapes.items()}
    return sum(bits[name] * weights[name] for name in shapes) / sum(weights.values())
