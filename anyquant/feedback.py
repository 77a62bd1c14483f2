"""Error feedback: quantize a matrix column by column, and let later columns make up for what earlier ones lost.

Source: Frantar et al., "GPTQ" (arXiv 2210.17323), sections 3.2 and 3.3: with U the upper Cholesky factor of the inverse
of H = E[x x^T], the error of column j, divided by U_jj, is taken off the columns k > j times U_jk.

Updates wait until there are enough of them for one matrix product: those within 16 columns are made at once, those
within 128 after every 16, all others after every 128.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from anyquant.errors import InputError

Floats = NDArray[np.float32]
QuantizeColumn = Callable[[int, Floats], Floats]
"""(number of the column, its values as they are by now, float32 [out]) -> the values that it will have."""

BeginGroup = Callable[[int, Floats], None]
"""(place of a group's first column in the order, the group's values as they are by now, float32 [columns, out])."""

DAMPING = 0.01
LEAST_POWER = 1e-4
"""What an input counts at least, relative to the mean power of all: no calibration text is all texts."""
GROUPS = (16, 32, 64, 128, 256)
_MOST_DAMPING = 100.0
_LEAF, _BLOCK = 16, 128
_LEAST_PIVOT = float(np.finfo(np.float32).eps)  # relative; less is the rounding of a moment in FP32


def activation_order(diagonal: Floats) -> NDArray[np.int64]:
    """Columns by the power of their inputs, the greatest first; ties in their own order."""
    return np.argsort(-diagonal.astype(np.float64), kind="stable")


def inverse_factor(moment: NDArray[np.floating], damping: float = DAMPING) -> NDArray[np.float64]:
    """The upper Cholesky factor U of the inverse of a damped moment, U^T U = (H + damping mean(diag H) I)^-1.

    Inputs that were always 0 count as independent, of power 1. Where the moment is singular, as far as FP32 can tell,
    the damping is raised tenfold until it is not.

    Args:
        moment: [in, in], symmetric: the mean of x x^T.
        damping: relative to the mean of the diagonal.

    Returns:
        float64 [in, in], upper triangular, with a positive diagonal.

    Raises:
        InputError: there is no such factor: the moment is not one of finite inputs.
    """
    whole = moment.astype(np.float64)
    if not np.isfinite(whole).all():
        raise InputError(f"the second moment of the inputs, {list(moment.shape)}, is not finite; calibrate again")
    diagonal = np.diag(whole).copy()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    whole[dead, :] = whole[:, dead] = 0.0
    while damping <= _MOST_DAMPING:
        np.fill_diagonal(whole, np.where(dead, 1.0, diagonal + damping * mean))
        try:
            # Of the matrix turned about both axes: inv(L) is then the upper factor of the inverse, turned as well.
            lower = np.linalg.cholesky(whole[::-1, ::-1])
        except np.linalg.LinAlgError:
            lower = None
        if lower is not None and (np.diag(lower)[~dead[::-1]] ** 2 >= _LEAST_PIVOT * mean).all():
            return _inverse_lower(lower)[::-1, ::-1]
        damping = 10 * damping if damping else 1e-6
    raise InputError(
        f"the second moment of the inputs, {list(moment.shape)}, is not positive even with a damping of "
        f"{_MOST_DAMPING:g}; calibrate again"
    )


def uncompensated(
    moment: NDArray[np.floating], order: NDArray[np.int64], damping: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What an error in each column raises the output's by, relative to what it would if no other made up for it.

    Args:
        moment: [in, in], the mean of x x^T.
        order: int64 [in], in which the columns are taken.
        damping: as for :func:`inverse_factor`.

    Returns:
        The factor of the moment in this order, and 1 / (U_jj^2 H_jj) by column, float64 [in]: the share of an input's
        power that those taken later do not explain. 1 where an input was always 0 and nothing is known.

    Raises:
        InputError: the moment is no moment.
    """
    factor = inverse_factor(moment[np.ix_(order, order)], damping)
    power = np.diag(moment).astype(np.float64)
    left = np.empty(len(order))
    left[order] = np.diag(factor) ** -2.0
    least = LEAST_POWER * power.mean()
    return factor, np.divide(left, np.maximum(power, least), out=np.ones(len(order)), where=power > 0)


def _inverse_lower(lower: NDArray[np.floating]) -> NDArray[np.float64]:
    """The inverse of a lower triangular matrix, by halves: products do most of the work."""
    n = len(lower)
    if n <= 64:
        inverse = np.linalg.inv(lower)
        return np.tril(inverse)
    half = n // 2
    result = np.zeros_like(lower)
    first, last = _inverse_lower(lower[:half, :half]), _inverse_lower(lower[half:, half:])
    result[:half, :half], result[half:, half:] = first, last
    result[half:, :half] = -last @ (lower[half:, :half] @ first)
    return result


def with_feedback(
    weight: Floats,
    moment: NDArray[np.floating],
    quantize: QuantizeColumn,
    *,
    order: NDArray[np.int64] | None = None,
    damping: float = DAMPING,
    factor: NDArray[np.floating] | None = None,
    zero_dead: bool = False,
    group: int = _LEAF,
    begin: BeginGroup | None = None,
) -> Floats:
    """Quantize all columns of a matrix, each with the errors of those before it made up for.

    Args:
        weight: float32 [out, in].
        moment: [in, in], the mean of x x^T over the inputs.
        quantize: called once for each column, in order.
        order: in which columns are taken; ascending where there is none.
        damping: of the moment, relative to the mean of its diagonal.
        factor: of the moment in this order as :func:`inverse_factor` gives it, where it is at hand.
        zero_dead: whether columns whose input was always 0 become 0 first, as in the published code.
        group: columns that ``begin`` sees at a time, one of GROUPS; the last ones may be fewer.
        begin: called before the first column of every group, when all errors so far have been made up for.

    Returns:
        float32 [out, in]: what ``quantize`` returned, each column in its place.

    Raises:
        InputError: the moment is no moment.
    """
    if group not in GROUPS:
        raise ValueError(f"groups of {group} columns; must be one of {GROUPS}")
    out, columns = weight.shape
    order = np.arange(columns) if order is None else order
    if factor is None:
        factor = inverse_factor(moment[np.ix_(order, order)], damping)
    # Columns as rows, neighbours in memory; and rows of the factor over their diagonal, which is what errors take.
    current = np.ascontiguousarray(weight.T[order])
    relative = (factor / np.diag(factor)[:, None]).astype(np.float32)
    if zero_dead:
        current[np.diag(moment)[order] <= 0] = 0
    result = np.empty_like(current)
    errors = np.empty((_BLOCK, out), np.float32)
    for block in range(0, columns, _BLOCK):
        end = min(block + _BLOCK, columns)
        for start in range(block, end, _LEAF):
            if begin is not None and start % group == 0:
                begin(start, current[start : start + group])
            stop = min(start + _LEAF, end)
            for place in range(start, stop):
                result[place] = quantize(int(order[place]), current[place])
                error = np.subtract(current[place], result[place], out=errors[place - block])
                current[place + 1 : stop] -= relative[place, place + 1 : stop, None] * error
            current[stop:end] -= relative[start:stop, stop:end].T @ errors[start - block : stop - block]
        current[end:] -= relative[block:end, end:].T @ errors[: end - block]
    back = np.empty_like(result)
    back[order] = result
    return np.ascontiguousarray(back.T)
