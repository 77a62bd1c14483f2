"""The safetensors reader against the format's own library, and on damaged and hostile files."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from anyquant.checkpoint.safetensors_file import SafetensorsFile
from anyquant.errors import CorruptFileError, InputError


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_it_reads_what_the_library_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.normal(size=(3, 5)).astype(np.float16), "odd": rng.normal(size=7).astype(np.float32),
        "scalar": np.array(2.5), "empty": np.zeros((0, 3), np.float32),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.tensors) == set(tensors)
    for name, expected in load_file(tmp_path / "x.safetensors").items():
        view = file.view(name)
        assert (view.dtype, view.shape) == (expected.dtype, expected.shape)
        assert np.array_equal(view, expected)
        assert not view.flags.writeable


HOSTILE: list[tuple[str, Any, bytes, int | None, str]] = [
    ("nothing", b"", b"", 1 << 62, "is 8 bytes, too short for its header"),
    ("header length", b"{}", b"", 100, "too short for its header of 100 bytes"),
    ("not json", b"{'a'", b"", None, "not valid JSON"),
    ("deep", b"[" * 100_000, b"", None, "not valid JSON"),
    ("twice", b'{"a": 1, "a": 2}', b"", None, "a name appears twice"),
    ("list", [1], b"", None, "not a JSON object"),
    ("entry", {"a": 3}, b"", None, "the entry of 'a' is not an object"),
    ("no shape", {"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4), None, "lacks a proper dtype"),
    ("negative", {"a": entry([-1], 0, 4)}, bytes(4), None, "lacks a proper dtype"),
    ("boolean", {"a": entry([True], 0, 4)}, bytes(4), None, "lacks a proper dtype"),
    ("three", {"a": {**entry([1], 0, 4), "data_offsets": [0, 4, 8]}}, bytes(4), None, "lacks a proper dtype"),
    ("span", {"a": entry([2], 0, 4)}, bytes(4), None, r"a is F32 \[2\], 8 bytes, but its data_offsets span 4"),
    ("backwards", {"a": entry([1], 8, 4)}, bytes(8), None, "data_offsets span -4"),
    ("huge", {"a": entry([1 << 40, 1 << 20], 0, 1 << 62)}, b"", None, "truncated: its header promises"),
    ("truncated", {"a": entry([4], 0, 16)}, bytes(15), None, "truncated: its header promises"),
    ("longer", {"a": entry([1], 0, 4)}, bytes(9), None, "has 5 bytes beyond"),
    ("overlap", {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), None, "b at byte .* overlaps"),
    ("hole", {"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12), None, "b at byte .* leaves a hole"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "data", "length", "message"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_hostile_files(header: Any, data: bytes, length: int | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match=message) as error:
        SafetensorsFile(write(tmp_path / "bad.safetensors", header, data, length))
    assert str(error.value).startswith("bad.safetensors: ")


def test_a_header_beyond_the_formats_limit(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # sparse: takes no disk
    with pytest.raises(CorruptFileError, match="claims a header of 200000000 bytes"):
        SafetensorsFile(path)


def test_a_short_file(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"abc")
    with pytest.raises(CorruptFileError, match="is 3 bytes, too short"):
        SafetensorsFile(tmp_path / "bad.safetensors")


def test_an_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a has the unknown dtype 'F7'"):
        SafetensorsFile(write(tmp_path / "x.safetensors", {"a": entry([1], 0, 4, "F7")}, bytes(4)))


@given(
    changes=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.integers(0, 190),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_and_cut_bytes_never_crash(changes: list[tuple[int, int]], cut: int, tmp_path: Path) -> None:
    header = {"first": entry([2, 3], 0, 24), "second": entry([4], 24, 32, "BF16")}
    path = write(tmp_path / "x.safetensors", header, bytes(32))
    content = bytearray(path.read_bytes())
    for at, value in changes:
        content[at % len(content)] = value
    path.unlink()
    path.write_bytes(content[: len(content) - (cut if cut < 40 else 0)])
    with contextlib.suppress(InputError):
        file = SafetensorsFile(path)
        for name in file.tensors:
            if file.tensors[name].dtype in ("F64", "F32", "F16", "BF16"):
                file.view(name)
