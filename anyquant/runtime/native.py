"""The compiled library: found, checked and called through ctypes.

``libanyquant_core`` (kernels/core) is optional. Everything that it does exists in NumPy too, with the same bytes;
where it is missing, :func:`available` is false and :func:`why_not` says why. ``ANYQUANT_NATIVE=0`` switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import anyquant
from anyquant.errors import MachineError
from anyquant.ir import packing

LIBRARY = "libanyquant_core.so"
ABI_VERSION = 5
"""AQ_ABI_VERSION of the header that this module was written for."""

_SIZE, _INT32, _BITS = ctypes.c_size_t, ctypes.c_int32, ctypes.c_int
_BUFFER = [ctypes.c_void_p, ctypes.c_size_t]  # and its length
_FUNCTIONS: dict[str, list[type]] = {
    # rows and columns are the pair of sizes
    "aq_pack_bits": [*_BUFFER, _SIZE, _SIZE, _BITS, *_BUFFER],
    "aq_unpack_bits": [*_BUFFER, _SIZE, _SIZE, _BITS, *_BUFFER],
    "aq_kmeans_errors": [*_BUFFER, *_BUFFER, _SIZE, _SIZE, *_BUFFER, *_BUFFER, *_BUFFER],
    "aq_kmeans": [*_BUFFER, *_BUFFER, _SIZE, _SIZE, _INT32, *_BUFFER, *_BUFFER],
    "aq_assign": [*_BUFFER, _SIZE, _SIZE, *_BUFFER, _INT32, *_BUFFER],
    "aq_refine_rows": [*_BUFFER * 4, _SIZE, _SIZE, _INT32, _INT32, _INT32, *_BUFFER * 4],
    "aq_matmul_pack": [ctypes.c_void_p, *_BUFFER],
    "aq_matmul_pack_blocks": [ctypes.c_void_p, *_BUFFER],
    "aq_matmul_prepare": [ctypes.c_void_p, ctypes.c_void_p, _SIZE, *_BUFFER],
    "aq_matmul_run": [ctypes.c_void_p, _SIZE, *[ctypes.c_void_p] * 2, _SIZE, _SIZE, _BITS],
    "aq_matmul_band": [
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_void_p,
        _SIZE,
        *_BUFFER,
        ctypes.c_void_p,
        _BITS,
    ],
    "aq_matmul": [*[ctypes.c_void_p] * 2, _SIZE, *_BUFFER, ctypes.c_void_p, _SIZE],
    "aq_matmul_level": [],
}
"""Functions that return a status, with what they take; the headers say more."""
_SIZES: dict[str, list[type]] = {
    "aq_kmeans_workspace": [_SIZE],
    "aq_refine_workspace": [_SIZE, _INT32],
    "aq_matmul_bytes": [ctypes.c_void_p],
    "aq_matmul_block_bytes": [ctypes.c_void_p],
    "aq_matmul_band_workspace": [ctypes.c_void_p],
    "aq_matmul_workspace": [ctypes.c_void_p, _SIZE],
}
"""Functions that return a number of bytes."""

_STATUS = {
    -1: "a bad argument",
    -2: "a buffer of the wrong length",
    -3: "a code that does not fit into its bits or its codebook, or outliers out of order",
    -4: "instructions that this processor does not have",
}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Load the library once: (library, "") or (None, why there is none)."""
    path = path_of(LIBRARY)
    return _open(path) if path else (None, missing(LIBRARY))


def _switched_off() -> bool:
    return os.environ.get("ANYQUANT_NATIVE", "1") == "0"


def path_of(name: str) -> Path | None:
    """A library that was compiled with anyquant, or None; :func:`missing` says why then."""
    # In an editable install the package has two folders, of sources and of what was compiled.
    candidates = [Path(folder) / "_lib" / name for folder in anyquant.__path__]
    return None if _switched_off() else next((path for path in candidates if path.is_file()), None)


def required(name: str, words: str) -> Path:
    """A library that was compiled with anyquant.

    Args:
        name: of the file.
        words: what it is to the user, with "is" or "are".

    Raises:
        MachineError: it was not built, or is switched off; says what to do.
    """
    found = path_of(name)
    if found is None:
        raise MachineError(f"{words} not available: {missing(name)}")
    return found


def missing(name: str) -> str:
    """Why there is no such library, and what to do about it."""
    if _switched_off():
        return "switched off by ANYQUANT_NATIVE=0"
    return f"{name} was not built: the install found no C++ compiler or CMake. Install both and install anyquant again"


def _open(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """Open one library file, check its version and declare its functions."""
    try:
        library = ctypes.CDLL(str(path))
        library.aq_abi_version.restype = ctypes.c_int
        library.aq_abi_version.argtypes = []
        version = library.aq_abi_version()
        if version != ABI_VERSION:
            return None, f"{path} has interface version {version}, this anyquant needs {ABI_VERSION}: install it again"
        for name, arguments in _SIZES.items():
            function = getattr(library, name)
            function.restype = ctypes.c_size_t
            function.argtypes = arguments
        for name, arguments in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype = ctypes.c_int
            function.argtypes = arguments
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be used: {error}"
    return library, ""


def available() -> bool:
    """Whether the compiled library can be used."""
    return _load()[0] is not None


def why_not() -> str:
    """Why the library cannot be used, in one sentence; empty if it can."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """Return the loaded library.

    Raises:
        MachineError: there is none, or it does not fit.
    """
    loaded, reason = _load()
    if loaded is None:
        raise MachineError(f"the compiled library is not available: {reason}")
    return loaded


def pack_bits(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes into bit streams, least significant bit first, each row padded to a byte with zeros.

    Args:
        values: uint8 [rows, columns], each below 2**bits.
        bits: 0..8.

    Returns:
        uint8 [rows, (columns * bits + 7) // 8].

    Raises:
        ValueError: another shape or dtype, bits outside 0..8, or a code that does not fit.
        MachineError: the library is not available.
    """
    rows, columns = _shape(values, bits)
    codes = np.empty((rows, packing.row_bytes(columns, bits)), np.uint8)
    _call("aq_pack_bits", np.ascontiguousarray(values), rows, columns, bits, codes)
    return codes


def unpack_bits(codes: NDArray[np.uint8], columns: int, bits: int) -> NDArray[np.uint8]:
    """Inverse of :func:`pack_bits`; padding bits are ignored.

    Args:
        codes: uint8 [rows, (columns * bits + 7) // 8].
        columns: codes in a row.
        bits: 0..8.

    Returns:
        uint8 [rows, columns].

    Raises:
        ValueError: another shape or dtype, or bits outside 0..8.
        MachineError: the library is not available.
    """
    rows, row_bytes = _shape(codes, bits)
    if columns < 0 or row_bytes != packing.row_bytes(columns, bits):
        raise ValueError(
            f"{columns} codes of {bits} bits need rows of {packing.row_bytes(columns, bits)} bytes, not {row_bytes}"
        )
    values = np.empty((rows, columns), np.uint8)
    _call("aq_unpack_bits", np.ascontiguousarray(codes), rows, columns, bits, values)
    return values


def install() -> bool:
    """Let ``anyquant.ir.packing`` use the compiled functions, if there are any; return whether it does now."""
    if not available():
        return False
    packing.set_backend(pack_bits, unpack_bits)
    return True


def _shape(array: NDArray[np.uint8], bits: int) -> tuple[int, int]:
    """Check what a pointer cannot tell, and return the two dimensions."""
    if not 0 <= bits <= 8:
        raise ValueError(f"bits must be 0..8, not {bits}")
    if array.dtype != np.uint8 or array.ndim != 2:
        raise ValueError(f"expected uint8 [rows, columns], not {array.dtype} of shape {list(array.shape)}")
    return array.shape[0], array.shape[1]


def _call(name: str, source: NDArray[np.uint8], rows: int, columns: int, bits: int, target: NDArray[np.uint8]) -> None:
    """Call one of the two functions for bit streams, both arrays in C order."""
    about = f"{rows} rows of {columns} codes of {bits} bits"
    call(name, about, source.ctypes.data, source.size, rows, columns, bits, target.ctypes.data, target.size)


def call(name: str, about: str, *arguments: int | None) -> None:
    """Call a function of the library, pointers as numbers, and turn its status into an exception about ``about``.

    The GIL is released meanwhile.

    Raises:
        ValueError: the function refuses the arguments.
        MachineError: the library is not available.
    """
    status = getattr(library(), name)(*arguments)
    if status:
        meaning = _STATUS.get(status, f"status {status}")
        raise ValueError(f"{name} refused {about}: {meaning}")
