"""The bytes of tensor types of our own: as docs/gguf-format.md has them, and damage to them is found and named."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyquant import ir
from anyquant.errors import CorruptFileError
from anyquant.exporters.gguf import custom
from anyquant.ir import packing
from anyquant.testing import affine_tensor, block_tensor, codebook_tensor

NAME = "blk.7.ffn_up.weight"
# Header fields, as kernels/ggml/blob.h has them: where each begins, and its format.
FIELDS = {
    "magic": (0, "8s"), "version": (8, "I"), "header_bytes": (12, "I"), "header_checksum": (16, "I"),
    "data_checksum": (20, "I"), "used": (24, "Q"), "rows": (32, "Q"), "columns": (40, "Q"), "stride": (48, "I"),
    "kind": (52, "B"), "form": (53, "B"), "width": (54, "B"), "exponent_width": (55, "B"), "block": (56, "I"),
    "reserved": (60, "I"), **{f"offset {i}": (64 + 16 * i, "Q") for i in range(8)},
    **{f"bytes {i}": (72 + 16 * i, "Q") for i in range(8)}, "name": (192, "64s"),
}  # fmt: skip
SAMPLES = {
    "codebook": lambda: codebook_tensor((33, 480), 0, [3, 0, 8, 1, 4, 7], scaled=True, outliers=9),
    "columns": lambda: codebook_tensor((288, 64), 1, [3, 0, 2], outliers=9),
    "block": lambda: block_tensor(ir.BlockSpec((40, 96), "minifloat", 5, 16, 2)),
    "affine": lambda: affine_tensor(ir.AffineSpec((40, 96), 4, 32)),
}


@pytest.fixture(scope="module", params=SAMPLES)
def sample(request: pytest.FixtureRequest) -> ir.Tensor:
    return SAMPLES[request.param]()


def encoded(tensor: ir.Tensor) -> tuple[np.ndarray, str]:
    assert isinstance(tensor.spec, custom.Held)
    name = custom.type_for(tensor.spec)
    assert name is not None
    return custom.encode(NAME, tensor, name), name


def field(data: np.ndarray, name: str) -> Any:
    offset, code = FIELDS[name]
    return struct.unpack_from(f"<{code}", data.data, offset)[0]


def test_the_bytes_are_those_of_the_format() -> None:
    """Every array lies in its section as it is; the plug-in, in C++, finds it there."""
    tensor = SAMPLES["codebook"]()
    data, name = encoded(tensor)
    used = 256 + sum((array.nbytes + 63) // 64 * 64 for array in tensor.arrays.values())
    assert [field(data, key) for key in ("magic", "version", "header_bytes", "used", "rows", "columns")] == [
        b"AQTENSOR", 1, 256, used, 33, 480,
    ]  # fmt: skip
    assert field(data, "stride") == 480 // 32 * custom.TYPES[name][1]
    assert [field(data, key) for key in ("kind", "form", "width", "exponent_width", "block")] == [1, 0, 0, 0, 0]
    assert field(data, "name").rstrip(b"\0") == NAME.encode()
    assert field(data, "data_checksum") == zlib.crc32(data[256:used].data)
    assert not data[used:].any()
    for i, array in enumerate(tensor.arrays.values()):
        offset, size = field(data, f"offset {i}"), field(data, f"bytes {i}")
        assert offset % 64 == 0
        assert data[offset : offset + size].tobytes() == array.tobytes()
    label = "blk.0." + "ä" * 40  # cut within a letter, which harms nobody
    cut = custom.encode(label, tensor, name)
    assert field(cut, "name") == label.encode()[:63] + b"\0"
    assert custom.decode(label, (33, 480), cut).spec == tensor.spec


def test_the_example_of_the_documentation(repository: Path) -> None:
    """Its dump, byte for byte, and its values."""
    bits = np.zeros(32, np.uint8)
    bits[:2] = 2, 3
    codes = [packing.pack(np.arange(32, dtype=np.uint8)[None] % (1 << b), b)[0] for b in (2, 3)]
    entries = [np.array([-1.5, -0.5, 0.5, 1.5]), np.arange(-1, 1, 0.25), np.full(30, 0.25)]
    scale, indptr = np.ones(32, np.float16), np.ones(33, np.uint32)
    scale[3], indptr[0] = 0.5, 0
    tensor = ir.Tensor(
        ir.CodebookSpec.from_bits((32, 32), 0, bits, input_scale=True, outliers=1),
        {".bits": bits, ".codes": np.concatenate(codes), ".codebook": np.concatenate(entries).astype(np.float16),
         ".input_scale": scale, ".outlier_indptr": indptr, ".outlier_index": np.array([3], np.uint16),
         ".outlier_value": np.array([7], np.float16)},
    )  # fmt: skip
    data = custom.encode("blk.0.ffn_up.weight", tensor, "ANYQUANT_8_5")
    dump = re.findall(
        r"^    ([0-9a-f]{4})  ((?:[0-9a-f]{2} ){15}[0-9a-f]{2})", (repository / "docs/gguf-format.md").read_text(), re.M
    )
    assert len(dump) >= 20
    for at, line in dump:
        assert data[int(at, 16) :][:16].tobytes() == bytes.fromhex(line), at
    assert ir.dequantize(custom.decode(NAME, (32, 32), data))[:3, :8].tolist() == [
        [-1.5, -0.5, 0.5, 7, -1.5, -0.5, 0.5, 1.5], [-1, -0.75, -0.5, -0.125, 0, 0.25, 0.5, 0.75],
        [0.25, 0.25, 0.25, 0.125, 0.25, 0.25, 0.25, 0.25],
    ]  # fmt: skip


def assert_refused(shape: tuple[int, ...], data: np.ndarray, message: str = "") -> None:
    with pytest.raises(CorruptFileError, match=rf"^{NAME}[._a-z]*: .*({message})"):
        custom.decode(NAME, shape, data)


def test_every_flipped_byte_is_found(sample: ir.Tensor) -> None:
    """In the header any, also those that say nothing; in what is used a sample; after that there is nothing."""
    data, _ = encoded(sample)
    used = field(data, "used")
    for at in [*range(256), *range(256, used, max(1, used // 300)), used - 1]:
        for flip in (0x01, 0x80, 0xFF):
            damaged = data.copy()
            damaged[at] ^= flip
            part = "does not hold a tensor" if at < 8 else "version" if at < 16 else "checksum|header says"
            assert_refused(sample.spec.shape, damaged, part)


def test_other_shapes_and_lengths(sample: ir.Tensor) -> None:
    data, _ = encoded(sample)
    rows, columns = sample.spec.shape
    for shape in [
        (rows, columns + 32),
        (rows + 1, columns),
        (columns, rows),
        (rows * columns,),
        (1, rows, columns),
        (),
    ]:
        assert_refused(shape, data)
    for end in (0, 1, 8, 255, 256, 257, len(data) // 2, len(data) - 32, len(data) - 1):
        assert_refused((rows, columns), data[:end])
    assert_refused((rows, columns), np.concatenate([data, np.zeros(32, np.uint8)]))


def test_foreign_data_is_somebody_elses() -> None:
    random = np.random.default_rng(0).integers(0, 256, 8 * 100, dtype=np.uint8)
    for data in (random, np.zeros(800, np.uint8), random[:100], np.zeros(0, np.uint8)):
        assert_refused((100, 32), data, "Another program may have used the same number")


def forged(data: np.ndarray, changes: dict[str, int]) -> np.ndarray:
    """Other fields, and checksums that fit them: by somebody who means harm."""
    data = data.copy()
    for name, value in changes.items():
        offset, code = FIELDS[name]
        size = struct.calcsize(f"<{code}")
        data[offset : offset + size] = np.frombuffer((value % 256**size).to_bytes(size, "little"), np.uint8)
    used = max(256, min(field(data, "used"), len(data)))
    struct.pack_into("<I", data.data, 20, zlib.crc32(data[256:used].data))
    struct.pack_into("<I", data.data, 16, 0)
    struct.pack_into("<I", data.data, 16, zlib.crc32(data[:256].data))
    return data


NUMBERS = ["used", "rows", "columns", "stride", "kind", "form", "width", "exponent_width", "block",
           *(f"{what} {i}" for i in range(8) for what in ("offset", "bytes"))]  # fmt: skip


def assert_a_tensor_or_refused(shape: tuple[int, ...], data: np.ndarray) -> None:
    """Nothing else happens, and what comes out passes all checks and has finite values."""
    try:
        found = custom.decode(NAME, shape, data)
    except CorruptFileError:
        assert_refused(shape, data)
    else:
        found.check(NAME)
        assert found.spec.shape == shape
        assert np.isfinite(ir.dequantize(found)).all()


@pytest.mark.parametrize("name", NUMBERS)
def test_odd_fields(sample: ir.Tensor, name: str) -> None:
    data, _ = encoded(sample)
    was = field(data, name)
    for value in (0, 1, 2, 3, 5, 7, 9, 15, 255, was - 64, was - 1, was + 1, was + 2, was + 64, 2**31, 2**32, 2**64 - 1):
        assert_a_tensor_or_refused(sample.spec.shape, forged(data, {name: value}))


@given(st.data())
def test_any_other_blob(draw: st.DataObject) -> None:
    tensor = SAMPLES[draw.draw(st.sampled_from(sorted(SAMPLES)))]()
    data, _ = encoded(tensor)
    size = st.one_of(st.integers(0, 4096), st.integers(0, 64).map(lambda n: 64 * n), st.integers(0, 2**64 - 1))
    for at in draw.draw(st.lists(st.integers(256, len(data) - 1), max_size=4)):
        data[at] = draw.draw(st.integers(0, 255))
    changes = draw.draw(st.dictionaries(st.sampled_from(NUMBERS), size, max_size=4))
    assert_a_tensor_or_refused(tensor.spec.shape, forged(data, changes))
