"""Safetensors files: read by the library as written by us, and refused when they lie."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from anyquant import ir
from anyquant.errors import AnyquantError, CorruptFileError, InputError, MachineError
from anyquant.ir.safetensors_io import SafetensorsReader, file_size

ARRAYS = {
    "größe.🙂.codes": np.arange(7, dtype=np.uint8),
    "a.exponents": np.arange(-3, 3, dtype=np.int8).reshape(2, 3),
    "a.index": np.arange(3, dtype=np.uint16),
    "a.indptr": np.arange(3, dtype=np.uint32),
    "a.half": np.arange(3, dtype=np.float16),
    "a.single": np.ones((), np.float32),
    "a.double": np.zeros((0, 4), np.float64),
}
ENTRIES = [(key, array.dtype, array.shape) for key, array in ARRAYS.items()]


def write_raw(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def one(dtype: str = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    ir.write_safetensors(path, ENTRIES, ARRAYS.values(), {"format": "anyquant"})
    assert path.stat().st_size == file_size(ENTRIES, {"format": "anyquant"})
    loaded = load_file(path)
    assert set(loaded) == set(ARRAYS)
    reader = SafetensorsReader(path)
    for key, array in ARRAYS.items():
        for found in (loaded[key], reader.read(key)):
            assert found.dtype == array.dtype
            assert found.shape == array.shape
            np.testing.assert_array_equal(found, array)
        reader.expect(key, array.dtype, array.shape)
    assert (int.from_bytes(path.read_bytes()[:8], "little") + 8) % 8 == 0


def test_not_contiguous_arrays(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.uint16).reshape(3, 4).T
    ir.write_safetensors(tmp_path / "x", [("a", array.dtype, array.shape)], [array])
    np.testing.assert_array_equal(SafetensorsReader(tmp_path / "x").read("a"), array)


def test_arrays_are_taken_one_at_a_time(tmp_path: Path) -> None:
    size = 4 << 20
    entries = [(f"a{i}", np.dtype("u1"), (size,)) for i in range(8)]
    tracemalloc.start()
    ir.write_safetensors(tmp_path / "x", entries, (np.full(size, i, np.uint8) for i in range(8)))
    peak = tracemalloc.get_traced_memory()[1]
    assert peak < 3 * size
    tracemalloc.reset_peak()
    reader = SafetensorsReader(tmp_path / "x")
    assert tracemalloc.get_traced_memory()[1] < size  # opening reads the header alone
    assert reader.read("a7")[0] == 7
    tracemalloc.stop()


@pytest.mark.parametrize(
    "arrays",
    [
        [np.zeros(3, np.uint8)],
        [np.zeros(4, np.int8)],
        [np.zeros((4, 1), np.uint8)],
    ],
)
def test_promises_are_kept(arrays: list[np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(AnyquantError, match="promised was") as caught:
        ir.write_safetensors(tmp_path / "x", [("a", np.dtype("u1"), (4,))], arrays)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("count", [0, 2])
def test_number_of_arrays(count: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        ir.write_safetensors(tmp_path / "x", [("a", np.dtype("u1"), (4,))], [np.zeros(4, np.uint8)] * count)


def test_machine_errors(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("there")
    with pytest.raises(MachineError, match="cannot write x"):
        ir.write_safetensors(tmp_path / "x", [], [])
    assert (tmp_path / "x").read_text() == "there"
    with pytest.raises(MachineError, match="No such file"):
        ir.write_safetensors(tmp_path / "no" / "x", [], [])


def test_errors_of_the_producer_stay_its_own(tmp_path: Path) -> None:
    def arrays() -> Iterator[np.ndarray]:
        raise FileNotFoundError("the source went away")
        yield

    with pytest.raises(FileNotFoundError, match="the source"):
        ir.write_safetensors(tmp_path / "x", ENTRIES, arrays())


def test_full_disk() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    link = Path("/dev/full")

    class Full(type(link)):  # type: ignore[misc]
        """Opens for writing although it exists."""

        def open(self, mode: str = "r", *_: Any, **__: Any) -> Any:
            return open("/dev/full", "wb", buffering=0)

    with pytest.raises(MachineError, match=r"No space left on device.*free some space") as caught:
        ir.write_safetensors(Full("/dev/full"), ENTRIES, ARRAYS.values())
    assert f"{file_size(ENTRIES):,} bytes" in str(caught.value)


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    ir.write_safetensors(path, ENTRIES, ARRAYS.values())
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(CorruptFileError, match="truncated or edited"):
            SafetensorsReader(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CorruptFileError, match="truncated or edited"):
        SafetensorsReader(path)


HUGE = 2**63
LIES: dict[str, Any] = {
    "beyond the file": one(offsets=(0, 5), shape=(5,)),
    "far beyond the file": one(offsets=(0, 2**50), shape=(2**50,)),
    "more than 64 bits": one(offsets=(0, 2**70), shape=(2**70,)),
    "shape overflows": one(shape=(2**32, 2**32, 4)),
    "shape and offsets differ": one(shape=(3,)),
    "dtype and offsets differ": one("U16"),
    "does not begin at 0": one(offsets=(1, 4), shape=(3,)),
    "backwards": one(offsets=(4, 0)),
    "negative": one(offsets=(-4, 0)),
    "negative shape": one(shape=(-4,)),
    "float shape": one(shape=(4.0,)),
    "huge float": one(shape=(1e308,)),
    "shape is no list": one(shape=4),
    "offsets are no pair": one(offsets=(0,)),
    "offsets are missing": {"a": {"dtype": "U8", "shape": [4]}},
    "unknown dtype": one("U7"),
    "dtype is no string": one(8),  # type: ignore[arg-type]
    "overlap": one(shape=(3,), offsets=(0, 3)) | {"b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}},
    "the same bytes twice": one() | {"b": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}},
    "hole": one(shape=(1,), offsets=(0, 1)) | {"b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}},
    "bytes left over": one(shape=(3,), offsets=(0, 3)),
    "nothing": {},
    "a list": [],
    "no JSON": b"{'a'}",
    "not UTF-8": b'{"\xff": 1}',
    "deep": b'{"a":' * 1000,
    "metadata is no map of strings": one() | {"__metadata__": {"a": 1}},
    "half a surrogate pair": json.dumps({"\ud800": one()["a"]}).encode(),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers(lie: str, tmp_path: Path) -> None:
    tracemalloc.start()
    with pytest.raises(CorruptFileError, match=r"x\.safetensors is not a whole safetensors file"):
        SafetensorsReader(write_raw(tmp_path / "x.safetensors", LIES[lie], b"abcd"))
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


@pytest.mark.parametrize("length", [0, 1, 2**27, 2**40, HUGE, 2**64 - 1])
def test_lying_header_length(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}abcd")
    with pytest.raises(CorruptFileError, match="truncated or edited"):
        SafetensorsReader(path)


@pytest.mark.parametrize("dtype", ["BOOL", "I64", "U64", "I16", "BF16", "F8_E4M3", "F8_E5M2", "F64", "C64", "F4"])
def test_other_dtypes_are_unexpected(dtype: str, tmp_path: Path) -> None:
    sizes = {"BOOL": 8, "I16": 4, "BF16": 4, "F8_E4M3": 8, "F8_E5M2": 8, "F4": 16}
    header = one(dtype, (sizes.get(dtype, 1),), (0, 8))
    path = write_raw(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(CorruptFileError, match=r"must be U8|truncated or edited"):
        SafetensorsReader(path).expect("a", np.dtype("u1"), (8,))


def test_expect(tmp_path: Path) -> None:
    reader = SafetensorsReader(write_raw(tmp_path / "x.safetensors", one(), b"abcd"))
    reader.expect("a", np.dtype("u1"), (4,))
    with pytest.raises(CorruptFileError, match="b is missing in x"):
        reader.expect("b", np.dtype("u1"), (4,))
    for dtype, shape in (("i1", (4,)), ("u1", (2, 2)), ("u1", ())):
        with pytest.raises(CorruptFileError, match=r"a in x\.safetensors is U8 \[4\], must be"):
            reader.expect("a", np.dtype(dtype), shape)


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.safetensors is missing"):
        SafetensorsReader(tmp_path / "x.safetensors")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CorruptFileError, match="not a regular file"):
            SafetensorsReader(path)


@pytest.mark.parametrize("change", ["truncate", "replace", "remove"])
def test_change_after_opening(change: str, tmp_path: Path) -> None:
    """The file is mapped: to read what has been cut off would be a bus error."""
    path = write_raw(tmp_path / "x.safetensors", one(shape=(1 << 20,), offsets=(0, 1 << 20)), bytes(1 << 20))
    reader = SafetensorsReader(path)
    if change == "truncate":
        os.truncate(path, 100)
    elif change == "remove":
        path.unlink()
    else:
        write_raw(tmp_path / "y", one(), b"abcd").rename(path)
    with pytest.raises(CorruptFileError, match="was changed or removed"):
        reader.read("a")
