"""The matrices of a job and the forms that each can take; from headers alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from anyquant import ir
from anyquant.allocation import Assignment
from anyquant.checkpoint import Checkpoint
from anyquant.errors import InputError
from anyquant.methods import Levels, Method

Shape = tuple[int, int]


def chosen_matrices(checkpoint: Checkpoint, quantize_embeddings: bool) -> list[str]:
    """Names of the tensors that a method is applied to, in the checkpoint's order.

    Raises:
        InputError: there is none.
    """
    wanted = {*checkpoint.matrices(), *(checkpoint.embeddings() if quantize_embeddings else ())}
    names = [name for name in checkpoint.tensors if name in wanted]
    if not names:
        raise InputError(
            f"{checkpoint.name} holds no matrices to quantize among its {len(checkpoint.tensors)} tensors."
        )
    return names


@dataclass(frozen=True)
class Forms:
    """What each matrix can choose from.

    Attributes:
        method: the method.
        settings: its settings.
        names: of the matrices.
        shapes: of the matrices, [out, in].
        levels: what a matrix of each shape can choose from.
        allowed: of each matrix the levels that may be chosen, ascending; an exporter may leave some out.
    """

    method: Method
    settings: dict[str, Any]
    names: list[str]
    shapes: list[Shape]
    levels: list[Levels]
    allowed: list[tuple[int, ...]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, method: Method, settings: dict[str, Any], names: list[str]) -> Forms:
        """All levels of the named matrices."""
        shapes = [(checkpoint.tensors[name].shape[0], checkpoint.tensors[name].shape[1]) for name in names]
        by_shape = {shape: method.levels(shape, settings) for shape in dict.fromkeys(shapes)}
        levels = [by_shape[shape] for shape in shapes]
        return cls(method, settings, names, shapes, levels, [tuple(range(each.count)) for each in levels])

    def ladder(self) -> list[Assignment]:
        """Assignments from all least to all greatest levels, so that every level of every matrix is in one of them."""
        return [
            [
                np.full(levels.units, allowed[min(position, len(allowed) - 1)], np.uint8)
                for levels, allowed in zip(self.levels, self.allowed, strict=True)
            ]
            for position in range(max(map(len, self.allowed)))
        ]

    def alike(self) -> list[Assignment]:
        """The assignments that give every unit of every matrix the same width, block or type, fewest bytes first.

        None where the matrices have none in common: what there is to choose from depends on the length of their rows.
        """
        kinds = [{self._kind(number, level): level for level in levels} for number, levels in enumerate(self.allowed)]
        common = [kind for kind in kinds[0] if all(kind in each for each in kinds)]
        return [
            [np.full(levels.units, each[kind], np.uint8) for levels, each in zip(self.levels, kinds, strict=True)]
            for kind in common
        ]

    def _kind(self, number: int, level: int) -> Hashable:
        """What a level of a matrix is called whatever the shape."""
        chosen = np.full(self.levels[number].units, level, np.uint8)
        spec = self.method.spec(self.shapes[number], chosen, self.settings)
        if isinstance(spec, ir.CodebookSpec):
            return level
        return tuple((key, value) for key, value in asdict(spec).items() if key != "shape")

    def pick(self, chosen: Assignment) -> dict[str, ir.Spec]:
        """Name -> form of an assignment."""
        return {
            name: self.method.spec(shape, levels, self.settings)
            for name, shape, levels in zip(self.names, self.shapes, chosen, strict=True)
        }

    @property
    def whole(self) -> bool:
        """Whether a matrix has one level as a whole, and not one for each row."""
        return all(levels.units == 1 for levels in self.levels)

    def costs(self, count: str) -> list[tuple[int, ...]]:
        """Of each matrix what a unit counts at each level: all bytes, or codes alone."""
        return [levels.nbytes if count == "all" else levels.code_bytes for levels in self.levels]

    def bits(self, chosen: Assignment, count: str) -> float:
        """Counted bits per weight."""
        total = sum(levels.overhead for levels in self.levels) if count == "all" else 0
        for levels, cost in zip(chosen, self.costs(count), strict=True):
            total += int(np.array(cost, np.int64) @ np.bincount(levels, minlength=len(cost)))
        return 8 * total / self.numel

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(out * columns for out, columns in self.shapes)

    def restrict(self, allowed: Sequence[tuple[int, ...]]) -> Forms:
        """The same with fewer levels."""
        return Forms(self.method, self.settings, self.names, self.shapes, self.levels, list(allowed))
