"""Codebook tensors as they are stored for the ONNX operators, and their independent reader on arrays that lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import CorruptFileError
from anyquant.exporters.onnx.codebook import array_shapes, plane_rows, stored_arrays
from anyquant.exporters.onnx.codebook_reader import Stored, weights
from anyquant.testing import codebook_tensor


def _stored(tensor: ir.Tensor) -> Stored:
    arrays = stored_arrays(tensor)
    none = {".input_scale": np.ones(1, np.float16), ".outlier_indptr": np.zeros(1, np.uint32)}
    none |= {".outlier_index": np.zeros(0, np.uint16), ".outlier_value": np.zeros(0, np.float16)}
    return Stored(arrays[".bits"], arrays[".planes"], arrays[".codebook"], *(arrays.get(s, a) for s, a in none.items()))


def _codes(tensor: ir.Tensor, channel: int) -> list[int]:
    """The codes of a channel, from one big number: the IR's definition, bit by bit."""
    spec, bits = tensor.spec, tensor.arrays[".bits"].tolist()
    assert isinstance(spec, ir.CodebookSpec)
    length = spec.shape[1 - spec.axis]
    start = sum((length * b + 7) // 8 for b in bits[:channel])
    raw = tensor.arrays[".codes"][start : start + (length * bits[channel] + 7) // 8].tobytes()
    number = int.from_bytes(raw, "little")
    return [number >> (i * bits[channel]) & ((1 << bits[channel]) - 1) for i in range(length)]


@pytest.mark.parametrize(("shape", "axis"), [((5, 16), 0), ((16, 5), 1), ((9, 13), 0), ((9, 13), 1), ((1, 3), 0)])
@pytest.mark.parametrize("widths", ["mixed", "zero", "eight"])
def test_row_p_of_a_channel_holds_bit_p_of_its_codes(shape: tuple[int, int], axis: int, widths: str) -> None:
    channels, length = shape[axis], shape[1 - axis]
    bits = {"mixed": np.arange(channels) * 5 % 9, "zero": np.zeros(channels, int), "eight": np.full(channels, 8)}
    tensor = codebook_tensor(shape, axis, bits[widths])
    spec = tensor.spec
    assert isinstance(spec, ir.CodebookSpec)
    planes = stored_arrays(tensor)[".planes"]
    row = 0
    for channel, width in enumerate(tensor.arrays[".bits"].tolist()):
        codes = _codes(tensor, channel)
        for plane in range(width):
            for i in range(planes.shape[1] * 8):
                expected = codes[i] >> plane & 1 if i < length else 0
                assert planes[row, i // 8] >> (i % 8) & 1 == expected
            row += 1
    assert not planes[row:].any()
    # Exactly as many where channels fill their bytes; otherwise the spec leaves open how many there are.
    assert plane_rows(spec) == len(planes)
    assert len(planes) == max(row, 1) or length % 8
    assert row <= len(planes) <= max(1, row + 7 * channels // length + 1)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("settings", [{}, {"scaled": True}, {"outliers": 9}, {"scaled": True, "outliers": 117}])
def test_shapes_are_known_from_the_spec_and_values_come_back(axis: int, settings: dict) -> None:  # type: ignore[type-arg]
    tensor = codebook_tensor((9, 13), axis, np.arange((9, 13)[axis]) * 4 % 9, **settings)
    assert isinstance(tensor.spec, ir.CodebookSpec)
    arrays = stored_arrays(tensor)
    assert {suffix: (a.dtype, a.shape) for suffix, a in arrays.items()} == array_shapes(tensor.spec)
    found = weights(_stored(tensor), 9, 13, by_output=axis == 0)
    assert np.array_equal(found, ir.dequantize(tensor))


def test_many_channels_are_stored_and_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyquant.ir.packing._CHUNK", 64)
    monkeypatch.setattr("anyquant.exporters.onnx.codebook_reader._CHUNK", 64)
    tensor = codebook_tensor((50, 24), 0, np.arange(50) % 9, scaled=True, outliers=40)
    assert np.array_equal(weights(_stored(tensor), 50, 24, by_output=True), ir.dequantize(tensor))


@pytest.fixture
def whole() -> Stored:
    return _stored(codebook_tensor((6, 12), 0, np.array([1, 0, 2, 8, 3, 4]), scaled=True, outliers=20))


def _one(array: np.ndarray, index: int, value: int) -> np.ndarray:
    changed = array.copy()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"bits": s.bits[:5]}, "5 widths for 6 channels"),
        (lambda s: {"bits": _one(s.bits, 2, 9)}, "a channel of 9 bits"),
        (lambda s: {"bits": _one(s.bits, 2, 255)}, "a channel of 255 bits"),
        (lambda s: {"bits": _one(s.bits, 2, 8)}, "18 planes for 24 bits"),
        (lambda s: {"bits": s.bits.astype(np.int64)}, "bits is int64"),
        (lambda s: {"bits": s.bits[None]}, "bits has the shape"),
        (lambda s: {"planes": s.planes[:17]}, "17 planes for 18 bits"),
        (lambda s: {"planes": s.planes[:, :1]}, "planes of 1 bytes for channels of 12"),
        (lambda s: {"planes": s.planes.reshape(-1)}, "planes has the shape"),
        (lambda s: {"codebook": s.codebook[:-1]}, "codebook entries, the widths call for"),
        (lambda s: {"codebook": np.append(s.codebook[:-1], np.float16(np.nan))}, "a codebook entry is not finite"),
        (lambda s: {"codebook": s.codebook.astype(np.float32)}, "codebook is float32"),
        (lambda s: {"scale": s.scale[:-1]}, "input_scale has the shape"),
        (lambda s: {"scale": np.full(1, 2, np.float16)}, "input_scale has the shape"),
        (lambda s: {"indptr": s.indptr[:-1]}, "6 outlier row pointers for 6 rows"),
        (lambda s: {"indptr": _one(s.indptr, 0, 1)}, "do not ascend from 0 to 20"),
        (lambda s: {"indptr": _one(s.indptr, 6, 21)}, "do not ascend from 0 to 20"),
        (lambda s: {"indptr": _one(s.indptr, 3, 4_000_000_000)}, "do not ascend from 0 to 20"),
        (lambda s: {"indptr": np.zeros(1, np.uint32)}, "1 outlier row pointers for 6 rows"),
        (lambda s: {"index": s.index[:-1]}, "19 outlier columns for 20 values"),
        (lambda s: {"index": _one(s.index, 19, 12)}, "beyond 12"),
        (lambda s: {"index": np.full(20, 3, np.uint16)}, "do not ascend in their row"),
        (lambda s: {"index": s.index.astype(np.int64)}, "index is int64"),
        (lambda s: {"value": s.value.astype(np.float32)}, "value is float32"),
    ],
)
def test_arrays_that_contradict_each_other(
    whole: Stored, change: Callable[[Stored], dict[str, np.ndarray]], message: str
) -> None:
    with pytest.raises(CorruptFileError, match=message):
        weights(replace(whole, **change(whole)), 6, 12, by_output=True)


@pytest.mark.parametrize(
    ("outputs", "inputs", "message"),
    [
        (0, 12, "0 channels"),
        (6, 0, "channels of 0"),
        (6, -4, "channels of -4"),
        (6, 1 << 40, "more than any matrix"),
        (6, 20, "planes of 2 bytes for channels of 20"),
        (7, 12, "6 widths for 7 channels"),
    ],
)
def test_sizes_that_contradict_the_arrays(whole: Stored, outputs: int, inputs: int, message: str) -> None:
    with pytest.raises(CorruptFileError, match=message):
        weights(whole, outputs, inputs, by_output=True)
