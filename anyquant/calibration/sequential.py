"""Sequential calibration: every matrix is quantized for the inputs that the quantized matrices before it make.

:func:`~anyquant.calibration.calibrate` records what the matrices of the unquantized model see. Here the same tokens go
through the model once more, and it is quantized on the way: in each block, the matrices that share an input are
recorded with all that comes before them already quantized, are quantized, and the dequantized weights take their place
before the next ones are recorded. So later matrices make up for some of what earlier ones lost. This is the order of
GPTQ's code with ``--true-sequential``, and of CLAQ's (arXiv 2405.17233): within a Llama's block q, k, v; o; gate, up;
down. The order is taken from what the first calibration saw, so it holds for any family.

Gradients stay those of the unquantized model: they say what an error costs, not how it comes about. So do the inputs
that they were multiplied with, where that was recorded (``importance="fisher"``, moments by group of rows).

Cost, in forwards of each block: one for its output, and one for each group, as far as the group's matrices (all the way
in groups of experts); one in all where the whole block is there already. Memory: one block, the hidden states of all
tokens twice, the moments of one group, and what quantizing a group needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch

from anyquant.calibration.batches import BatchedCall
from anyquant.calibration.blocks import Parts, StreamedModel
from anyquant.calibration.capture import Reading
from anyquant.calibration.passes import Finished, StreamedPass
from anyquant.calibration.run import torch_threads
from anyquant.calibration.store import Floats, MatrixStatistics, Moment, Statistics
from anyquant.checkpoint import Checkpoint
from anyquant.errors import AnyquantError, UsageError
from anyquant.ir import Progress

Weights = Iterable[tuple[str, Floats]]
"""(name, dequantized float32 [out, in]), in any order; taken one at a time."""
Quantize = Callable[[list[str], dict[str, MatrixStatistics | None]], Weights]
"""(matrices of a group, what is known of each) -> their dequantized weights."""
Stored = Callable[[list[str]], Weights | None]
"""(matrices of a group) -> their dequantized weights where all were quantized before, else None."""

_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")


def quantize_in_sequence(
    checkpoint: Checkpoint,
    names: Sequence[str],
    statistics: Statistics,
    quantize: Quantize,
    *,
    stored: Stored | None = None,
    progress: Progress | None = None,
) -> None:
    """Have all matrices quantized in the order in which the model calls them, a group at a time.

    An embedding that is not the output head comes first, so that all else sees it quantized. What else lies outside of
    the blocks comes last; an embedding that is the head too is quantized for the head's input, and the blocks see it
    as it was. Blocks after the last matrix are not run.

    Torch computes with as many threads as in the calibration, so that the moments are, byte for byte, the same however
    often this was interrupted, and those of the calibration as long as ``quantize`` changes nothing.

    Args:
        checkpoint: the model; one block of it is in memory at a time.
        names: the matrices to quantize, all or some of those that the calibration was for.
        statistics: the complete calibration of the unquantized model; gives tokens and gradients.
        quantize: quantizes a group. Of a matrix' statistics the moments are of what it sees now (of an expert that no
            token goes to any more, what it saw before), held in memory, and the gradients those of the calibration;
            None for an expert that never saw a token.
        stored: asked about each group before it is recorded.
        progress: called after each block, with the stage "blocks".

    Raises:
        UsageError: the calibration is another model's, or a name is not in the checkpoint.
        InputError: quantized weights make activations that are not finite.
        NonFiniteError: a weight of the checkpoint is not finite.
        AnyquantError: ``quantize`` or ``stored`` gave back other matrices or shapes than it was asked for.
    """
    unknown = [name for name in names if name not in checkpoint.tensors]
    if unknown:
        raise UsageError(f"{checkpoint.name} has no tensor {unknown[0]!r} to quantize")
    if statistics.identity.get("model") != checkpoint.fingerprint():
        raise UsageError(
            f"the calibration is not that of {checkpoint.name}, or the checkpoint was changed since. Calibrate again "
            "into an empty folder."
        )
    with torch_threads(statistics.threads):
        _SequentialPass(
            StreamedModel(checkpoint),
            names,
            statistics,
            quantize,
            stored or (lambda names: None),
            progress or (lambda name, done, whole: None),
        ).run()


class _Recorded(Exception):
    """A group has seen all its inputs of a batch: the rest of the block need not be computed."""


class _SequentialPass(StreamedPass):
    """Goes through the model and puts quantized weights in the place of its own."""

    overflow = (
        "Before quantization they were finite, so the quantized weights before them are too far off: choose more bits, "
        "or leave out sequential calibration."
    )

    def __init__(
        self,
        model: StreamedModel,
        names: Sequence[str],
        statistics: Statistics,
        quantize: Quantize,
        stored: Stored,
        progress: Progress,
    ) -> None:
        ids = torch.from_numpy(statistics.ids())
        super().__init__(model, ids, set(names), progress, diagonals_alone=statistics.norms_alone)
        self._statistics, self._quantize, self._stored = statistics, quantize, stored
        self._left = dict.fromkeys(names)  # in this order

    def run(self) -> None:
        """Go through the model."""
        model = self.model
        parts = model.load(model.outside, head=False)
        with torch.no_grad(), suppress(Finished):
            self._finish_early()
            if model.embedding in self._left and model.embedding != model.head:
                name = str(model.embedding)
                self._settle([name], parts, partial(self._known, [name], []))
                self._finish_early()
            sums = self.moment_sums(self.wanted_in(model.outside))
            output = self.through_blocks(parts, sums.product, self._block)
            last = list(self._left)
            self._settle(last, [], lambda: self._known(last, self.outside_moments(sums, output)))
        model.free(model.outside)

    def _block(self, number: int, call: BatchedCall, hidden: torch.Tensor) -> Any:
        """Quantize a block, group by group, and take all windows through the result."""
        parts = self.model.load(number)
        for names in groups(parts, self.wanted_in(number), self._statistics.groups()):
            self._settle(names, parts, partial(self._record, parts, names, call, hidden))
        # What comes after the last matrix that is quantized is nobody's input.
        output = self.through_block(number, call, hidden) if self._left else None
        self.model.free(number)
        self.progress("blocks", number + 1, len(self.model.blocks))
        self._finish_early()
        return output

    def _finish_early(self) -> None:
        if not self._left:
            raise Finished

    def _settle(self, names: list[str], parts: Parts, known: Callable[[], dict[str, MatrixStatistics | None]]) -> None:
        """Have a group quantized, unless it is, and put the weights that come back among those that are loaded.

        Raises:
            AnyquantError: what comes back is not what was asked for.
        """
        places = {piece.name: part.T if piece.transposed else part for piece, part in parts}
        missing = set(names)
        found = self._stored(names)
        statistics = known() if found is None else {}
        with torch.enable_grad():  # as it is outside of this pass: methods may learn
            for name, weight in self._quantize(names, statistics) if found is None else found:
                place = places.get(name)
                if name not in missing or (place is not None and place.shape != weight.shape):
                    raise AnyquantError(
                        f"{name} {list(weight.shape)} came back from quantization, which was asked for {names} in the "
                        "shapes of the checkpoint"
                    )
                if place is not None:
                    place.copy_(torch.from_numpy(np.require(weight, np.float32, "W")))
                missing.remove(name)
        if missing:
            raise AnyquantError(f"{sorted(missing)[0]} did not come back from quantization")
        for name in names:
            del self._left[name]

    def _record(
        self, parts: Parts, names: list[str], call: BatchedCall, hidden: torch.Tensor
    ) -> dict[str, MatrixStatistics | None]:
        """What is known of a group of a block's matrices, with the moments of what they see now."""
        sums = self.moment_sums(set(names))
        every = self.ids.numel()
        # Matrices that saw each token once have seen all of a batch when they were called once.
        seen = [self._statistics.matrix(name) for name in names]
        once = all(known is not None and known.tokens == every for known in seen)
        missing: set[str] = set()

        def product(x: torch.Tensor, readings: list[Reading], output: torch.Tensor) -> None:
            sums.product(x, readings, output)
            missing.difference_update(reading.name for reading in readings)
            if once and not missing:
                raise _Recorded

        with self.recording(parts, product):
            for windows in call.batches():
                missing.update(names)
                with suppress(_Recorded):
                    call(hidden[windows], windows)
                sums.flush()
        return self._known(names, sums.result())

    def _known(self, names: list[str], moments: list[Moment]) -> dict[str, MatrixStatistics | None]:
        """What is known of some matrices; of those that nothing was recorded of, what the calibration saw."""
        by_name = {name: moment for moment in moments for name in moment.names}
        return {
            name: self._statistics.with_moment(name, by_name[name])
            if name in by_name
            else self._statistics.matrix(name)
            for name in names
        }


def groups(parts: Parts, wanted: set[str], inputs: Sequence[Sequence[str]]) -> list[list[str]]:
    """The matrices of a block that can be recorded together, in the order in which the block calls them.

    Those are the matrices that read the same input; and of experts, which do not see each other's outputs, the same
    matrices of all.

    Args:
        parts: the loaded weights of the block.
        wanted: names of the matrices to quantize.
        inputs: matrices that read the same input, in the order of the calls; others may be among them. An expert that
            saw no token is missing.
    """
    targets = {piece.name: _EXPERT.sub("*", piece.target) for piece, _ in parts if piece.name in wanted}
    found: list[list[str]] = []
    of: dict[str, list[str]] = {}  # the group that fills a parameter, or one of those that differ by the expert only
    for reading in inputs:
        names = [name for name in reading if name in targets]
        if names:
            group = next((of[targets[name]] for name in names if targets[name] in of), None)
            if group is None:
                group = []
                found.append(group)
            group += names
            of.update({targets[name]: group for name in names})
    seen = {name for group in found for name in group}
    rest: list[str] = []
    for name in targets:
        if name not in seen:
            of.get(targets[name], rest).append(name)
    return [*found, rest] if rest else found
