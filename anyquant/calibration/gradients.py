"""Squared output gradients, alone or times squared inputs: the diagonal of the Fisher information, token by token.

With ``importance="gradient"`` only E[g_i^2] is kept, a number for each row: taken together with E[x_j^2] it stands for
the diagonal as if gradients and inputs were independent (the diagonal of K-FAC's factors, arXiv 1503.05671). A number
for each row can be told from a few thousand tokens, one for each weight cannot.

SKIM (arXiv 2412.04180) weights the element (i, j) of a matrix with S-diag, the mean over tokens of g_i^2 x_j^2, where
g is the gradient of the loss with respect to the matrix' output. SqueezeLLM (arXiv 2306.07629) squares the gradient of
the weight over a whole sequence instead, (sum over its tokens of g_i x_j)^2. The first is taken here: it follows from
expanding the loss in the error of each token's output with errors of different tokens taken as uncorrelated, it
is a sum of products (one matrix product, never an outer product per sequence), it does not depend on how a text is
cut into windows, and of few sequences it is much the less noisy estimate.

For refinement, groups of neighbouring rows get E[g^2 x x^T] each, with g^2 the mean over the group: GuidedQuant
(arXiv 2505.07004, section 3). A token that moves the loss little, such as the first one, at which attention parks with
huge activations, then counts little.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from anyquant.calibration.capture import Reading
from anyquant.calibration.moments import Square
from anyquant.calibration.store import GUIDED


class GradientSums:
    """Accumulates S-diag of the matrices of one section: FP32 products, added up in the order of the calls."""

    def __init__(self, wanted: set[str], tokens: int, *, rows_alone: bool = False, row_groups: int = 0) -> None:
        """Record these matrices and pass over all others.

        Args:
            wanted: names of the matrices.
            tokens: that means are taken over: all that there are, so that an expert counts by how often it is asked.
            rows_alone: record E[g_i^2] instead of E[g_i^2 x_j^2].
            row_groups: groups of rows that get E[g^2 x x^T] each.
        """
        self._wanted, self._tokens, self._rows_alone = wanted, tokens, rows_alone
        self._sums: dict[str, torch.Tensor] = {}
        self._groups, self._guided = row_groups, dict[str, list[Square]]()

    def product(self, x: torch.Tensor, readings: list[Reading], output: torch.Tensor) -> None:
        """Take note of a product, and add to the sums when the gradient of its output is known."""
        readings = [reading for reading in readings if reading.name in self._wanted]
        if readings and x.numel() and output.requires_grad:
            output.register_hook(self._hook(x.detach(), readings))  # type: ignore[no-untyped-call]

    def _hook(self, x: torch.Tensor, readings: list[Reading]) -> Callable[[torch.Tensor], None]:
        def add(gradient: torch.Tensor) -> None:
            flat = gradient.detach().reshape(-1, gradient.shape[-1])
            inputs = x.reshape(-1, x.shape[-1])
            squares = None if self._rows_alone else inputs.square()
            for reading in readings:
                own = flat[:, reading.outputs].square()
                self._add(reading.name, own, squares)
                self._guide(reading.name, own, inputs)

        return add

    def _add(self, name: str, g: torch.Tensor, x: torch.Tensor | None) -> None:
        """Add squared gradients [tokens, out], alone or times squared inputs [tokens, in]."""
        if name not in self._sums:
            self._sums[name] = torch.zeros(g.shape[1] if x is None else (g.shape[1], x.shape[1]))
        if x is None:
            self._sums[name] += g.sum(dim=0)
        else:
            self._sums[name].addmm_(g.T, x)

    def _guide(self, name: str, g: torch.Tensor, x: torch.Tensor) -> None:
        """Add squared gradients [tokens, out] times x x^T, each group of rows by itself."""
        parts = g.tensor_split(min(self._groups, g.shape[1]), dim=1) if self._groups else ()
        sums = self._guided.setdefault(name, [Square(x.shape[1]) for _ in parts])
        for part, total in zip(parts, sums, strict=True):
            total.add(x * part.mean(dim=1, keepdim=True).sqrt())

    def result(self) -> dict[str, NDArray[np.float32]]:
        """Means over the tokens, of each matrix on which any loss depends.

        Returns:
            float32 [out, in] (or [out]) under its name, and with groups float32 [groups, in * (in + 1) / 2], upper
            triangles row by row, under its name and ``GUIDED``.
        """
        found = {name: (total / self._tokens).numpy() for name, total in self._sums.items() if total.any()}
        guided = {
            name + GUIDED: np.stack([total.triangle(self._tokens) for total in totals])
            for name, totals in self._guided.items()
            if name in found and totals
        }
        return found | guided
