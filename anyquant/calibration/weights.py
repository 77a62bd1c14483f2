"""Which part of which parameter a checkpoint's tensor is, as transformers lays its models out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anyquant.checkpoint import Checkpoint
from anyquant.errors import CorruptFileError, UnknownArchitecture

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Piece:
    """A checkpoint's tensor inside a parameter (or persistent buffer) of the model.

    Attributes:
        name: the checkpoint's.
        target: the parameter, as in ``state_dict``.
        rows: of the tensor as the checkpoint shows it.
        index: of the expert, where the parameter is [experts, ..., ...].
        start: first of the rows that it fills, where a parameter joins several matrices along its rows; None if it
            fills all.
        transposed: the parameter keeps [in, out], the checkpoint shows [out, in].
    """

    name: str
    target: str
    rows: int
    index: int | None = None
    start: int | None = None
    transposed: bool = False

    def part(self, parameter: torch.Tensor) -> torch.Tensor:
        """The view that this tensor fills."""
        part = parameter if self.index is None else parameter[self.index]
        return part if self.start is None else part[self.start : self.start + self.rows]


def pieces(model: Any, checkpoint: Checkpoint) -> list[Piece]:
    """Place every tensor of a checkpoint in a model.

    Args:
        model: a ``PreTrainedModel`` with parameters of the right shapes, on whatever device.
        checkpoint: the weights; only names and shapes are read.

    Raises:
        CorruptFileError: tensors are missing, too many, or of another shape.
        UnknownArchitecture: transformers rearranges these weights in a way that is not known here.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict(keep_vars=True)  # the parameters themselves: tied names have one object

    def place(name: str) -> Piece:
        stored, mark, number = name.rpartition("#")
        key = stored if mark else name
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        shape = checkpoint.tensors[name].shape
        rows = shape[0] if shape else 1
        if pattern is None:
            return Piece(name, target, rows, int(number) if mark else None, None, name in checkpoint.transposed)
        converter = next(c for c in converters if pattern in c.source_patterns)
        index, place = _fused(name, pattern, converter, checkpoint)
        return Piece(name, target, rows, index, place * rows if len(converter.source_patterns) > 1 else None)

    found = [place(name) for name in checkpoint.tensors]
    unexpected = [piece.name for piece in found if piece.target not in state]
    found = [piece for piece in found if piece.target in state]
    for piece in found:
        expected = tuple(piece.part(state[piece.target]).shape)
        shape = checkpoint.tensors[piece.name].shape
        if expected != (shape[::-1] if piece.transposed else shape):
            raise CorruptFileError(
                f"{checkpoint.name}: {piece.name} is {list(shape)}, but {piece.target} takes {list(expected)} there. "
                "The configuration does not belong to these tensors."
            )
    filled: Counter[int] = Counter()
    for piece in found:
        filled[id(state[piece.target])] += piece.part(state[piece.target]).numel()
    filled.update({id(state[alias]): state[alias].numel() for alias in checkpoint.aliases if alias in state})
    missing = [name for name, tensor in state.items() if filled[id(tensor)] < tensor.numel()]
    for names, what in ((unexpected, "unexpected"), (missing, "missing")):
        patterns = getattr(model, f"_keys_to_ignore_on_load_{what}") or ()
        names = [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]
        if names:
            raise CorruptFileError(
                f"{checkpoint.name}: {len(names)} {what} weights for this architecture, the first {names[0]}. The "
                "configuration does not belong to these tensors."
            )
    return found


def _fused(name: str, pattern: str, converter: Any, checkpoint: Checkpoint) -> tuple[int, int]:
    """Number of the expert and place among the joined matrices of a tensor that transformers fuses with others.

    transformers stacks the matrices of all experts, and joins gate and up along the rows.

    Raises:
        UnknownArchitecture: it does something else with them.
    """
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    match = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
    if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]) or match is None:
        raise UnknownArchitecture(
            f"{checkpoint.name}: transformers rearranges {name} on loading ({_chain(steps)}), which calibration cannot "
            "follow. Use a method that needs no calibration."
        )
    return int(match[1]), converter.source_patterns.index(pattern)


def _chain(steps: Sequence[tuple[str, int | None]]) -> str:
    return ", ".join(name for name, _ in steps) or "nothing"
