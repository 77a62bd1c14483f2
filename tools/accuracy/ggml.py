"""Peers in stock ggml types, quantized by ggml itself with importances, as llama.cpp does it.

Importances are the means of x_j^2, which is what the values of llama.cpp's importance matrix are.
"""

from __future__ import annotations

import numpy as np

from accuracy.interface import Floats, Peer, Shape
from anyquant.errors import InputError, UsageError
from anyquant.ir import GGML_TYPES
from anyquant.runtime import libggml

_LEAST = 1e-6  # of an importance, relative to the mean: some of ggml's searches fail where all of a block are 0
_FP16_MAX = 65504.0


def available() -> bool:
    """Whether ggml is installed."""
    return libggml.available()


def ggml(type_name: str) -> Peer:
    """One type for a matrix, whose columns must be a multiple of the type's block.

    Args:
        type_name: a stock quantized type, or F16.

    Raises:
        UsageError: an unknown type; or when used, a matrix of other columns.
        MissingDependency: libggml-python is not installed.
    """
    if type_name == "F16":
        return Peer("ggml F16", lambda shape: 16.0, _half)
    if type_name not in GGML_TYPES:
        raise UsageError(f"unknown ggml type {type_name!r}; known are F16, {', '.join(GGML_TYPES)}")
    library = libggml.library()
    length, size = GGML_TYPES[type_name]

    def require_fit(shape: Shape) -> None:
        if shape[1] % length:
            raise UsageError(f"{type_name} needs rows of whole blocks of {length}; this matrix is {list(shape)}.")

    def quantize(weight: Floats, moment: Floats) -> Floats:
        require_fit((weight.shape[0], weight.shape[1]))
        blocks = library.quantize(weight, type_name, importance(moment))
        return library.dequantize(blocks, type_name)

    def counted(shape: Shape) -> float:
        require_fit(shape)
        return 8 * size / length

    return Peer(f"ggml {type_name}", counted, quantize)


def importance(moment: Floats) -> Floats:
    """What llama.cpp's importance matrix says of the columns, float32 [in], never quite 0."""
    power = np.diag(moment).astype(np.float64)
    mean = float(power.mean())
    return np.maximum(power, _LEAST * mean if mean > 0 else 1.0).astype(np.float32)


def _half(weight: Floats, moment: Floats) -> Floats:
    if np.abs(weight).max(initial=0.0) > _FP16_MAX:
        raise InputError(f"a weight of {np.abs(weight).max():g} does not fit into F16")
    return weight.astype(np.float16).astype(np.float32)
