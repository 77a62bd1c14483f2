"""ggml's own quantizer, from the package ``libggml-python``, called through ctypes.

The library is trusted with nothing that can be checked: type numbers are looked up by name in its table, and a type
whose block has another length or size than the intermediate representation knows is refused. It ends the process
where its assertions fail, so values are checked before they are handed over. Calls release the GIL, and any number of
threads may quantize at a time.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyquant.errors import InputError, MachineError, MissingDependency
from anyquant.ir import GGML_TYPES
from anyquant.ir.ggml_blocks import finite_blocks

PACKAGE, EXTRA = "libggml-python", "ggml"
_LIBRARY = "libggml-base.so"
_TYPES = 43  # entries of the table of types, at least; further ones are newer than this module
_LARGEST = 1e9  # of a weight or an importance: ggml sums weight * weight * importance in FP32
_INT, _LONG, _SIZE, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class _Traits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", _LONG),
        ("blck_size_interleave", _LONG),
        ("type_size", _SIZE),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _LONG)),
        ("from_float_ref", _POINTER),
    )


_SIGNATURES = {
    "ggml_version": (ctypes.c_char_p, []),
    "ggml_type_name": (ctypes.c_char_p, [_INT]),
    "ggml_blck_size": (_LONG, [_INT]),
    "ggml_type_size": (_SIZE, [_INT]),
    "ggml_get_type_traits": (ctypes.POINTER(_Traits), [_INT]),
    "ggml_quantize_init": (None, [_INT]),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, [_INT]),
    "ggml_quantize_chunk": (_SIZE, [_INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER]),
}  # fmt: skip


class Library:
    """The library, loaded and checked; get it by :func:`library`.

    Attributes:
        path: the file.
        version: of ggml.
        numbers: type name -> its number in this build, of the types that the intermediate representation has too.
    """

    def __init__(self, path: Path) -> None:
        """Load a library file and check its types.

        Raises:
            MachineError: it cannot be loaded, lacks a function, or lays a type out otherwise.
        """
        self.path = path
        try:
            self._c = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self._c, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise MachineError(f"{path} cannot be used: {error}. Install {PACKAGE} again.") from error
        self.version = str(self._c.ggml_version().decode())
        self.numbers = self._types()
        self._lock, self._ready = threading.Lock(), set[str]()

    def _types(self) -> dict[str, int]:
        found = {}
        for number in range(_TYPES):
            name = (self._c.ggml_type_name(number) or b"").decode().upper()
            if name not in GGML_TYPES:
                continue
            layout = int(self._c.ggml_blck_size(number)), int(self._c.ggml_type_size(number))
            traits = self._c.ggml_get_type_traits(number).contents
            if layout != GGML_TYPES[name] or (traits.blck_size, traits.type_size) != layout:
                raise MachineError(
                    f"{self.path} (ggml {self.version}) has blocks of {layout[0]} weights in {layout[1]} bytes for "
                    f"{name}, anyquant knows {GGML_TYPES[name][0]} in {GGML_TYPES[name][1]}: this build is not "
                    f"compatible. Known to work: pip install '{PACKAGE}==0.20.2.post1'"
                )
            found[name] = number
        return found

    def _number(self, type_name: str) -> int:
        if type_name not in self.numbers:
            raise MachineError(
                f"{self.path} (ggml {self.version}) has no type {type_name}; it has {', '.join(self.numbers)}."
            )
        return self.numbers[type_name]

    def needs_importance(self, type_name: str) -> bool:
        """Whether the quantizer of a type refuses to run without importances.

        Raises:
            MachineError: the library has no such type.
        """
        return bool(self._c.ggml_quantize_requires_imatrix(self._number(type_name)))

    def quantize(self, weight: Floats, type_name: str, importance: Floats | None = None) -> Bytes:
        """Quantize rows to a stock type, as llama.cpp does.

        Args:
            weight: float32 [rows, columns], rows of whole blocks.
            type_name: of GGML_TYPES.
            importance: float32 [columns], what a squared error counts, the same in all rows, or [rows, columns];
                not negative. None leaves the weighting to ggml, which goes by the weights themselves; types that do
                not run without are given ones.

        Returns:
            uint8 [rows, bytes per row].

        Raises:
            ValueError: other shapes or dtypes, a row of no whole blocks, or a negative importance.
            InputError: a value that is not finite, or too large for the type's FP16 scales.
            MachineError: the library has no such type.
        """
        number = self._number(type_name)
        length, size = GGML_TYPES[type_name]
        rows, columns = _shape(weight, type_name)
        _check_finite(weight, "weight")
        if importance is None and self.needs_importance(type_name):
            importance = np.ones(columns, np.float32)
        if importance is not None:
            _check_importance(importance, rows, columns)
        self._prepare(type_name, number)
        source = np.ascontiguousarray(weight)
        blocks = np.zeros((rows, columns // length * size), np.uint8)
        if importance is None or importance.ndim == 1:
            known = None if importance is None else np.ascontiguousarray(importance)
            self._chunk(number, source, blocks, known)
        else:
            for row in range(rows):
                self._chunk(number, source[row : row + 1], blocks[row : row + 1], np.ascontiguousarray(importance[row]))
        flat = blocks.reshape(-1, size)
        bad = ~finite_blocks(flat, type_name)
        if type_name == "MXFP4":  # the exponent of weights near 2**-127 wraps around in ggml; their codes are 0
            flat[bad] = 0
        elif bad.any():
            row, column = divmod(int(bad.argmax()) * length, columns)
            largest = np.abs(source[row, column : column + length]).max()
            raise InputError(
                f"the weights at [{row}, {column}:{column + length}], up to {largest:g}, are too large for the scales "
                f"of {type_name} ({int(bad.sum())} blocks in all). The method block holds them."
            )
        return blocks

    def _prepare(self, type_name: str, number: int) -> None:
        """Build the tables of a type's search, which takes up to half a minute for IQ1 and IQ2, once."""
        if type_name in self._ready:
            return
        with self._lock:
            if type_name not in self._ready:
                self._c.ggml_quantize_init(number)
                self._ready.add(type_name)

    def _chunk(self, number: int, source: Floats, blocks: Bytes, importance: Floats | None) -> None:
        pointer = None if importance is None else importance.ctypes.data
        rows, columns = source.shape
        written = self._c.ggml_quantize_chunk(
            number, source.ctypes.data, blocks.ctypes.data, 0, rows, columns, pointer
        )  # fmt: skip
        if written != blocks.nbytes:
            raise MachineError(f"ggml {self.version} wrote {written} bytes, not {blocks.nbytes}: its build is broken.")

    def dequantize(self, blocks: Bytes, type_name: str) -> Floats:
        """What ggml makes of rows of whole blocks, uint8 [rows, row bytes]: float32 [rows, columns].

        Raises:
            ValueError: a row of no whole blocks.
            MachineError: the library has no such type.
        """
        traits = self._c.ggml_get_type_traits(self._number(type_name)).contents
        length, size = GGML_TYPES[type_name]
        if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] % size:
            raise ValueError(f"expected uint8 rows of whole blocks of {size} bytes, not {list(blocks.shape)}")
        source = np.ascontiguousarray(blocks)
        values = np.empty((len(blocks), blocks.shape[1] // size * length), np.float32)
        if values.size:
            traits.to_float(source.ctypes.data, values.ctypes.data, values.size)
        return values


def _shape(weight: Floats, type_name: str) -> tuple[int, int]:
    length = GGML_TYPES[type_name][0]
    if weight.dtype != np.float32 or weight.ndim != 2 or not weight.size:
        raise ValueError(f"expected float32 [rows, columns], not {weight.dtype} of shape {list(weight.shape)}")
    if weight.shape[1] % length:
        raise ValueError(f"rows of {weight.shape[1]} are not a multiple of {type_name}'s block length {length}")
    return weight.shape[0], weight.shape[1]


def _check_importance(importance: Floats, rows: int, columns: int) -> None:
    if importance.dtype != np.float32 or importance.shape not in ((columns,), (rows, columns)):
        raise ValueError(
            f"expected importances float32 [{columns}] or [{rows}, {columns}], not {importance.dtype} of shape "
            f"{list(importance.shape)}"
        )
    _check_finite(importance, "importance")
    if importance.min() < 0:
        raise ValueError(f"the least importance is {importance.min()}, must not be negative")


def _check_finite(values: Floats, what: str) -> None:
    """NaN, Inf and values whose squares overflow end the process inside ggml."""
    bad = ~(np.abs(values) <= _LARGEST)  # true for NaN
    if bad.any():
        index = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), values.shape))
        raise InputError(
            f"the {what} {values[index]} at {list(index)} is not finite or beyond {_LARGEST:g}, which ggml cannot "
            f"quantize ({int(bad.sum())} in all)."
        )


@functools.cache
def _find() -> Path | None:
    spec = importlib.util.find_spec("libggml")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    candidates = [folder / sub / _LIBRARY for folder in folders for sub in ("lib64", "lib")]
    return next((path for path in candidates if path.is_file()), None)


def available() -> bool:
    """Whether the package is installed."""
    return _find() is not None


_first = threading.Lock()
_loaded: Library | None = None


def library() -> Library:
    """The library; found, loaded and checked at the first call.

    Raises:
        MissingDependency: libggml-python is not installed.
        MachineError: the installed build does not fit.
    """
    global _loaded
    with _first:
        if _loaded is None:
            path = _find()
            if path is None:
                raise MissingDependency(PACKAGE, EXTRA, "quantizing to stock ggml types")
            _loaded = Library(path)
    return _loaded
