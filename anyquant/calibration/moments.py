"""Second moments of the inputs of matrices, summed over tokens."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from anyquant.calibration.capture import Reading
from anyquant.calibration.store import Floats, Moment
from anyquant.errors import AnyquantError

_ROWS = 256
"""Rows of a moment that are computed in one product: only what is right of the diagonal is needed."""


class Square:
    """The sum of x x^T over tokens: its upper triangle in FP32, its diagonal in FP64.

    Attributes:
        full: float32 [in, in], right of the diagonal; None where the diagonal is all that is wanted.
    """

    def __init__(self, columns: int, *, diagonal_alone: bool = False) -> None:
        """Begin with 0 tokens."""
        self.tokens = 0
        self.full = None if diagonal_alone else torch.zeros(columns, columns)
        self.diagonal = torch.zeros(columns, dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        """Add tokens, FP32 [tokens, in]."""
        self.tokens += len(x)
        self.diagonal += x.square().sum(dim=0, dtype=torch.float64)
        if self.full is not None:
            for row in range(0, x.shape[1], _ROWS):
                self.full[row : row + _ROWS, row:].addmm_(x[:, row : row + _ROWS].T, x[:, row:])

    def triangle(self, tokens: int) -> Floats:
        """The upper triangle of the mean over so many tokens, row by row, float32 [in * (in + 1) / 2]."""
        assert self.full is not None
        square, diagonal = self.full.numpy(), (self.diagonal / tokens).numpy()
        n = len(square)
        result, at = np.empty(n * (n + 1) // 2, np.float32), 0
        for row in range(n):
            np.divide(square[row, row:], np.float32(tokens), out=result[at : at + n - row])
            result[at] = diagonal[row]  # of which more digits are right
            at += n - row
        return result


class MomentSums:
    """Accumulates the moments of one section of the model.

    Matrices that read the very same tensors share one moment. Which these are is known only once all have been
    called, so inputs wait in memory for :meth:`flush`. Products are FP32, at most a thousand tokens in each, added
    up in the order of the calls; the diagonal is summed in FP64.
    """

    def __init__(self, wanted: set[str], *, diagonals_alone: bool = False) -> None:
        """Record these matrices and pass over all others; of their moments all, or the diagonals."""
        self._wanted, self._diagonals_alone = wanted, diagonals_alone
        self._waiting: list[tuple[torch.Tensor, int, list[str]]] = []
        self._sums: dict[tuple[str, ...], Square] = {}

    def product(self, x: torch.Tensor, readings: list[Reading], output: torch.Tensor) -> None:
        """Take note of a product; see :data:`anyquant.calibration.capture.Product`."""
        names = [reading.name for reading in readings if reading.name in self._wanted]
        if not names or not x.numel():
            return
        x = x.detach()
        for other, version, readers in self._waiting:
            if _same(x, other) and x._version == version:
                readers += names
                return
        self._waiting.append((x, x._version, names))

    def flush(self) -> None:
        """Add what waits to the sums.

        Raises:
            AnyquantError: the model's code has written over an input since.
        """
        for x, version, names in self._waiting:
            if x._version != version:
                raise AnyquantError(f"{names[0]}: the model's code overwrote its input before it could be recorded")
            key = tuple(dict.fromkeys(names))
            columns = x.shape[-1]
            if key not in self._sums:
                self._sums[key] = Square(columns, diagonal_alone=self._diagonals_alone)
            self._sums[key].add(x.reshape(-1, columns))
        self._waiting.clear()

    def result(self) -> list[Moment]:
        """Means over the tokens, of each distinct input. The sums are used up."""
        inputs: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        for key in self._sums:
            for name in key:
                inputs[name].append(key)
        # A matrix that reads now with these others and now with those has several sums.
        sharing: dict[tuple[tuple[str, ...], ...], list[str]] = defaultdict(list)
        for name, keys in inputs.items():
            sharing[tuple(keys)].append(name)
        return [_mean(names, [self._sums[key] for key in keys]) for keys, names in sharing.items()]

    def one_hot(self, name: str, tokens: int, columns: int) -> Moment:
        """The moment of an embedding that is no output head: each row counts alike, and within it each column.

        The true input of an embedding is one-hot over its rows, so that no column matters more than another.
        """
        identity = Square(columns, diagonal_alone=self._diagonals_alone)
        identity.tokens = tokens
        identity.diagonal += tokens
        return _mean([name], [identity])


def _same(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are the same memory, maybe in another shape: [windows, n, in] or [windows * n, in]."""
    if x.data_ptr() != other.data_ptr() or x.numel() != other.numel() or x.shape[-1] != other.shape[-1]:
        return False
    return x.stride() == other.stride() or (x.is_contiguous() and other.is_contiguous())


def _mean(names: list[str], sums: list[Square]) -> Moment:
    total = sums[0] if len(sums) == 1 else _together(sums)
    diagonal = (total.diagonal / total.tokens).numpy().astype(np.float32)
    return Moment(tuple(names), total.tokens, diagonal, None if total.full is None else total.triangle(total.tokens))


def _together(sums: list[Square]) -> Square:
    total = Square(len(sums[0].diagonal), diagonal_alone=sums[0].full is None)
    for each in sums:
        total.tokens += each.tokens
        total.diagonal += each.diagonal
        if total.full is not None and each.full is not None:
            total.full += each.full
    return total
