"""Bit streams against an oracle that sets one bit at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyquant.ir import packing
from anyquant.ir.packing import code_offsets, pack, row_bytes, row_chunks, unpack


def pack_bit_by_bit(values: np.ndarray, bits: int) -> np.ndarray:
    rows, columns = values.shape
    packed = np.zeros((rows, -(-columns * bits // 8)), np.uint8)
    for row in range(rows):
        for column in range(columns):
            for bit in range(bits):
                if int(values[row, column]) >> bit & 1:
                    position = column * bits + bit
                    packed[row, position // 8] |= 1 << position % 8
    return packed


@st.composite
def codes(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(st.integers(0, 8))
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(0, 41))
    seed = draw(st.integers(0, 2**32 - 1))
    values = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    return values, bits


@given(codes())
def test_same_bytes_as_bit_by_bit_and_back(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    packed = pack(values, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (len(values), row_bytes(values.shape[1], bits))
    np.testing.assert_array_equal(packed, pack_bit_by_bit(values, bits))
    back = unpack(packed, values.shape[1], bits)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, values)


@pytest.mark.parametrize("bits", range(9))
def test_chunks_do_not_show(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (11, 13)).astype(np.uint8)
    whole = pack(values, bits)
    monkeypatch.setattr(packing, "_CHUNK", 30)  # two rows at a time
    np.testing.assert_array_equal(pack(values, bits), whole)
    np.testing.assert_array_equal(unpack(whole, 13, bits), values)


def test_padding_bits_are_not_read() -> None:
    np.testing.assert_array_equal(unpack(np.array([[0xFF]], np.uint8), 1, 3), [[7]])


def test_not_contiguous_input() -> None:
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)[::2, ::-1] % 8
    np.testing.assert_array_equal(pack(values, 3), pack_bit_by_bit(values, 3))
    packed = np.repeat(pack(values, 3), 2, axis=1)[:, ::2]
    np.testing.assert_array_equal(unpack(packed, 8, 3), values)


@pytest.mark.parametrize(
    ("values", "bits"),
    [
        (np.array([[8]]), 3),
        (np.array([[1]]), 0),
        (np.array([[256]]), 8),  # would wrap to 0
        (np.array([[-1]]), 8),
        (np.array([[0.5]]), 8),
        (np.array([1]), 8),
        (np.array([[1]]), 9),
        (np.array([[1]]), -1),
    ],
)
def test_what_does_not_fit_is_refused(values: np.ndarray, bits: int) -> None:
    with pytest.raises(ValueError, match=r"fit|codes must|bits must"):
        pack(values, bits)


@pytest.mark.parametrize(("shape", "columns", "bits"), [((1, 2), 6, 3), ((1, 2), 8, 1), ((2,), 8, 2), ((1, 1), 1, 9)])
def test_rows_of_another_length_are_refused(shape: tuple[int, ...], columns: int, bits: int) -> None:
    with pytest.raises(ValueError, match=r"need rows|bits must"):
        unpack(np.zeros(shape, np.uint8), columns, bits)


def test_backend_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_pack", packing.pack_numpy)
    monkeypatch.setattr(packing, "_unpack", packing.unpack_numpy)
    calls: list[str] = []

    def counted_pack(values: np.ndarray, bits: int) -> np.ndarray:
        calls.append("pack")
        return packing.pack_numpy(values, bits)

    def counted_unpack(packed: np.ndarray, columns: int, bits: int) -> np.ndarray:
        calls.append("unpack")
        return packing.unpack_numpy(packed, columns, bits)

    packing.set_backend(counted_pack, counted_unpack)
    values = np.array([[1, 2, 3]], np.uint8)
    np.testing.assert_array_equal(unpack(pack(values, 2), 3, 2), values)
    assert calls == ["pack", "unpack"]


def test_offsets_follow_from_widths() -> None:
    # 13 codes: 0, 13, 26, 39, 52 and 104 bits.
    offsets = code_offsets(np.array([0, 1, 2, 3, 4, 8], np.uint8), 13)
    assert offsets.tolist() == [0, 0, 2, 6, 11, 18, 31]


@given(st.lists(st.integers(0, 40), max_size=3), st.integers(1, 50))
def test_row_chunks_cover_each_row_once(shape: list[int], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_CHUNK", chunk)
        slices = list(row_chunks(tuple(shape)))
    if not shape:
        assert slices == [slice(None)]
        return
    assert [row for part in slices for row in range(shape[0])[part]] == list(range(shape[0]))
    for part in slices:
        size = (part.stop - part.start) * int(np.prod(shape[1:]))
        assert size <= chunk or part.stop - part.start == 1
