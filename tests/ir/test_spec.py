"""Specs: byte counts by hand, the limits of every parameter, and their JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import CorruptFileError
from anyquant.ir.spec import spec_from_json, spec_to_json

SIZES = [  # spec, bytes of its arrays in order of storage
    (ir.BlockSpec((3, 40), "bfp", 4, 32), [3 * 32, 3 * 2]),
    (ir.BlockSpec((3, 40), "bfp", 3, 16), [3 * 18, 3 * 3]),
    (ir.BlockSpec((1, 1), "minifloat", 8, 32, 4), [32, 1]),
    (ir.CodebookSpec((5, 13), 0, 21, 283), [5, 21, 566]),
    (ir.CodebookSpec((5, 13), 1, 21, 283, True, 7), [13, 21, 566, 26, 24, 14, 14]),
    (ir.CodebookSpec((1, 65536), 0, 0, 1, False, 1), [1, 0, 2, 8, 2, 2]),
    (ir.CodebookSpec((1, 65537), 0, 0, 1, False, 1), [1, 0, 2, 8, 4, 2]),  # a column's index takes four bytes
    (ir.AffineSpec((3, 20), 2, 16), [3 * 8, 3 * 2 * 2, 3 * 2]),
    (ir.GGMLSpec((2, 512), "Q6_K"), [2 * 2 * 210]),
    (ir.DenseSpec((3, 2, 2), "BF16"), [24]),
    (ir.DenseSpec((), "F64"), [8]),
    (ir.DenseSpec((0, 5), "F32"), [0]),
]


@pytest.mark.parametrize(("spec", "sizes"), SIZES, ids=lambda v: repr(v)[:60])
def test_bytes(spec: ir.Spec, sizes: list[int]) -> None:
    assert [dtype.itemsize * int(np.prod(shape)) for dtype, shape in spec.arrays().values()] == sizes
    assert spec.nbytes == sum(sizes)
    assert spec.numel == int(np.prod(spec.shape))
    assert spec.bits_per_weight == 8 * sum(sizes) / max(1, spec.numel)
    assert spec_from_json("w", spec_to_json(spec)) == spec
    assert hash(spec_from_json("w", spec_to_json(spec))) == hash(spec)


def test_keys_of_two_tensors_never_collide() -> None:
    """A key is a name and a suffix of one dot: what precedes the last dot is the name, whatever it looks like."""
    for spec, _ in SIZES:
        for suffix in spec.arrays():
            assert suffix.startswith(".")
            assert suffix.count(".") == 1
            assert suffix != ".weight"


def test_from_bits_of_all_widths() -> None:
    spec = ir.CodebookSpec.from_bits((9, 10), 0, np.arange(9, dtype=np.uint8))
    assert spec.code_bytes == 0 + 2 + 3 + 4 + 5 + 7 + 8 + 9 + 10
    assert spec.codebook_entries == 511
    with pytest.raises(CorruptFileError, match="code_bytes 12 is not in 0"):
        ir.CodebookSpec.from_bits((1, 10), 0, np.array([9], np.uint8))


GOOD: dict[str, dict[str, Any]] = {
    "block": {"shape": [2, 32], "format": "bfp", "width": 4, "block": 32, "exponent_width": 0},
    "codebook": {
        "shape": [2, 8],
        "axis": 0,
        "code_bytes": 2,
        "codebook_entries": 4,
        "input_scale": False,
        "outliers": 0,
    },
    "affine": {"shape": [2, 32], "bits": 4, "block": 32},
    "ggml": {"shape": [2, 32], "type": "Q4_0"},
    "dense": {"shape": [2, 32], "dtype": "F32"},
}
ANY: list[Any] = [None, True, "x", 1.0, 4.0, -1, 10**30, [], {}, [[1]], "é" * 1000]
SHAPES: list[Any] = [*ANY, [2], [2, 32, 1], [0, 32], [2, -32], [2.0, 32], [True, 32], ["2", 32], [2**30, 2**30]]
BAD: list[tuple[str, str, Any]] = [
    *((kind, field, value) for kind, good in GOOD.items() for field in good if field != "shape" for value in ANY),
    *((kind, "shape", value) for kind in GOOD if kind != "dense" for value in SHAPES),
    *(("dense", "shape", v) for v in (None, "ab", 3, {}, [-1], [1.0], [True], [10**30, 0], [1] * 9, [2**24, 2**24])),
    ("block", "width", 1),
    ("block", "width", 9),
    ("block", "block", 64),
    ("block", "exponent_width", 1),
    ("codebook", "axis", 2),
    ("codebook", "code_bytes", 17),
    ("codebook", "codebook_entries", 1),
    ("codebook", "codebook_entries", 513),
    ("codebook", "outliers", 17),
    ("affine", "bits", 3),
    ("affine", "block", 8),
    ("ggml", "type", "Q4_2"),
    ("ggml", "type", "Q6_K"),  # rows of 32 are no whole blocks of 256
    ("dense", "dtype", "f32"),
    ("dense", "dtype", "I8"),
]
BAD = [b for b in BAD if not (b[:2] == ("codebook", "input_scale") and b[2] is True)]


@pytest.mark.parametrize(("kind", "field", "value"), BAD, ids=lambda v: repr(v)[:30])
def test_bad_parameters_are_refused(kind: str, field: str, value: Any) -> None:
    spec_from_json("w", {"kind": kind, **GOOD[kind]})
    with pytest.raises(CorruptFileError, match=r"^w: ") as caught:
        spec_from_json("w", {"kind": kind, **GOOD[kind], field: value})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("width", range(2, 9))
def test_exponent_width_of_minifloat(width: int) -> None:
    for exponent_width in range(1, width):
        ir.BlockSpec((1, 16), "minifloat", width, 16, exponent_width)
    for exponent_width in (0, width, True):
        with pytest.raises(CorruptFileError, match="exponent width"):
            ir.BlockSpec((1, 16), "minifloat", width, 16, exponent_width)


@pytest.mark.parametrize("kind", ["", "Block", "sparse", None, 3, [], {}])
def test_unknown_kind(kind: Any) -> None:
    with pytest.raises(CorruptFileError, match=r"w: unknown kind .*upgrade"):
        spec_from_json("w", {**GOOD["dense"], "kind": kind})


@pytest.mark.parametrize("kind", GOOD)
def test_missing_fields(kind: str) -> None:
    required = {"block": ["shape"], "codebook": ["shape", "axis", "code_bytes", "codebook_entries"]}
    for field in required.get(kind, list(GOOD[kind])):
        value = {"kind": kind, **GOOD[kind]}
        del value[field]
        with pytest.raises(CorruptFileError, match=f"^w: .*{field}"):
            spec_from_json("w", value)


@pytest.mark.parametrize("kind", GOOD)
def test_unknown_fields_are_ignored(kind: str) -> None:
    value = {"kind": kind, **GOOD[kind]}
    assert spec_from_json("w", {**value, "future": [1], "__init__": 2}) == spec_from_json("w", value)


def test_more_outliers_than_row_pointers_count() -> None:
    with pytest.raises(CorruptFileError, match="outliers"):
        ir.CodebookSpec((2**17, 2**17), 0, 0, 2**17, False, 2**32)
