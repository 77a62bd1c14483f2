"""Which matrix sees which input: linear layers are recognized by the memory of their weights, not by their class.

So a Linear, GPT-2's Conv1D and the slices of fused experts are all found, whatever modules they are in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from anyquant.calibration.weights import Piece

_LINEAR = {torch.nn.functional.linear: ((0, "input"), (1, "weight"))}
# Products with a weight [in, out]: where input and weight stand among the arguments.
_PRODUCTS: dict[Any, tuple[tuple[int, str], tuple[int, str]]] = {
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    torch.mm: ((0, "input"), (1, "mat2")),
    torch.Tensor.mm: ((0, "self"), (1, "mat2")),
    torch.matmul: ((0, "input"), (1, "other")),
    torch.Tensor.matmul: ((0, "self"), (1, "other")),
    torch.Tensor.__matmul__: ((0, "self"), (1, "other")),
}


@dataclass(frozen=True)
class Reading:
    """A matrix that took part in a product: which of the product's outputs are its own."""

    name: str
    outputs: slice


Product = Callable[[torch.Tensor, list[Reading], torch.Tensor], None]
"""(input [..., in], the matrices that read it, output [..., out])."""


class Capture(TorchFunctionMode):
    """Calls ``product`` for every product of an input with a watched weight, while it is entered."""

    def __init__(self, product: Product) -> None:
        """Watch nothing yet."""
        super().__init__()
        self._product = product
        self._watched: dict[int, list[tuple[int, int, Piece]]] = {}

    def watch(self, parts: Iterable[tuple[Piece, torch.Tensor]]) -> None:
        """Look out for these weights, which stay in memory until :meth:`forget`."""
        for piece, part in parts:
            begin = int(part.storage_offset())
            regions = self._watched.setdefault(part.untyped_storage().data_ptr(), [])
            regions.append((begin, begin + part.numel(), piece))

    def forget(self, parts: Iterable[tuple[Piece, torch.Tensor]]) -> None:
        """Do so no longer."""
        for _, part in parts:
            self._watched.pop(part.untyped_storage().data_ptr(), None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function; if it is such a product, report it."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        row_major = func in _LINEAR
        places = _LINEAR.get(func) or _PRODUCTS.get(func)
        if places is not None:
            x, weight = (args[at] if at < len(args) else kwargs.get(name) for at, name in places)
            if isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor):
                readings = self._readings(weight, row_major)
                if readings:
                    self._product(x, readings, output)
        return output

    def _readings(self, weight: torch.Tensor, row_major: bool) -> list[Reading]:
        """The watched matrices that lie whole within a weight [out, in], or [in, out] if not ``row_major``."""
        regions = self._watched.get(weight.untyped_storage().data_ptr())
        if regions is None or weight.ndim != 2:
            return []
        stored = weight if row_major else weight.T
        start = int(weight.storage_offset())
        end = start + weight.numel()
        inside = [(begin, piece) for begin, stop, piece in regions if start <= begin and stop <= end]
        readings = []
        for begin, piece in inside:
            if piece.transposed and stored.T.is_contiguous() and piece.rows == stored.shape[0]:
                readings.append(Reading(piece.name, slice(0, piece.rows)))
            elif not piece.transposed and stored.is_contiguous():
                row = (begin - start) // stored.shape[1]
                readings.append(Reading(piece.name, slice(row, row + piece.rows)))
        return readings
