"""A transformers model whose weights come block by block: no more than one decoder block is in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from anyquant.calibration.weights import Piece, pieces
from anyquant.checkpoint import Checkpoint
from anyquant.errors import UnknownArchitecture

BlockCall = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(number of the block, its own forward, args, kwargs) -> what the block returns."""

_READ = 1 << 24
"""Values read at a time."""

Slot = tuple[nn.Module, str]
Parts = list[tuple[Piece, torch.Tensor]]
"""Loaded tensors of a checkpoint, each with the view of the parameter that it fills."""


class StreamedModel:
    """A causal language model without weights, and the means to put them in and take them out.

    Attributes:
        name: of the checkpoint, for messages.
        model: a ``PreTrainedModel`` in evaluation mode; parameters lie on the meta device, buffers are real.
        base: the model without its head.
        blocks: the decoder blocks.
        outside: number of the section of all that is in no block: embeddings, last norm, head. The section of a
            block has the number of the block.
        head: the checkpoint's tensor that the output head multiplies with; may be the embedding as well.
        embedding: the checkpoint's tensor that holds the token embedding.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Build the model from its configuration; no weight is read.

        Raises:
            UnknownArchitecture: transformers has no such model, or it has no decoder blocks.
            CorruptFileError: the checkpoint's tensors are not those of the architecture.
        """
        from anyquant.runtime.model import causal_lm_class

        config, kind = causal_lm_class(checkpoint.config, checkpoint.name, checkpoint.code_folder())
        # "eager" goes through the experts one by one, each a slice of the fused weights that can be recognized.
        config._experts_implementation = "eager"
        with _parameters_on_meta():
            self.model: Any = kind._from_config(config, dtype=torch.float32)
        self.model.tie_weights()
        self.model.eval()
        self.name, self._checkpoint = checkpoint.name, checkpoint
        self.base: Any = self.model.get_decoder()  # which some families call past their base model
        path, self.blocks = decoder_blocks(self.model, checkpoint.name)
        self.outside = len(self.blocks)

        self._sections: dict[int, list[Piece]] = {number: [] for number in range(self.outside + 1)}
        for piece in pieces(self.model, checkpoint):
            inside = piece.target.startswith(f"{path}.")
            number = int(piece.target[len(path) + 1 :].partition(".")[0]) if inside else self.outside
            self._sections[number].append(piece)
        self._slots = self._find_slots()
        self._empty = {target: _get(slots[0]) for target, slots in self._slots.items()}
        self.head = self._held_by(self.model.get_output_embeddings())
        self.embedding = self._held_by(self.model.get_input_embeddings())

    def _find_slots(self) -> dict[str, list[Slot]]:
        """Where each parameter that the checkpoint fills hangs in the model; tied ones hang in several places."""
        state = self.model.state_dict(keep_vars=True)
        by_identity: dict[int, list[str]] = defaultdict(list)
        for name, tensor in state.items():
            by_identity[id(tensor)].append(name)
        targets = {piece.name: piece.target for section in self._sections.values() for piece in section}
        copies: dict[str, list[str]] = {target: by_identity[id(state[target])] for target in targets.values()}
        for alias, name in self._checkpoint.aliases.items():
            # A head equal to the embedding, in a model whose configuration does not tie them.
            if alias in state and name in targets and alias not in copies[targets[name]]:
                copies[targets[name]].append(alias)
        return {target: [self._slot(name) for name in names] for target, names in copies.items()}

    def _slot(self, path: str) -> Slot:
        module, _, leaf = path.rpartition(".")
        return self.model.get_submodule(module), leaf

    def _held_by(self, module: nn.Module | None) -> str | None:
        return next(
            (p.name for p in self._sections[self.outside] if (module, "weight") in self._slots[p.target]),
            None,
        )

    def names(self, section: int) -> list[str]:
        """The checkpoint's tensors in a section."""
        return [piece.name for piece in self._sections[section]]

    def load(self, section: int, *, head: bool = True) -> Parts:
        """Put the weights of a section into the model.

        Args:
            section: its number.
            head: whether to load the output head where it is no embedding.

        Returns:
            Each tensor's piece with the view of the parameter that it fills.

        Raises:
            NonFiniteError: a weight holds NaN or Inf.
        """
        wanted = [p for p in self._sections[section] if head or p.name != self.head or self.head == self.embedding]
        parameters = {p.target: torch.empty_like(self._empty[p.target], device="cpu") for p in wanted}
        loaded = []
        for piece in wanted:
            part = piece.part(parameters[piece.target])
            self._read(piece.name, part.T if piece.transposed else part)
            loaded.append((piece, part))
        for target, tensor in parameters.items():
            is_parameter = isinstance(self._empty[target], nn.Parameter)
            self._put(target, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
        return loaded

    def _read(self, name: str, target: torch.Tensor) -> None:
        """Fill a tensor, rows by rows: no embedding is in memory twice."""
        if target.ndim < 2:
            target.copy_(torch.from_numpy(self._checkpoint.read(name)))
            return
        step = max(1, _READ // target[0].numel())
        for start in range(0, len(target), step):
            rows = slice(start, start + step)
            target[rows].copy_(torch.from_numpy(self._checkpoint.read(name, rows)))

    def free(self, section: int) -> None:
        """Take the weights of a section out again."""
        for target in {piece.target for piece in self._sections[section]}:
            self._put(target, self._empty[target])

    def _put(self, target: str, tensor: torch.Tensor) -> None:
        """Hang a parameter or buffer into all its places."""
        for module, leaf in self._slots[target]:
            if isinstance(tensor, nn.Parameter):
                module._parameters[leaf] = tensor
            else:
                module._buffers[leaf] = tensor

    @contextmanager
    def calls(self, call: BlockCall) -> Iterator[None]:
        """While this lasts, each block's forward goes through ``call``."""
        for number, block in enumerate(self.blocks):
            block.forward = partial(self._dispatch, call, number, block.forward)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward  # the instance's; the class has the model's own

    @staticmethod
    def _dispatch(call: BlockCall, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(number, forward, args, kwargs)


def _get(slot: Slot) -> torch.Tensor:
    module, leaf = slot
    tensor = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
    assert tensor is not None
    return tensor


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Make modules whose parameters have no storage, but whose buffers (rotary frequencies, masks) are real.

    The meta device as a whole would leave buffers empty that no checkpoint holds.
    """
    from transformers.initialization import no_init_weights

    register = nn.Module.register_parameter

    def register_empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        empty = None if param is None else nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, empty)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        with no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def decoder_blocks(model: nn.Module, name: str) -> tuple[str, list[nn.Module]]:
    """Path and members of the longest list of modules that lies in no other list.

    Raises:
        UnknownArchitecture: there is none.
    """
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {p: m for p, m in lists.items() if not any(p.startswith(f"{other}.") for other in lists)}
    if not any(len(module) for module in outer.values()):
        raise UnknownArchitecture(
            f"{name}: its class {type(model).__name__} keeps no list of decoder blocks, so it cannot be calibrated "
            "block by block. Use a method that needs no calibration."
        )
    path = max(outer, key=lambda p: len(outer[p]))
    return path, list(outer[path])
