"""The checks on a tensor's arrays: nothing that passes can make a reader fail, or mean two things.

Large arrays are checked a few rows at a time. Every message gives the array, the first bad index and
how many there are.
"""

from __future__ import annotations

import numpy as np

from anyquant.errors import CorruptFileError
from anyquant.ir.ggml_blocks import finite_blocks
from anyquant.ir.packing import code_offsets, row_chunks, unpack
from anyquant.ir.spec import GGML_TYPES, AffineSpec, BlockSpec, CodebookSpec, DenseSpec, GGMLSpec, Spec

Arrays = dict[str, np.ndarray]

ZERO_BLOCK = -128
"""The shared exponent of a block whose codes are all zero."""

_LEAST = -149  # 2**-149 is the least positive FP32 number


class _Faults:
    """Faults found chunk by chunk: the first index and the count of each."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], tuple[list[int], int]] = {}

    def note(self, where: str, bad: np.ndarray, message: str, row: int = 0) -> None:
        """Note the fault ``message`` where ``bad`` holds; ``row`` is what index 0 of the first axis stands for."""
        count = int(np.count_nonzero(bad))
        if not count:
            return
        index, before = self._found.get((where, message), ([], 0))
        if not before:
            first = np.unravel_index(int(bad.argmax()), bad.shape)
            index = [int(i) + (row if axis == 0 else 0) for axis, i in enumerate(first)]
        self._found[where, message] = (index, before + count)

    def report(self) -> None:
        """Raise CorruptFileError with the fault noted first, if any."""
        for (where, message), (index, count) in self._found.items():
            raise CorruptFileError(f"{where}: {message} at index {index} ({count} in all)")


def check_arrays(name: str, spec: Spec, arrays: Arrays) -> None:
    """Check names, dtypes, shapes, ranges and order of a tensor's arrays, and that every value is finite in FP32.

    Raises:
        CorruptFileError: names the tensor, the array, the first bad index and what was expected.
    """
    expected = spec.arrays()
    if set(arrays) != set(expected):
        raise CorruptFileError(f"{name}: has arrays {sorted(arrays)}, its kind needs {sorted(expected)}")
    for suffix, (dtype, shape) in expected.items():
        array = arrays[suffix]
        if array.dtype != dtype or array.shape != shape:
            raise CorruptFileError(
                f"{name}{suffix}: is {array.dtype} {list(array.shape)}, must be {dtype} {list(shape)}"
            )
    faults = _Faults()
    if isinstance(spec, BlockSpec):
        _block(faults, name, spec, arrays)
    elif isinstance(spec, CodebookSpec):
        _codebook(faults, name, spec, arrays)
    elif isinstance(spec, AffineSpec):
        _affine(faults, name, spec, arrays)
    elif isinstance(spec, GGMLSpec):
        _ggml(faults, name, spec, arrays)
    else:
        _dense(faults, name, spec, arrays)
    faults.report()


def _block(faults: _Faults, name: str, spec: BlockSpec, arrays: Arrays) -> None:
    sign = 1 << (spec.width - 1)
    padded = spec.blocks * spec.block
    for rows in row_chunks((spec.shape[0], padded)):
        codes = unpack(arrays[".codes"][rows], padded, spec.width)
        exponents = arrays[".exponents"][rows]
        pad = codes[:, spec.shape[1] :] != 0
        faults.note(name + ".codes", pad, "a code beyond the last column is not zero", rows.start)
        if spec.format == "log":
            message = "a zero block in a log tensor, which has no zero,"
            faults.note(name + ".exponents", exponents == ZERO_BLOCK, message, rows.start)
            power = (codes & (sign - 1)).astype(np.int16) - (sign - 1)
            power += np.repeat(exponents.astype(np.int16), spec.block, axis=1)
            small = power[:, : spec.shape[1]] < _LEAST
            faults.note(name + ".codes", small, "a value below 2**-149, the least of FP32,", rows.start)
            continue
        faults.note(name + ".codes", codes == sign, "negative zero", rows.start)
        empty = ~codes.reshape(len(codes), spec.blocks, spec.block).any(axis=2)
        wrong = empty != (exponents == ZERO_BLOCK)
        faults.note(name + ".exponents", wrong, "exponent -128 must mark just the zero blocks; wrong", rows.start)
        if spec.format == "minifloat":
            inexact = _below_float32(codes, exponents, spec)
            message = "a value that FP32 cannot hold (its last bit is below 2**-149)"
            faults.note(name + ".codes", inexact, message, rows.start)


def _below_float32(codes: np.ndarray, exponents: np.ndarray, spec: BlockSpec) -> np.ndarray:
    """Where a minifloat value has bits below 2**-149. BFP cannot: its least power is -127 - 8 + 1."""
    mantissa_bits = spec.width - 1 - spec.exponent_width
    magnitude = (codes & ((1 << (spec.width - 1)) - 1)).astype(np.int32)
    field, mantissa = magnitude >> mantissa_bits, magnitude & ((1 << mantissa_bits) - 1)
    significand = mantissa + np.where(field > 0, 1 << mantissa_bits, 0)
    power = np.repeat(exponents.astype(np.int32), spec.block, axis=1)
    power += np.maximum(field, 1) - ((1 << spec.exponent_width) - 1) - mantissa_bits
    # The significand has at most 7 bits: further below, all are lost.
    lost = significand & ((1 << np.clip(_LEAST - power, 0, 8)) - 1)
    inexact: np.ndarray = lost != 0
    return inexact


def _codebook(faults: _Faults, name: str, spec: CodebookSpec, arrays: Arrays) -> None:
    bits = arrays[".bits"]
    faults.note(name + ".bits", bits > 8, "a width above 8")
    faults.report()  # what follows trusts the widths
    entries = 1 << bits.astype(np.int64)
    offsets = code_offsets(bits, spec.shape[1 - spec.axis])
    if int(offsets[-1]) != spec.code_bytes or int(entries.sum()) != spec.codebook_entries:
        raise CorruptFileError(
            f"{name}: the widths call for {offsets[-1]} code bytes and {entries.sum()} codebook entries, "
            f"the description has {spec.code_bytes} and {spec.codebook_entries}"
        )
    codebook = arrays[".codebook"].astype(np.float32)
    faults.note(name + ".codebook", ~np.isfinite(codebook), "a non-finite entry")
    faults.report()  # nor does order mean anything for NaN
    descending = np.zeros(len(codebook), bool)
    descending[1:] = codebook[1:] < codebook[:-1]
    descending[np.cumsum(entries)[:-1]] = False  # each codebook starts anew
    faults.note(name + ".codebook", descending, "entries are not ascending")
    _code_padding(faults, name, spec, arrays, offsets)
    if spec.input_scale:
        scale = arrays[".input_scale"].astype(np.float32)
        bad = ~(np.isfinite(scale) & (scale > 0))
        faults.note(name + ".input_scale", bad, "a scale that is not positive and finite")
    if spec.outliers:
        _outliers(faults, name, spec, arrays)


def _code_padding(faults: _Faults, name: str, spec: CodebookSpec, arrays: Arrays, offsets: np.ndarray) -> None:
    used = (spec.shape[1 - spec.axis] * arrays[".bits"].astype(np.int64)) % 8
    partial = np.flatnonzero(used)
    last = arrays[".codes"][offsets[partial + 1] - 1].astype(np.int64)
    bad = np.zeros(spec.channels, bool)
    bad[partial] = (last >> used[partial]) != 0
    faults.note(name + ".codes", bad, "padding bits are not zero in the channel")


def _outliers(faults: _Faults, name: str, spec: CodebookSpec, arrays: Arrays) -> None:
    indptr = arrays[".outlier_indptr"].astype(np.int64)
    index = arrays[".outlier_index"].astype(np.int64)
    if indptr[0] != 0 or indptr[-1] != spec.outliers:
        raise CorruptFileError(
            f"{name}.outlier_indptr: runs from {indptr[0]} to {indptr[-1]}, must run from 0 to {spec.outliers}"
        )
    faults.note(name + ".outlier_indptr", np.diff(indptr) < 0, "row pointers descend")
    faults.report()  # what follows trusts them
    faults.note(name + ".outlier_index", index >= spec.shape[1], f"a column beyond {spec.shape[1] - 1}")
    row = np.repeat(np.arange(spec.shape[0]), np.diff(indptr))
    same = np.zeros(len(index), bool)
    same[1:] = (row[1:] == row[:-1]) & (index[1:] <= index[:-1])
    faults.note(name + ".outlier_index", same, "columns are not strictly ascending in their row")
    values = arrays[".outlier_value"].astype(np.float32)
    faults.note(name + ".outlier_value", ~np.isfinite(values), "a non-finite value")


def _affine(faults: _Faults, name: str, spec: AffineSpec, arrays: Arrays) -> None:
    faults.note(name + ".scale", ~np.isfinite(arrays[".scale"]), "a non-finite scale")
    if spec.bits < 8:
        faults.note(name + ".zero", arrays[".zero"] >= 1 << spec.bits, f"a zero point above {(1 << spec.bits) - 1}")
    padded = spec.blocks * spec.block
    if padded == spec.shape[1]:
        return
    for rows in row_chunks((spec.shape[0], padded)):
        pad = unpack(arrays[".codes"][rows], padded, spec.bits)[:, spec.shape[1] :] != 0
        faults.note(name + ".codes", pad, "a code beyond the last column is not zero", rows.start)


def _ggml(faults: _Faults, name: str, spec: GGMLSpec, arrays: Arrays) -> None:
    blocks = np.ascontiguousarray(arrays[".blocks"]).reshape(-1, GGML_TYPES[spec.type][1])
    bad = ~finite_blocks(blocks, spec.type).reshape(spec.shape[0], -1)
    faults.note(name + ".blocks", bad, f"a non-finite scale in the {spec.type} block")


def _dense(faults: _Faults, name: str, spec: DenseSpec, arrays: Arrays) -> None:
    stored = arrays[".dense"]
    message = "a value that is not finite" + (" in FP32" if spec.dtype == "F64" else "")
    for rows in row_chunks(spec.shape):
        part = stored[rows] if stored.ndim else stored
        if spec.dtype == "BF16":
            bad = (part & 0x7F80) == 0x7F80
        elif spec.dtype == "F64":
            with np.errstate(over="ignore", invalid="ignore"):  # overflow and signalling NaN are what is looked for
                bad = ~np.isfinite(part.astype(np.float32))
        else:
            bad = ~np.isfinite(part)
        faults.note(name + ".dense", np.asarray(bad), message, rows.start or 0)
