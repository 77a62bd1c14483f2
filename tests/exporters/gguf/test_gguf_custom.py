"""Tensor types of our own: what goes in comes out, the smallest type is taken, and damage is found and named."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anyquant import ir
from anyquant.errors import CorruptFileError
from anyquant.exporters.gguf import container, custom
from anyquant.ir import packing

NAME = "blk.7.ffn_up.weight"
# Header fields, as kernels/ggml/blob.h has them: where each begins, and its format.
FIELDS = {
    "magic": (0, "8s"), "version": (8, "I"), "header_bytes": (12, "I"), "header_checksum": (16, "I"),
    "data_checksum": (20, "I"), "used": (24, "Q"), "rows": (32, "Q"), "columns": (40, "Q"), "stride": (48, "I"),
    "kind": (52, "B"), "form": (53, "B"), "width": (54, "B"), "exponent_width": (55, "B"), "block": (56, "I"),
    "reserved": (60, "I"), **{f"offset {i}": (64 + 16 * i, "Q") for i in range(8)},
    **{f"bytes {i}": (72 + 16 * i, "Q") for i in range(8)}, "name": (192, "64s"),
}  # fmt: skip


def codebook(
    shape: tuple[int, int], axis: int, bits: Any, *, scaled: bool = False, outliers: int = 0, seed: int = 0
) -> ir.Tensor:
    rng, widths = np.random.default_rng(seed), np.resize(np.asarray(bits, np.uint8), shape[axis])
    spec = ir.CodebookSpec.from_bits(shape, axis, widths, input_scale=scaled, outliers=outliers)
    codes = [packing.pack(rng.integers(0, 1 << b, (1, shape[1 - axis]), np.uint8), b)[0] for b in widths.tolist()]
    entries = [np.sort(rng.standard_normal(1 << b)) for b in widths.tolist()]
    arrays = {
        ".bits": widths,
        ".codes": np.concatenate(codes),
        ".codebook": np.concatenate(entries).astype(np.float16),
    }
    if scaled:
        arrays[".input_scale"] = rng.uniform(0.5, 2, shape[1]).astype(np.float16)
    if outliers:
        row, column = np.divmod(np.sort(rng.choice(spec.numel, outliers, replace=False)), shape[1])
        arrays[".outlier_indptr"] = np.searchsorted(row, np.arange(shape[0] + 1)).astype(np.uint32)
        arrays[".outlier_index"] = column.astype(np.uint16 if shape[1] <= 65536 else np.uint32)
        arrays[".outlier_value"] = rng.standard_normal(outliers).astype(np.float16)
    return ir.Tensor(spec, arrays)


def blocks(spec: ir.BlockSpec, seed: int = 0) -> ir.Tensor:
    rng, sign = np.random.default_rng(seed), 1 << (spec.width - 1)
    codes = rng.integers(0, 2 * sign, (spec.shape[0], spec.blocks, spec.block))
    exponents = rng.integers(-20, 20, codes.shape[:2])
    if spec.format != "log":
        codes[codes == sign] = 0  # no negative zero
        codes[-1, -1] = 0
        exponents[~codes.any(axis=2)] = ir.ZERO_BLOCK
    stored = packing.pack(codes.reshape(spec.shape[0], -1).astype(np.uint8), spec.width)
    return ir.Tensor(spec, {".codes": stored, ".exponents": exponents.astype(np.int8)})


def affine(spec: ir.AffineSpec, seed: int = 0) -> ir.Tensor:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << spec.bits, (spec.shape[0], spec.blocks * spec.block))
    codes[:, spec.shape[1] :] = 0
    per_block = (spec.shape[0], spec.blocks)
    return ir.Tensor(spec, {
        ".codes": packing.pack(codes.astype(np.uint8), spec.bits),
        ".scale": rng.standard_normal(per_block).astype(np.float16),
        ".zero": rng.integers(0, 1 << spec.bits, per_block).astype(np.uint8),
    })  # fmt: skip


def encoded(tensor: ir.Tensor) -> tuple[np.ndarray, str]:
    tensor.check("made here")
    assert isinstance(tensor.spec, custom.Held)
    name = custom.type_for(tensor.spec)
    assert name is not None
    return custom.encode(NAME, tensor, name), name


def assert_held(tensor: ir.Tensor) -> None:
    """As it was, arrays and values, in the bytes that the type has for it."""
    data, name = encoded(tensor)
    assert data.dtype == np.uint8
    assert data.shape == (container.nbytes(name, tensor.spec.shape),)
    found = custom.decode(NAME, tensor.spec.shape, data)
    assert found.spec == tensor.spec
    assert set(found.arrays) == set(tensor.arrays)
    for key, array in tensor.arrays.items():
        assert found.arrays[key].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[key].view(np.uint8), array.view(np.uint8))
    assert ir.tensor_digest(found) == ir.tensor_digest(tensor)


MIXED = [3, 0, 8, 1, 4, 7, 2, 5, 6]


@pytest.mark.parametrize(("scaled", "outliers"), [(False, 0), (True, 0), (False, 9), (True, 9)])
@pytest.mark.parametrize(
    ("axis", "shape"),
    [(0, (9, 576)), (0, (33, 480)), (0, (5, 2048)), (0, (333, 32)), (1, (577, 32)), (1, (40, 288)), (1, (1001, 96))],
)
def test_codebooks_of_mixed_widths(axis: int, shape: tuple[int, int], scaled: bool, outliers: int) -> None:
    # Short channels have narrow codebooks: no type has room for 256 entries of a row of 32.
    bits = MIXED if shape[1 - axis] > 400 else [2, 0, 1, 3]
    assert_held(codebook(shape, axis, bits, scaled=scaled, outliers=outliers))


@pytest.mark.parametrize("bits", range(9))
@pytest.mark.parametrize("axis", [0, 1])
def test_codebooks_of_one_width(axis: int, bits: int) -> None:
    assert_held(codebook([(4, 12800), (12801, 32)][axis], axis, bits))


def test_one_row() -> None:
    assert_held(codebook((1, 2048), 0, 3, outliers=5))
    assert_held(blocks(ir.BlockSpec((1, 2048), "log", 3, 32)))
    assert_held(affine(ir.AffineSpec((1, 2048), 4, 64)))


def test_columns_beyond_16_bits() -> None:
    tensor = codebook((2, 65568), 0, 2, outliers=50)
    assert tensor.arrays[".outlier_index"].dtype == np.uint32
    assert_held(tensor)


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("width", range(2, 9))
def test_blocks(width: int, block: int) -> None:
    # Of 8 bits and blocks of 16, which have 8.5 bits per weight before the header, nothing holds any.
    for form, exponent_width in (("bfp", 0), ("log", 0), *(("minifloat", e) for e in range(1, width))):
        spec = ir.BlockSpec((7, 8224), form, width, block, min(exponent_width, 6))
        if (width, block) == (8, 16):
            assert custom.type_for(spec) is None
        else:
            assert_held(blocks(spec, width))


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_affine(bits: int, block: int) -> None:
    spec = ir.AffineSpec((7, 8224), bits, block)
    if bits == 8 and block < 64:  # 3 bytes of scale and zero make it more than 8.5 bits
        assert custom.type_for(spec) is None
    else:
        assert_held(affine(spec))


def needed(spec: custom.Held) -> int:
    """Bytes of a blob by the format: a header of 256, sections padded to 64, a table where blocks are."""
    sizes = [dtype.itemsize * int(np.prod(shape)) for dtype, shape in spec.arrays().values()]
    if isinstance(spec, ir.BlockSpec):
        sizes.append(4 * 2**spec.width)
    return 256 + sum((size + 63) // 64 * 64 for size in sizes)


@given(
    rows=st.integers(1, 300), columns=st.integers(1, 40).map(lambda n: 32 * n), axis=st.sampled_from([0, 1]),
    bits=st.lists(st.integers(0, 8), min_size=1, max_size=9),
)  # fmt: skip
@example(rows=56, columns=32, axis=0, bits=[0])  # 448 bytes, just what the smallest type has
@example(rows=55, columns=32, axis=0, bits=[0])
def test_the_smallest_type_that_holds_it(rows: int, columns: int, axis: int, bits: list[int]) -> None:
    widths = np.resize(np.array(bits, np.uint8), (rows, columns)[axis])
    spec = ir.CodebookSpec.from_bits((rows, columns), axis, widths, outliers=rows % 3)
    sizes = {8: "2_0", 10: "2_5", 12: "3_0", 14: "3_5", 17: "4_25", 21: "5_25", 34: "8_5"}
    fitting = [name for size, name in sizes.items() if rows * columns // 32 * size >= needed(spec)]
    assert custom.type_for(spec) == (f"ANYQUANT_{fitting[0]}" if fitting else None)


def test_types_by_hand() -> None:
    assert custom.type_for(ir.CodebookSpec.from_bits((56, 32), 0, np.zeros(56))) == "ANYQUANT_2_0"
    assert custom.type_for(ir.CodebookSpec.from_bits((55, 32), 0, np.zeros(55))) == "ANYQUANT_2_5"
    assert custom.type_for(ir.BlockSpec((1024, 1024), "bfp", 4, 32)) == "ANYQUANT_5_25"  # 4.25, and its header
    assert custom.type_for(ir.BlockSpec((1024, 1024), "bfp", 3, 32)) == "ANYQUANT_3_5"
    for columns in (1, 31, 33, 48, 65):  # no whole blocks
        assert custom.type_for(ir.CodebookSpec.from_bits((900, columns), 0, np.zeros(900))) is None
        assert custom.type_for(ir.BlockSpec((900, columns), "bfp", 2, 16)) is None
        assert custom.type_for(ir.AffineSpec((900, columns), 2, 32)) is None
    assert custom.type_for(ir.BlockSpec((1, 32), "bfp", 2, 32)) is None  # a header alone is more


def field(data: np.ndarray, name: str) -> Any:
    offset, code = FIELDS[name]
    return struct.unpack_from(f"<{code}", data.data, offset)[0]


def test_the_bytes_are_those_of_the_format() -> None:
    """Every array lies in its section as it is; the plug-in, in C++, finds it there."""
    tensor = codebook((33, 480), 0, MIXED, scaled=True, outliers=9)
    assert isinstance(tensor.spec, ir.CodebookSpec)
    data, name = encoded(tensor)
    assert [field(data, key) for key in ("magic", "version", "header_bytes", "used", "rows", "columns")] == [
        b"AQTENSOR", 1, 256, needed(tensor.spec), 33, 480,
    ]  # fmt: skip
    assert field(data, "stride") == 480 // 32 * custom.TYPES[name][1]
    assert [field(data, key) for key in ("kind", "form", "width", "exponent_width", "block")] == [1, 0, 0, 0, 0]
    assert field(data, "name").rstrip(b"\0") == NAME.encode()
    assert field(data, "data_checksum") == zlib.crc32(data[256 : field(data, "used")].data)
    assert not data[field(data, "used") :].any()
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


def test_what_codes_of_blocks_stand_for() -> None:
    """In units of 2**-4; the code of a negative zero, which no tensor has, stands for 0."""
    table = custom.table_of(ir.BlockSpec((8, 32), "minifloat", 5, 32, 2))
    positive = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28]
    assert (16 * table).tolist() == positive + [-value for value in positive]
    assert custom.table_of(ir.BlockSpec((8, 32), "log", 3, 32)).tolist() == [
        sign * 2.0 ** (power - 3) for sign in (1, -1) for power in range(4)
    ]


SAMPLES = {
    "codebook": lambda: codebook((33, 480), 0, MIXED[:6], scaled=True, outliers=9),
    "columns": lambda: codebook((288, 64), 1, [3, 0, 2], outliers=9),
    "block": lambda: blocks(ir.BlockSpec((40, 96), "minifloat", 5, 16, 2)),
    "affine": lambda: affine(ir.AffineSpec((40, 96), 4, 32)),
}


@pytest.fixture(scope="module", params=SAMPLES)
def sample(request: pytest.FixtureRequest) -> ir.Tensor:
    return SAMPLES[request.param]()


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
