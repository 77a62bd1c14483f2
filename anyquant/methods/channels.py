"""What methods share whose channels, rows or columns, own codebooks: what errors count, palettes, bits by an order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anyquant.errors import UsageError
from anyquant.ir import CodebookSpec, Tensor
from anyquant.methods.codebooks import (
    MOST_BITS,
    CodebookBuilder,
    clustering_errors,
    largest,
    levels_of,
    offered_widths,
)
from anyquant.methods.importance import Importance, chunks
from anyquant.methods.protocol import Floats, LevelArray, Levels

if TYPE_CHECKING:
    from anyquant.calibration import MatrixStatistics

Bools = NDArray[np.bool_]
PALETTE_HELP = "widths on offer: a list such as 2,4; auto for all; paper for the paper's, by --bits with --count index"

_SLOPE = 0.125  # by how much the first upgrade of a stage is worth more than the last
_MARGIN = 1.5  # by how much a stage is worth more than the next; above 1 + _SLOPE


class Channels:
    """A matrix by channels, and what a squared error of each of its weights counts.

    Attributes:
        axis: 0 where channels are rows, 1 where they are columns.
        values: float32 [channels, length].
        scale: factor that makes errors compare across matrices; see :meth:`Importance.scale`.
    """

    def __init__(self, weight: Floats, axis: int, statistics: MatrixStatistics | None, *, gradients: bool) -> None:
        """Take a matrix, float32 [out, in].

        Args:
            weight: the matrix.
            axis: of its channels.
            statistics: of its input; without them every error counts the same.
            gradients: whether rows, or weights, count by their own gradients where there are any, else by their
                mean over the matrix.
        """
        importance = Importance(weight, statistics)
        counts, rows = importance.all(slice(None)), importance.of_rows
        if not gradients and importance.in_nats:
            plain = Importance(weight, statistics, gradients=False).all(slice(None))
            mean = counts.mean(axis=1, dtype=np.float64) if rows is None else rows * counts[0].mean(dtype=np.float64)
            counts, rows = plain * np.float32(mean.mean() / plain[0].mean(dtype=np.float64)), None
        self.axis = axis
        self.values = weight if axis == 0 else np.ascontiguousarray(weight.T)
        self.scale = importance.scale(weight)
        self._counts = counts if axis == 0 else counts.T
        self._rows = rows

    def counts(self, part: Any, removed: Bools | None = None) -> Floats:
        """What errors of some channels count, float32 [n, length]; 0 where a weight was removed.

        Args:
            part: a slice, or numbers of channels.
            removed: bool [channels, length].
        """
        counts: Floats = np.array(self._counts[part], np.float32)
        if self._rows is not None:
            counts *= self._rows[part][:, None] if self.axis == 0 else self._rows
        if removed is not None:
            counts[removed[part]] = 0
        return counts

    def errors(self, widths: Sequence[int], removed: Bools | None = None) -> NDArray[np.float64]:
        """The least weighted squared error of each channel at each width, float64 [channels, widths], not scaled."""
        table = np.empty((len(self.values), len(widths)))
        for part in chunks(self.values):
            table[part] = clustering_errors(self.values[part], self.counts(part, removed), widths)
        return table

    def most(self, score: Floats, count: int, removed: Bools | None = None) -> Bools:
        """Mark the largest scores, bool [channels, length]; of equal ones those that come first in the channels.

        Args:
            score: float32 [channels, length], finite and not negative.
            count: how many; there are as many that were not removed.
            removed: bool [channels, length], those that cannot be marked.
        """
        marked = np.zeros(score.shape, bool)
        marked.ravel()[largest(score if removed is None else np.where(removed, np.float32(-1), score), count)] = True
        return marked

    def flat(self, marked: Bools | None) -> NDArray[np.int64]:
        """Flat indices of marked weights in the matrix, ascending."""
        if marked is None:
            return np.empty(0, np.int64)
        return np.flatnonzero(marked if self.axis == 0 else marked.T)


def resolve_palette(method: str, settings: Mapping[str, Any], bits: float | None, paper: Sequence[str]) -> str:
    """The palette as a list of widths, or ``auto``.

    Args:
        method: its name, for messages.
        settings: with a ``palette``.
        bits: of codes that are asked for, where the target says.
        paper: the paper's palettes below 3 bits, from 3 bits on, and where the bits are not known.

    Raises:
        UsageError: no list of ascending widths within 0..8.
    """
    text = str(settings["palette"])
    if text == "auto":
        return text
    if text == "paper":
        return paper[2] if bits is None else paper[int(bits >= 3)]
    try:
        widths = [int(word) for word in text.split(",")]
    except ValueError:
        widths = []
    if not widths or widths != sorted(set(widths)) or not 0 <= widths[0] <= widths[-1] <= MOST_BITS:
        raise UsageError(
            f"the option palette of the method {method} is {text!r}, must be auto, paper, or widths within "
            f"0..{MOST_BITS} in ascending order with commas between, such as 2,4."
        )
    return ",".join(map(str, widths))


def widths_of(palette: str, length: int) -> tuple[int, ...]:
    """The widths that channels of some length choose from: those of the palette that take less than FP16."""
    offered = offered_widths(length)
    if palette == "auto":
        return offered
    asked = tuple(int(word) for word in palette.split(","))
    return tuple(width for width in asked if width in offered) or asked[:1]


def channel_levels(shape: tuple[int, int], axis: int, widths: tuple[int, ...], outliers: int) -> Levels:
    """What the channels of a matrix choose from, with a number of outliers in the overhead."""
    flat = CodebookSpec.from_bits(shape, axis, np.full(shape[axis], widths[0], np.uint8), outliers=outliers)
    channels = levels_of(shape, axis, widths, 0)
    return levels_of(shape, axis, widths, flat.nbytes - shape[axis] * channels.nbytes[0])


def in_order(
    errors: NDArray[np.float64],
    levels: Levels,
    order: NDArray[np.int64],
    stages: Sequence[tuple[int, slice]] | None = None,
) -> NDArray[np.float64]:
    """A table that makes bits follow an order: walking its hulls takes unit after unit, stage after stage.

    What a unit saves in it is what units save on average by the same upgrade, but for a small slope along the order,
    and more where a stage would else be worth less than a later one. It orders by stored bytes and by code bytes.

    Args:
        errors: float64 [units, levels], what they lose.
        levels: of the units.
        order: the units, the first to get bits first.
        stages: (level that is gone to, places in the order) of each stage; level by level if there are none. Each
            level of a unit comes before its next, and each once.

    Returns:
        float64 [units, levels].
    """
    count = errors.shape[1]
    stages = [(level, slice(None)) for level in range(1, count)] if stages is None else stages
    mean = errors.mean(axis=0)
    saved = np.maximum(-np.diff(mean), 1e-9 * (mean[0] or 1.0))
    costs = [np.diff(levels.nbytes).astype(np.float64), np.maximum(np.diff(levels.code_bytes), 1).astype(np.float64)]
    slope = 1 + _SLOPE * (1 - np.arange(len(order)) / len(order))
    table = np.full(errors.shape, mean[-1])
    gain, after = 0.0, 0
    for level, places in reversed(stages):
        step = level - 1
        if gain:
            gain *= _MARGIN * max(float(cost[step] / cost[after]) for cost in costs)
        gain, after = max(gain, float(saved[step])), step
        table[order[places], :level] += gain * slope[places, None]
    return table


def assemble(
    spec: CodebookSpec,
    widths: LevelArray,
    codes: NDArray[np.uint8],
    codebooks: Sequence[NDArray[np.float16]],
    values: Floats,
    outliers: NDArray[np.int64],
) -> Tensor:
    """The tensor of all channels.

    Args:
        spec: its form.
        widths: uint8 [channels].
        codes: uint8 [channels, length].
        codebooks: float16 [2**width] of each channel, ascending.
        values: float32 [out, in]; outliers take theirs from it.
        outliers: flat indices, ascending.
    """
    builder = CodebookBuilder(spec, widths)
    for width in np.unique(widths):
        members = np.flatnonzero(widths == width)
        builder.put(members, codes[members], np.stack([codebooks[channel] for channel in members.tolist()]))
    return builder.tensor(values, outliers)


def chosen_widths(widths: tuple[int, ...], chosen: LevelArray) -> LevelArray:
    """The widths of channels, uint8 [channels], by their levels."""
    return np.array(widths, np.uint8)[chosen]
