"""The peer HQQ, by its own package.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), package hqq. It looks at
the weights alone. Its scale and zero are kept in FP16 and are counted as such: 32 bits per group.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np

from accuracy.interface import Floats, Peer, Shape
from anyquant.errors import MissingDependency, UsageError

GROUP = 64


def available() -> bool:
    """Whether the package can be imported."""
    try:
        _quantizer()
    except MissingDependency:
        return False
    return True


def hqq(bits: int, group: int = GROUP, axis: int = 1) -> Peer:
    """HQQ with its default optimizer; zeros are rounded at 4 bits, as its configuration has it.

    Args:
        bits: of a code: 1..6 or 8.
        group: weights that share scale and zero; a matrix' columns must be a multiple of it.
        axis: 1, the default of its configuration: groups are of neighbours in a row; 0, that of its function, and the
            one that its kernels take: of weights that lie as many as there are groups apart.

    Raises:
        MissingDependency: hqq is not installed.
    """
    quantizer = _quantizer()

    def quantize(weight: Floats, moment: Floats) -> Floats:
        import torch

        if weight.shape[1] % group:
            raise UsageError(f"HQQ needs columns in groups of {group}; this matrix is {list(weight.shape)}.")
        codes, meta = quantizer.quantize(
            torch.from_numpy(np.array(weight)),
            nbits=bits, group_size=group, axis=axis, optimize=True, round_zero=bits == 4, bitpack=False, device="cpu",
        )  # fmt: skip
        scale, zero = (meta[key].to(torch.float16).to(torch.float32) for key in ("scale", "zero"))
        values: Floats = ((codes.to(torch.float32) - zero) * scale).reshape(weight.shape).numpy()
        return values

    def counted(shape: Shape) -> float:
        return bits + 32 / group

    return Peer(f"HQQ {bits} bits, group {group}{'' if axis else ', axis 0'}", counted, quantize)


def _quantizer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses what torch has deprecated
        try:
            return importlib.import_module("hqq.core.quantize").Quantizer
        except ImportError as error:
            raise MissingDependency("hqq", "benchmark", "the peer HQQ") from error
