"""Peers with uniform grids: rounding to nearest (RTN), and GPTQ.

Both store codes of a few bits, and for every group of a row an FP16 scale and a zero of as many bits as a code. They
are counted without any padding but to whole bytes at the end, which favours them.

Sources: Frantar et al., "GPTQ" (arXiv 2210.17323), and its published settings: asymmetric grids that contain 0, from
the extremes of each group; ``static groups``, the grids come from the uncompensated weights; ``act-order``, columns by
the power of their inputs. ``clipped`` grids are searched like the published option ``mse``: of 80 ranges, from the
whole down to .208 of it, the one with the least sum of |error|^2.4.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import numpy as np

from accuracy.interface import Floats, Peer, Shape
from anyquant.feedback import activation_order, with_feedback

GROUP = 64
_SHRINK, _STEPS, _NORM = 0.8, 100, 2.4
_LEAST = np.float32(2.0**-24)  # the least positive FP16


def rtn(bits: int, group: int | None = GROUP) -> Peer:
    """Rounding to nearest.

    Args:
        bits: of a code, 1..8.
        group: columns that share a scale; None for all of a row.
    """

    def quantize(weight: Floats, moment: Floats) -> Floats:
        scale, zero = grids(weight, bits, group, clipped=False)
        return nearest(weight, _spread(scale, weight, group), _spread(zero, weight, group), bits)

    return Peer(f"RTN {bits} bits, {_group_name(group)}", _counted(bits, group), quantize)


def gptq(bits: int, group: int | None = GROUP, *, clipped: bool = False) -> Peer:
    """GPTQ with act-order and static groups.

    Args:
        bits: of a code, 1..8.
        group: columns that share a scale; None for all of a row.
        clipped: search the range of each group instead of taking its extremes.
    """

    def quantize(weight: Floats, moment: Floats) -> Floats:
        scale, zero = grids(weight, bits, group, clipped=clipped)
        wide = group or weight.shape[1]

        def column(number: int, values: Floats) -> Floats:
            return nearest(values, scale[:, number // wide], zero[:, number // wide], bits)

        order = activation_order(np.diag(moment))
        return with_feedback(weight, moment, column, order=order, zero_dead=True)

    name = f"GPTQ {bits} bits, {_group_name(group)}{', clipped' if clipped else ''}"
    return Peer(name, _counted(bits, group), quantize)


def grids(weight: Floats, bits: int, group: int | None, *, clipped: bool) -> tuple[Floats, Floats]:
    """Scales and zeros of all groups.

    Args:
        weight: float32 [out, in].
        bits: of a code.
        group: columns in each; the last may have fewer.
        clipped: as in :func:`gptq`.

    Returns:
        scale, positive and exact in FP16, and zero, whole numbers of 0..2**bits - 1; both float32 [out, groups].
    """
    wide = group or weight.shape[1]
    parts = [weight[:, start : start + wide] for start in range(0, weight.shape[1], wide)]
    found = [_grid(part, bits, clipped) for part in parts]
    return np.stack([scale for scale, _ in found], axis=1), np.stack([zero for _, zero in found], axis=1)


def nearest(values: Floats, scale: Floats, zero: Floats, bits: int) -> Floats:
    """The nearest values of asymmetric grids, (code - zero) * scale, float32 as ``values``."""
    code = np.clip(np.rint(values / scale) + zero, 0, (1 << bits) - 1)
    return np.asarray((code - zero) * scale, np.float32)


def _grid(values: Floats, bits: int, clipped: bool) -> tuple[Floats, Floats]:
    low = np.minimum(values.min(axis=1), 0)
    high = np.maximum(values.max(axis=1), 0)
    scale, zero = _scale_and_zero(low, high, bits)
    if not clipped:
        return scale, zero
    least = _loss(values, scale, zero, bits)
    for step in range(1, int(_SHRINK * _STEPS)):
        share = np.float32(1 - step / _STEPS)
        other, moved = _scale_and_zero(share * low, share * high, bits)
        loss = _loss(values, other, moved, bits)
        better = loss < least
        scale, zero = np.where(better, other, scale), np.where(better, moved, zero)
        least = np.minimum(loss, least)
    return scale, zero


def _scale_and_zero(low: Floats, high: Floats, bits: int) -> tuple[Floats, Floats]:
    most = np.float32((1 << bits) - 1)
    scale = ((high - low) / most).astype(np.float16).astype(np.float32)
    scale = np.maximum(scale, _LEAST)
    return scale, np.clip(np.rint(-low / scale), 0, most).astype(np.float32)


def _loss(values: Floats, scale: Floats, zero: Floats, bits: int) -> Floats:
    error = np.abs(nearest(values, scale[:, None], zero[:, None], bits) - values)
    total: Floats = (error**_NORM).sum(axis=1)
    return total


def _spread(grid: Floats, weight: Floats, group: int | None) -> Floats:
    """What belongs to groups, for every column."""
    return np.repeat(grid, group or weight.shape[1], axis=1)[:, : weight.shape[1]]


def _counted(bits: int, group: int | None) -> Callable[[Shape], float]:
    def counted(shape: Shape) -> float:
        out, columns = shape
        groups = out * ceil(columns / (group or columns))
        nbytes = ceil(out * columns * bits / 8) + 2 * groups + ceil(groups * bits / 8)
        return 8 * nbytes / (out * columns)

    return counted


def _group_name(group: int | None) -> str:
    return f"group {group}" if group else "per row"
