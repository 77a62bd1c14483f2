"""A matrix from close by, against loops over its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.ir import packing
from anyquant.report.detail import by_width, detail, losses
from anyquant.report.matrices import matrices
from anyquant.testing import block_tensor, codebook_tensor


@pytest.fixture(params=["rows", "columns", "block", "scaled"])
def one(request: pytest.FixtureRequest, write: Callable[..., ir.Model]) -> ir.Model:
    """A model of one matrix, 9 x 37."""
    rng = np.random.default_rng(3)
    if request.param == "block":
        return write({"w": block_tensor(ir.BlockSpec((9, 37), "bfp", 4, 16), exponents=(-3, 3))})
    axis = int(request.param == "columns")
    bits = rng.integers(0, 6, (9, 37)[axis])
    return write({"w": codebook_tensor((9, 37), axis, bits, outliers=6, scaled=request.param == "scaled")})


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one chunk even of a small matrix."""
    monkeypatch.setattr(packing, "_CHUNK", 80)


def slow_losses(before: np.ndarray, after: np.ndarray, axis: int) -> tuple[list[float], list[float]]:
    power, lost = [0.0] * before.shape[axis], [0.0] * before.shape[axis]
    for i, j in np.ndindex(before.shape):
        power[(i, j)[axis]] += float(before[i, j]) ** 2
        lost[(i, j)[axis]] += (float(before[i, j]) - float(after[i, j])) ** 2
    return power, lost


def test_losses(one: ir.Model, source_of: Callable[..., Any]) -> None:
    [matrix] = matrices(one)
    source = source_of(one)
    found = losses(matrix, one.tensor("w"), source)
    power, lost = slow_losses(source.values["w"], one.dequantize("w"), int(matrix.unit == "column"))
    np.testing.assert_allclose(found.power, power)
    np.testing.assert_allclose(found.lost, lost)
    np.testing.assert_allclose(found.share, np.array(lost) / sum(lost))


def test_histograms(one: ir.Model, source_of: Callable[..., Any]) -> None:
    [matrix] = matrices(one)
    source = source_of(one)
    found = detail(one, matrix, source)
    assert found.before is not None
    assert found.before.sum() == found.after.sum() == 9 * 37
    for values, counts in ((source.values["w"], found.before), (one.dequantize("w"), found.after)):
        np.testing.assert_array_equal(counts, np.histogram(values, found.edges)[0])
    assert found.edges[0] == min(source.values["w"].min(), one.dequantize("w").min())
    assert found.edges[-1] == max(source.values["w"].max(), one.dequantize("w").max())


def test_rows_in_detail(one: ir.Model, source_of: Callable[..., Any]) -> None:
    [matrix] = matrices(one)
    source = source_of(one)
    found = detail(one, matrix, source)
    assert found.losses is not None
    column = matrix.unit == "column"
    assert found.word == ("column" if column else "row")
    bits = matrix.bits if matrix.unit != "matrix" else np.full(9, matrix.bits[0])
    hard, *common = found.units
    assert hard.bits == bits.max()
    assert hard.index == max(np.flatnonzero(bits == bits.max()), key=lambda i: found.losses.lost[i])  # type: ignore[union-attr]
    assert all(unit.bits == np.sort(bits)[len(bits) // 2] for unit in common)
    for unit in found.units:
        after, before = one.dequantize("w"), source.values["w"]
        after, before = (
            (after[:, unit.index], before[:, unit.index]) if column else (after[unit.index], before[unit.index])
        )
        assert dict(zip(unit.values.tolist(), unit.counts.tolist(), strict=True)) == Counter(after.tolist())
        assert unit.before is not None
        assert unit.before.sum() == len(before)
        np.testing.assert_array_equal(unit.before, np.histogram(before, unit.edges)[0])
        assert unit.share == pytest.approx(found.losses.share[unit.index])


def test_rows_of_equal_width(one: ir.Model, source_of: Callable[..., Any]) -> None:
    [matrix] = matrices(one)
    source = source_of(one)
    found = detail(one, matrix, source)
    groups = by_width(found)
    if matrix.unit == "matrix":
        assert groups == []
        return
    power, lost = slow_losses(source.values["w"], one.dequantize("w"), int(matrix.unit == "column"))
    length = matrix.entry.spec.numel // len(matrix.bits)
    assert [g["bits"] for g in groups] == sorted(set(matrix.bits.tolist()))
    for group in groups:
        members = [i for i, width in enumerate(matrix.bits) if width == group["bits"]]
        assert group["units"] == len(members)
        assert group["share"] == pytest.approx(len(members) / len(matrix.bits))
        assert group["power"] == pytest.approx(sum(power[i] for i in members) / sum(power))
        assert group["error"] == pytest.approx(sum(lost[i] for i in members) / sum(lost))
        assert group["rms"][2] == pytest.approx(np.median([(power[i] / length) ** 0.5 for i in members]))


def test_without_the_source(one: ir.Model) -> None:
    [matrix] = matrices(one)
    found = detail(one, matrix, None)
    assert found.before is None
    assert found.losses is None
    assert by_width(found) == []
    assert found.after.sum() == 9 * 37
    assert all(unit.before is None and unit.share is None for unit in found.units)
    assert found.to_json()["before"] is None


def test_a_matrix_of_one_value(write: Callable[..., ir.Model], source_of: Any) -> None:
    """No range, no width to tell apart, and nothing lost."""
    tensor = codebook_tensor((4, 10), 0, [0, 0, 0, 0])
    tensor.arrays[".codebook"][:] = 0
    model = write({"w": tensor})
    found = detail(model, matrices(model)[0], source_of(model, scale=0.0))
    assert found.after.sum() == 40
    assert np.all(np.diff(found.edges) > 0)
    assert found.losses is not None
    assert found.losses.share.tolist() == [0.0] * 4
    [group] = by_width(found)
    assert (group["power"], group["error"]) == (0.0, 0.0)
