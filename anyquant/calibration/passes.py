"""Passes through a model, the weights of one block in memory at a time; the one forwards records all moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from anyquant.calibration.batches import Args, Arguments, BatchedCall, Kwargs, first
from anyquant.calibration.blocks import Parts, StreamedModel
from anyquant.calibration.capture import Capture, Product, Reading
from anyquant.calibration.folder import CalibrationFolder
from anyquant.calibration.moments import MomentSums
from anyquant.calibration.store import Moment
from anyquant.errors import InputError
from anyquant.ir import Progress

BlockPass = Callable[[int, BatchedCall, torch.Tensor], Any]
"""(number of the block, its call, hidden states of all windows) -> what the block returns."""


class Finished(Exception):
    """All is known that is wanted: the rest of the model need not be computed."""


class StreamedPass:
    """What every pass shares: the way of all windows through the blocks, and who is told of which product.

    All windows go through a block before the next one is loaded, so the hidden states of all tokens are kept (two or
    three times), with one block, its moments, and what a thousand tokens leave behind in it.
    """

    overflow = (
        "The weights are finite, so their products overflow FP32: the checkpoint is damaged, or its config.json "
        "belongs to another model."
    )
    """What it means that activations are not finite, and what to do."""

    def __init__(
        self,
        model: StreamedModel,
        ids: torch.Tensor,
        wanted: set[str],
        progress: Progress,
        *,
        diagonals_alone: bool = False,
    ) -> None:
        """Prepare.

        Args:
            model: without weights, and so it will be left.
            ids: int64 [windows, window].
            wanted: names of the matrices to record.
            progress: called after each block.
            diagonals_alone: whether of moments the diagonals are all that is wanted. They need no large batches.
        """
        self.model, self.ids, self.wanted, self.progress = model, ids, wanted, progress
        self._diagonals_alone = diagonals_alone
        self._product: Product = _ignore
        self.capture = Capture(lambda x, readings, output: self._product(x, readings, output))

    def wanted_in(self, section: int) -> set[str]:
        """The names to be recorded that lie in a section."""
        return self.wanted.intersection(self.model.names(section))

    @contextmanager
    def recording(self, parts: Parts, product: Product) -> Iterator[None]:
        """While this lasts, ``product`` hears of what reads these weights, and nothing else does."""
        before, self._product = self._product, product
        self.capture.watch(parts)
        try:
            yield
        finally:
            self.capture.forget(parts)
            self._product = before

    def through_blocks(self, parts: Parts, product: Product, block: BlockPass) -> Any:
        """Run the model without its head; return its output.

        Args:
            parts: the loaded weights outside of the blocks.
            product: hears of what reads them.
            block: takes all windows through a block.
        """

        single = self._single_call()

        def call(number: int, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
            batched = BatchedCall(forward, args, kwargs, single, few=self._diagonals_alone)
            return block(number, batched, BatchedCall.hidden(args, kwargs))

        with self.model.calls(call), self.recording(parts, product), self.capture:
            return self.model.base(input_ids=self.ids, use_cache=False)

    def _single_call(self) -> Arguments:
        """What the first block is called with for one window."""
        found: list[Arguments] = []

        def call(number: int, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
            found.append((args, kwargs))
            raise Finished

        with self.model.calls(call), suppress(Finished):
            self.model.base(input_ids=self.ids[:1], use_cache=False)
        return found[0]

    def through_block(
        self, number: int, call: BatchedCall, hidden: torch.Tensor, after: Callable[[], None] = lambda: None
    ) -> Any:
        """Take all windows through a loaded block.

        Args:
            number: of the block.
            call: the block's.
            hidden: states before the block, of all windows.
            after: called after each batch.

        Returns:
            What the block returns.

        Raises:
            InputError: it is not finite.
        """
        states, result = self.empty(hidden.shape), None
        for windows in call.batches():
            result = call(hidden[windows], windows)
            states[windows] = first(result)
            after()
        self.require_finite(states, f"the output of block {number}")
        return (states, *result[1:]) if isinstance(result, tuple) else states

    def moment_sums(self, wanted: set[str]) -> MomentSums:
        """Sums of what this pass records of inputs."""
        return MomentSums(wanted, diagonals_alone=self._diagonals_alone)

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        """Where the hidden states of all tokens are kept, float32."""
        return torch.empty(*shape)

    def require_finite(self, states: torch.Tensor, what: str) -> None:
        """Refuse NaN and infinity.

        Raises:
            InputError: says where the first one is, and how many there are.
        """
        if all(window.isfinite().all() for window in states):
            return
        bad = ~states.isfinite()
        window, position = bad.any(dim=-1).nonzero()[0].tolist()
        raise InputError(
            f"{self.model.name}: {what} holds {int(bad.sum()):,} values of {bad.numel():,} that are NaN or "
            f"infinite, the first in window {window} at token {position}. {self.overflow}"
        )

    def outside_moments(self, sums: MomentSums, output: Any) -> list[Moment]:
        """The moments of what lies in no block, the output head among them.

        Args:
            sums: of what the model has called so far.
            output: of the model without its head.
        """
        model = self.model
        names = self.wanted_in(model.outside)
        sums.flush()
        if model.head in names:
            head = str(model.head)

            def see(hidden: torch.Tensor) -> torch.Tensor:
                sums.product(hidden, [Reading(head, slice(None))], hidden)
                return hidden[..., :1]  # logits are not needed

            with torch.no_grad(), _replaced(model.model.get_output_embeddings(), see):
                self.logits(output, output.last_hidden_state)
            sums.flush()
        moments = sums.result()
        if model.embedding in names and model.embedding != model.head:
            columns = output.last_hidden_state.shape[-1]
            moments.append(sums.one_hot(str(model.embedding), self.ids.numel(), columns))
        return moments

    def logits(self, output: Any, hidden: torch.Tensor) -> torch.Tensor:
        """What the model makes of last hidden states: its head, with whatever scaling or capping its family does.

        Args:
            output: of the model without its head.
            hidden: takes the place of the last hidden states in it, [windows, n, hidden].
        """

        def base(*args: Any, **kwargs: Any) -> Any:
            return type(output)(**{**output, "last_hidden_state": hidden})

        with _replaced(self.model.base, base):
            logits: torch.Tensor = self.model.model(input_ids=self.ids[:1], use_cache=False).logits
        return logits


class ForwardPass(StreamedPass):
    """Records the moments of some matrices of a model on some tokens; hidden states are kept on disk."""

    def __init__(
        self,
        model: StreamedModel,
        ids: torch.Tensor,
        wanted: set[str],
        folder: CalibrationFolder,
        progress: Progress,
        *,
        diagonals_alone: bool = False,
    ) -> None:
        """As any pass; ``folder`` gets the moments section by section, and what it holds is not computed again."""
        super().__init__(model, ids, wanted, progress, diagonals_alone=diagonals_alone)
        self.folder = folder

    def run(self) -> None:
        """Go through the model and store the moments of every section.

        Raises:
            InputError: activations are not finite.
            NonFiniteError: a weight is not.
            MachineError: the disk is full.
        """
        if self.complete(self.folder.has_moments):
            return
        outside = self.model.outside
        sums = self.moment_sums(self.wanted_in(outside))
        parts = self.model.load(outside, head=False)
        with torch.no_grad(), suppress(Finished):
            output = self.through_blocks(parts, sums.product, self._only_block)
            self.finish_outside(sums, output)
        self.model.free(outside)

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        """On disk, from where the system fetches what it has room for.

        Raises:
            MachineError: the disk is full.
        """
        return torch.from_numpy(self.folder.scratch(tuple(shape)))

    def through_blocks(self, parts: Parts, product: Product, block: BlockPass) -> Any:
        """As any pass; the states before the first block are made a few windows at a time, too."""
        embedding = self.model.model.get_input_embeddings()
        embed: Callable[[torch.Tensor], torch.Tensor] = embedding.forward

        def embed_in_batches(ids: torch.Tensor) -> torch.Tensor:
            if ids.shape != self.ids.shape:
                return embed(ids)
            states = self.empty((*ids.shape, embedding.embedding_dim))
            for window, state in zip(ids, states, strict=True):
                state.copy_(embed(window[None])[0])
            return states

        with _replaced(embedding, embed_in_batches):
            return super().through_blocks(parts, product, block)

    def _only_block(self, number: int, call: BatchedCall, hidden: torch.Tensor) -> Any:
        """As :meth:`block`, where nobody wants to know more than what is recorded."""
        output = self.block(number, call, hidden)
        if number == self.model.outside - 1 and not self.wanted_in(self.model.outside):
            raise Finished
        return output

    def complete(self, *kinds: Callable[[int], bool]) -> bool:
        """Whether every section that something is wanted of has every kind of file."""
        wanted = [section for section in range(self.model.outside + 1) if self.wanted_in(section)]
        return all(has(section) for has in kinds for section in wanted)

    def block(self, number: int, call: BatchedCall, hidden: torch.Tensor) -> Any:
        """Take all windows through a block, and store the moments of its inputs.

        Raises:
            InputError: what comes out is not finite.
        """
        done = self.folder.has_moments(number)
        sums = self.moment_sums(set() if done else self.wanted_in(number))
        parts = self.model.load(number)
        with self.recording(parts, sums.product):
            output = self.through_block(number, call, hidden, sums.flush)
        self.model.free(number)
        if not done and self.wanted_in(number):
            self.folder.save_moments(number, sums.result())
        self.progress("moments", number + 1, len(self.model.blocks))
        return output

    def finish_outside(self, sums: MomentSums, output: Any) -> None:
        """Store the moments of what lies in no block; see :meth:`outside_moments`."""
        outside = self.model.outside
        if self.wanted_in(outside) and not self.folder.has_moments(outside):
            self.folder.save_moments(outside, self.outside_moments(sums, output))


def _ignore(x: torch.Tensor, readings: list[Reading], output: torch.Tensor) -> None:
    """Nobody listens."""


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While this lasts, a module's forward is another."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the instance's; the class has the module's own
