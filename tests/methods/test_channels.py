"""What the methods of channels share: palettes, bits by an order, what errors count, on both axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from anyquant.allocation import Table, walk, within
from anyquant.calibration import MatrixStatistics
from anyquant.errors import UsageError
from anyquant.methods.channels import Channels, channel_levels, in_order, resolve_palette, widths_of

stats = MatrixStatistics.of

PAPER = ("2,4", "3,4", "2,3,4")


def known_of(kind: str, shape: tuple[int, int]) -> Any:
    rng = np.random.default_rng(2)
    diagonal = np.exp2(rng.uniform(-4, 4, shape[1])).astype(np.float32)
    gradients = np.exp2(rng.uniform(-6, 2, shape)).astype(np.float32)
    return {
        "none": None, "activation": stats(diagonal), "gradient": stats(diagonal, gradients[:, 0].copy()),
        "fisher": stats(diagonal, gradients),
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "bits", "palette"),
    [
        ("paper", 2.1, "2,4"), ("paper", 3.0, "3,4"), ("paper", 3.9, "3,4"), ("paper", None, "2,3,4"),
        ("auto", 2.0, "auto"), ("0,8", None, "0,8"), (" 2, 4", 3.0, "2,4"), ("5", None, "5"),
    ],
)  # fmt: skip
def test_palettes(text: str, bits: float | None, palette: str) -> None:
    assert resolve_palette("m", {"palette": text}, bits, PAPER) == palette


@pytest.mark.parametrize("text", ["", "two", "4,2", "2,2", "9", "-1,2", "2;4", "2,,4"])
def test_bad_palettes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"palette of the method m is '{text}'"):
        resolve_palette("m", {"palette": text}, None, PAPER)


def test_widths_that_take_more_than_fp16_are_not_offered() -> None:
    assert widths_of("auto", 576) == tuple(range(9))
    assert widths_of("auto", 64) == (0, 1, 2, 3, 4, 5)
    assert widths_of("2,4,8", 64) == (2, 4)
    assert widths_of("2,4,8", 576) == (2, 4, 8)
    assert widths_of("4,5", 8) == (4,)  # something must be: the narrowest


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", ["none", "activation", "gradient", "fisher"])
def test_what_errors_count(kind: str, gradients: bool, axis: int) -> None:
    shape = (5, 7)
    known = known_of(kind, shape)
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    whole = np.ones(shape)
    if known is not None:
        whole = np.broadcast_to(known.diagonal.astype(np.float64), shape)
        if kind == "fisher":
            whole = known.fisher() + 0.3 * known.fisher().mean(axis=0)
        elif kind == "gradient":
            whole = np.outer(known.gradient() + 0.3 * known.gradient().mean(), known.diagonal)
        if not gradients:
            plain = np.broadcast_to(known.diagonal.astype(np.float64), shape)
            whole = plain * whole.mean() / plain.mean()  # the same in all
    channels = Channels(weight, axis, known, gradients=gradients)
    turned = whole if axis == 0 else whole.T
    np.testing.assert_allclose(channels.counts(slice(None)), turned, rtol=1e-5)
    some = np.array([1, 4])
    removed = np.zeros(turned.shape, bool)
    removed[4, 0] = removed[0, 0] = True
    counted = channels.counts(some, removed)
    assert counted[1, 0] == 0
    np.testing.assert_allclose(counted[0], turned[1], rtol=1e-5)
    np.testing.assert_allclose(counted[1, 1:], turned[4, 1:], rtol=1e-5)
    np.testing.assert_array_equal(channels.values, weight if axis == 0 else weight.T)
    flat = [i * 7 + j for i in range(5) for j in range(7) if (removed if axis == 0 else removed.T)[i, j]]
    assert channels.flat(removed).tolist() == flat
    power = float((np.broadcast_to(known.diagonal, shape) * weight.astype(np.float64) ** 2).sum()) if known else 0.0
    expected = {"none": weight.size / float((weight.astype(np.float64) ** 2).sum())}
    assert channels.scale == pytest.approx(
        expected.get(kind, weight.size / power if kind == "activation" else 1.0), rel=1e-5
    )


def test_a_channel_of_removed_weights_alone_loses_nothing() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    channels = Channels(weight, 1, None, gradients=True)
    removed = np.zeros((3, 6), bool)
    removed[1] = True
    errors = channels.errors((0, 1), removed)
    assert errors[1].tolist() == [0, 0]
    assert (errors[[0, 2]] > 0).all()


def test_the_most_are_taken_in_order_and_never_those_removed() -> None:
    channels = Channels(np.zeros((4, 2), np.float32), 1, None, gradients=True)
    score = np.array([[1, 3, 3, 0], [9, 3, 0, 0]], np.float32)
    removed = score == 9
    assert np.argwhere(channels.most(score, 2, removed)).tolist() == [[0, 1], [0, 2]]
    assert np.argwhere(channels.most(score, 2)).tolist() == [[0, 1], [1, 0]]
    assert channels.most(np.zeros_like(score), 7, removed).sum() == 7
    assert not (channels.most(np.zeros_like(score), 7, removed) & removed).any()


@pytest.mark.parametrize("count", ["nbytes", "code_bytes"])
@pytest.mark.parametrize("kind", ["as measured", "zeros", "useless", "rising gains"])
@pytest.mark.parametrize(("units", "length", "palette"), [(5, 64, "2,4"), (40, 192, "auto"), (7, 576, "0,1,3,8")])
def test_hulls_are_walked_in_the_order(units: int, length: int, palette: str, kind: str, count: str) -> None:
    rng = np.random.default_rng(0)
    widths = widths_of(palette, length)
    levels = channel_levels((length, units), 1, widths, 0)
    errors = {
        "as measured": rng.random((units, 1)) * 4.0 ** -np.array(widths),
        "zeros": np.zeros((units, len(widths))),
        "useless": np.ones((units, len(widths))),
        "rising gains": 10.0 - np.broadcast_to(np.array(widths, float) ** 2 / 7, (units, len(widths))),
    }[kind]
    order = rng.permutation(units)
    table = in_order(errors, levels, order)
    assert (table >= 0).all()
    steps = walk([Table(getattr(levels, count), table)])
    assert steps.unit.tolist() == order.tolist() * (len(widths) - 1)
    assert steps.level.tolist() == np.repeat(np.arange(1, len(widths)), units).tolist()
    if kind == "as measured":  # and its sums are what the units lose together, but for the slope
        np.testing.assert_allclose(table.sum(axis=0), errors.sum(axis=0), rtol=0.2)


def test_stages_come_one_after_the_other() -> None:
    levels = channel_levels((64, 10), 1, (2, 3, 4), 0)
    order = np.arange(10)[::-1].copy()
    stages = [(1, slice(0, 8)), (2, slice(0, 2)), (1, slice(8, 10)), (2, slice(2, 10))]
    errors = np.ones((10, 1)) * 4.0 ** -np.array([2, 3, 4])
    table = in_order(errors, levels, order, stages)
    steps = walk([Table(levels.code_bytes, table)])
    expected = [(9 - place, level) for level, places in stages for place in range(10)[places]]
    assert list(zip(steps.unit.tolist(), steps.level.tolist(), strict=True)) == expected
    # At three bits on average the first two have four, and the last two still have two.
    assert within(steps, levels.code_bytes, 10 * 24)[0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 2, 2]
