"""What is known of a tensor before its values: kind, shape and parameters.

A spec determines the name, dtype and shape of every stored array, so it is all that byte counts need.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from math import ceil, prod
from typing import Any, ClassVar

import numpy as np

from anyquant.errors import CorruptFileError
from anyquant.ir.packing import row_bytes

Arrays = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]

# Stock ggml types that the IR holds: elements per block, bytes per block.
GGML_TYPES: dict[str, tuple[int, int]] = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "MXFP4": (32, 17),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
}

# BF16 has no NumPy dtype: its bit patterns are held as uint16.
DENSE_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}

FP16_MAX = 65504.0
"""The largest number of codebooks, scales and outliers."""

BLOCK_FORMATS = ("bfp", "minifloat", "log")
_MAX_NUMEL = 1 << 46
_MAX_DIMENSIONS = 8
_U8, _I8, _F16, _U16, _U32 = (np.dtype(t) for t in ("u1", "i1", "<f2", "<u2", "<u4"))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CorruptFileError(message)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(value: object, choices: tuple[object, ...]) -> bool:
    """Equal and of the same type: 4.0 and True are no integers here, and unhashable values do no harm."""
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _check_shape(shape: object, dimensions: int | None) -> None:
    ok = isinstance(shape, tuple) and all(_is_int(n) and n >= 0 for n in shape)
    _require(ok, f"shape {shape!r:.80} is not a list of non-negative integers")
    assert isinstance(shape, tuple)
    _require(len(shape) <= _MAX_DIMENSIONS, f"shape has {len(shape)} dimensions, more than {_MAX_DIMENSIONS}")
    # Zeros count as ones: a dimension of 10**30 is no less absurd beside an empty one.
    _require(prod(max(n, 1) for n in shape) <= _MAX_NUMEL, f"shape {list(shape)!r:.80} has more than 2**46 elements")
    if dimensions is not None:
        _require(len(shape) == dimensions and min(shape) > 0, f"shape {list(shape)} is not that of a matrix")


@dataclass(frozen=True)
class _Spec:
    """Shared arithmetic of the five kinds."""

    kind: ClassVar[str]
    shape: tuple[int, ...]

    def arrays(self) -> Arrays:
        """Key suffix -> (dtype, shape) of every stored array, in the order of storage."""
        raise NotImplementedError

    @property
    def numel(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Every stored byte: codes, codebooks, bit map, scales, outliers, indices."""
        return sum(dtype.itemsize * prod(shape) for dtype, shape in self.arrays().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, all overhead included."""
        return 8 * self.nbytes / max(1, self.numel)


@dataclass(frozen=True)
class BlockSpec(_Spec):
    """Blocks of 16 or 32 along ``in`` that share an int8 exponent; codes are sign-magnitude.

    Source: block formats of arXiv 2310.05079, with the block [1, n].
    """

    kind: ClassVar[str] = "block"
    shape: tuple[int, int]
    format: str = "bfp"
    width: int = 4
    block: int = 32
    exponent_width: int = 0

    def __post_init__(self) -> None:
        """Check the parameters; raises CorruptFileError for one outside its range."""
        _check_shape(self.shape, 2)
        ok = _one_of(self.format, BLOCK_FORMATS)
        _require(ok, f"block format {self.format!r:.40} is not one of {list(BLOCK_FORMATS)}")
        _require(_is_int(self.width) and 2 <= self.width <= 8, f"width {self.width!r:.40} is not in 2..8")
        _require(_one_of(self.block, (16, 32)), f"block length {self.block!r:.40} is not 16 or 32")
        if self.format == "minifloat":
            ok = _is_int(self.exponent_width) and 1 <= self.exponent_width < self.width
            _require(ok, f"exponent width {self.exponent_width!r:.40} is not in 1..{self.width - 1}")
        else:
            ok = _one_of(self.exponent_width, (0,))
            _require(ok, f"exponent width {self.exponent_width!r:.40} belongs to minifloat only")

    @property
    def blocks(self) -> int:
        """Blocks in a row, the last one padded."""
        return ceil(self.shape[1] / self.block)

    def arrays(self) -> Arrays:
        """See the base class."""
        out = self.shape[0]
        return {
            ".codes": (_U8, (out, row_bytes(self.blocks * self.block, self.width))),
            ".exponents": (_I8, (out, self.blocks)),
        }


@dataclass(frozen=True)
class CodebookSpec(_Spec):
    """Each row (axis 0) or column (axis 1) owns an FP16 codebook of 2**b entries, b in 0..8 its width."""

    kind: ClassVar[str] = "codebook"
    shape: tuple[int, int]
    axis: int
    code_bytes: int
    codebook_entries: int
    input_scale: bool = False
    outliers: int = 0

    def __post_init__(self) -> None:
        """Check the parameters; raises CorruptFileError for one outside its range."""
        _check_shape(self.shape, 2)
        _require(_one_of(self.axis, (0, 1)), f"axis {self.axis!r:.40} is not 0 or 1")
        most = self.channels * row_bytes(self.shape[1 - self.axis], 8)
        ok = _is_int(self.code_bytes) and 0 <= self.code_bytes <= most
        _require(ok, f"code_bytes {self.code_bytes!r:.40} is not in 0..{most}")
        ok = _is_int(self.codebook_entries) and self.channels <= self.codebook_entries <= 256 * self.channels
        _require(ok, f"codebook_entries {self.codebook_entries!r:.40} is not 1 to 256 per channel")
        most = min(self.numel, (1 << 32) - 1)  # the row pointers are uint32
        ok = _is_int(self.outliers) and 0 <= self.outliers <= most
        _require(ok, f"outliers {self.outliers!r:.40} is not in 0..{most}")
        _require(isinstance(self.input_scale, bool), "input_scale is not true or false")

    @property
    def channels(self) -> int:
        """Number of codebooks."""
        return self.shape[self.axis]

    @classmethod
    def from_bits(
        cls, shape: tuple[int, int], axis: int, bits: np.ndarray, *, input_scale: bool = False, outliers: int = 0
    ) -> CodebookSpec:
        """The spec that widths per channel, uint8 [channels], lead to."""
        widths = np.asarray(bits, np.int64)
        code_bytes = int(((shape[1 - axis] * widths + 7) // 8).sum())
        return cls(shape, axis, code_bytes, int((1 << widths).sum()), input_scale, outliers)

    def arrays(self) -> Arrays:
        """See the base class."""
        arrays: Arrays = {
            ".bits": (_U8, (self.channels,)),
            ".codes": (_U8, (self.code_bytes,)),
            ".codebook": (_F16, (self.codebook_entries,)),
        }
        if self.input_scale:
            arrays[".input_scale"] = (_F16, (self.shape[1],))
        if self.outliers:
            arrays[".outlier_indptr"] = (_U32, (self.shape[0] + 1,))
            arrays[".outlier_index"] = (_U16 if self.shape[1] <= 65536 else _U32, (self.outliers,))
            arrays[".outlier_value"] = (_F16, (self.outliers,))
        return arrays


@dataclass(frozen=True)
class AffineSpec(_Spec):
    """(q - zero) * scale per block along ``in``: what ONNX Runtime's MatMulNBits holds."""

    kind: ClassVar[str] = "affine"
    shape: tuple[int, int]
    bits: int
    block: int

    def __post_init__(self) -> None:
        """Check the parameters; raises CorruptFileError for one outside its range."""
        _check_shape(self.shape, 2)
        _require(_one_of(self.bits, (2, 4, 8)), f"bits {self.bits!r:.40} is not 2, 4 or 8")
        ok = _one_of(self.block, (16, 32, 64, 128, 256))
        _require(ok, f"block length {self.block!r:.40} is not 16, 32, 64, 128 or 256")

    @property
    def blocks(self) -> int:
        """Blocks in a row, the last one padded."""
        return ceil(self.shape[1] / self.block)

    def arrays(self) -> Arrays:
        """See the base class."""
        out = self.shape[0]
        return {
            ".codes": (_U8, (out, row_bytes(self.blocks * self.block, self.bits))),
            ".scale": (_F16, (out, self.blocks)),
            ".zero": (_U8, (out, self.blocks)),
        }


@dataclass(frozen=True)
class GGMLSpec(_Spec):
    """Raw blocks of a stock ggml type; rows are whole blocks."""

    kind: ClassVar[str] = "ggml"
    shape: tuple[int, int]
    type: str

    def __post_init__(self) -> None:
        """Check the parameters; raises CorruptFileError for one outside its range."""
        _check_shape(self.shape, 2)
        ok = _one_of(self.type, tuple(GGML_TYPES))
        _require(ok, f"ggml type {self.type!r:.40} is not one of {sorted(GGML_TYPES)}")
        length = GGML_TYPES[self.type][0]
        ok = self.shape[1] % length == 0
        _require(ok, f"rows of {self.shape[1]} are not a multiple of {self.type}'s block length {length}")

    def arrays(self) -> Arrays:
        """See the base class."""
        length, size = GGML_TYPES[self.type]
        return {".blocks": (_U8, (self.shape[0], self.shape[1] // length * size))}


@dataclass(frozen=True)
class DenseSpec(_Spec):
    """Values in the source's own dtype."""

    kind: ClassVar[str] = "dense"
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        """Check the parameters; raises CorruptFileError for one outside its range."""
        _check_shape(self.shape, None)
        ok = _one_of(self.dtype, tuple(DENSE_DTYPES))
        _require(ok, f"dtype {self.dtype!r:.40} is not one of {sorted(DENSE_DTYPES)}")

    def arrays(self) -> Arrays:
        """See the base class."""
        return {".dense": (DENSE_DTYPES[self.dtype], self.shape)}


Spec = BlockSpec | CodebookSpec | AffineSpec | GGMLSpec | DenseSpec
_KINDS: dict[str, type[Spec]] = {c.kind: c for c in (BlockSpec, CodebookSpec, AffineSpec, GGMLSpec, DenseSpec)}


def spec_to_json(spec: Spec) -> dict[str, Any]:
    """The JSON object that describes a spec."""
    return {"kind": spec.kind, **asdict(spec), "shape": list(spec.shape)}


def spec_from_json(name: str, value: dict[str, Any]) -> Spec:
    """The spec that a JSON object describes; fields that are not the kind's are ignored.

    Raises:
        CorruptFileError: unknown kind, missing field, or a value outside its range; names the tensor.
    """
    kind = _KINDS.get(value.get("kind", "")) if isinstance(value.get("kind"), str) else None
    if kind is None:
        raise CorruptFileError(
            f"{name}: unknown kind {value.get('kind')!r:.40} (known: {', '.join(_KINDS)}). "
            "The file may come from a newer anyquant: upgrade to read it."
        )
    fields = {key: value[key] for key in kind.__dataclass_fields__ if key in value and key != "kind"}
    shape = fields.get("shape")
    if isinstance(shape, list):
        fields["shape"] = tuple(shape)
    try:
        return kind(**fields)
    except CorruptFileError as error:
        raise CorruptFileError(f"{name}: {error}") from None
    except TypeError as error:
        raise CorruptFileError(f"{name}: its description is incomplete or malformed: {error}") from None
