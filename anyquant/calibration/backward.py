"""The pass backwards: squared gradients of all matrices, the weights of one block in memory at a time.

The hidden states before each block lie on disk. On the way back a block is loaded once more, computed again with
gradients (checkpointing), and left for good; autograd goes through all that lies between the blocks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from anyquant.calibration.batches import BatchedCall, first
from anyquant.calibration.blocks import Parts
from anyquant.calibration.capture import Product
from anyquant.calibration.gradients import GradientSums
from anyquant.calibration.passes import ForwardPass
from anyquant.calibration.settings import LEARNED_TOKENS

_LOGITS = 1 << 22
"""Logits in memory at once."""
_NO_TARGET = -100


class _Streamed(torch.autograd.Function):
    """A block: ``forward`` and ``backward`` load what they need and let go of it."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, forward: Any, backward: Any) -> Any:
        ctx.backward_pass = backward
        return forward(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.backward_pass(gradients[0]), None, None


class FisherPass(ForwardPass):
    """Records moments and, on the way back, the mean over tokens of g_i^2 x_j^2 of every matrix.

    The loss is the summed cross-entropy of the next token; logits are made a few at a time.
    """

    def __init__(self, *arguments: Any, rows_alone: bool = False, row_groups: int = 0) -> None:
        """As any pass; with ``rows_alone`` only the mean of g_i^2 is recorded, over the first few windows.

        Groups of rows have their moments recorded too; then all windows are gone through.
        """
        super().__init__(*arguments)
        windows, window = self.ids.shape
        few = rows_alone and not row_groups
        self.learned = min(windows, max(1, LEARNED_TOKENS // window)) if few else windows
        self._rows_alone, self._row_groups = rows_alone, row_groups
        self._states: dict[int, torch.Tensor] = {}  # of the windows that are learned from, before each block

    def run(self) -> None:
        """Go through the model and back, and store the moments and gradients of every section.

        Raises:
            InputError: activations or gradients are not finite.
            NonFiniteError: a weight is not.
            MachineError: the disk is full.
        """
        if self.complete(self.folder.has_moments, self.folder.has_gradients):
            return
        outside = self.model.outside
        wanted = self.wanted_in(outside)
        moments, gradients = self.moment_sums(wanted), self._sums(wanted)

        def both(*product: Any) -> None:
            moments.product(*product)
            gradients.product(*product)

        parts = self.model.load(outside)
        with torch.enable_grad():
            output = self.through_blocks(parts, both, self._streamed)
            self.finish_outside(moments, output)
            at_last = self._loss_gradient(parts, gradients.product, output)
            self.model.free(outside)
            output.last_hidden_state.backward(at_last)
        if self.wanted_in(outside) and not self.folder.has_gradients(outside):
            self.folder.save_gradients(outside, gradients.result())

    def _sums(self, wanted: set[str]) -> GradientSums:
        tokens = self.learned * self.ids.shape[1]
        return GradientSums(wanted, tokens, rows_alone=self._rows_alone, row_groups=self._row_groups)

    def _streamed(self, number: int, call: BatchedCall, hidden: torch.Tensor) -> Any:
        if not hidden.requires_grad:  # the first block: the way back ends there
            hidden = hidden.detach().requires_grad_()
        needed = max(windows.stop for windows in call.batches(self.learned))
        self._states[number] = self.empty((needed, *hidden.shape[1:])).copy_(hidden.detach()[:needed])
        forward, back = partial(self.block, number, call), partial(self._back, number, call)
        return _Streamed.apply(hidden, forward, back)  # type: ignore[no-untyped-call]

    def _loss_gradient(self, parts: Parts, product: Product, output: Any) -> torch.Tensor:
        """The gradient of the loss with respect to the last hidden states [windows, window, hidden]."""
        last = output.last_hidden_state.detach()
        gradient = torch.zeros_like(last)
        states, learned = last[: self.learned].flatten(0, 1), gradient[: self.learned].flatten(0, 1)
        # The last token of a window predicts nothing that is known: no loss, no gradient, but it is a token.
        targets = torch.nn.functional.pad(self.ids[: self.learned, 1:], (0, 1), value=_NO_TARGET).flatten()
        vocabulary = self.model.model.get_output_embeddings().weight.shape[0]
        step = max(1, _LOGITS // vocabulary)
        with self.recording(parts, product), self.capture:
            for start in range(0, len(states), step):
                part = states[start : start + step].requires_grad_()
                logits = self.logits(output, part[None])[0]
                loss = torch.nn.functional.cross_entropy(
                    logits, targets[start : start + step], ignore_index=_NO_TARGET, reduction="sum"
                )
                (learned[start : start + step],) = torch.autograd.grad(loss, part)
        self.require_finite(gradient, "the gradient of the loss")
        return gradient

    def _back(self, number: int, call: BatchedCall, gradient: torch.Tensor) -> torch.Tensor:
        """From the gradient at a block's output to that at its input, and store what its matrices had."""
        done = self.folder.has_gradients(number)
        sums = self._sums(set() if done else self.wanted_in(number))
        parts = self.model.load(number)
        before = torch.zeros_like(gradient)
        states = self._states.pop(number)
        with self.recording(parts, sums.product):
            for windows in call.batches(self.learned):
                hidden = states[windows].clone().requires_grad_()
                with torch.enable_grad(), self.capture:
                    result = first(call(hidden, windows))
                (before[windows],) = torch.autograd.grad(result, hidden, gradient[windows])
        self.model.free(number)
        self.require_finite(before, f"the gradient at the input of block {number}")
        if not done and self.wanted_in(number):
            self.folder.save_gradients(number, sums.result())
        self.progress("gradients", len(self.model.blocks) - number, len(self.model.blocks))
        return before
