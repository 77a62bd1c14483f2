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


def hqq(bits: int, group: int = GROUP) -> Peer:
    """HQQ with its default optimizer, groups along the columns (axis 1).

    Args:
        bits: of a code: 1..6 or 8.
        group: columns that share scale and zero; a matrix' columns must be a multiple of it.

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
            nbits=bits, group_size=group, axis=1, optimize=True, bitpack=False, device="cpu",
        )  # fmt: skip
        scale, zero = (meta[key].to(torch.float16).to(torch.float32) for key in ("scale", "zero"))
        values: Floats = ((codes.to(torch.float32) - zero) * scale).reshape(weight.shape).numpy()
        return values

    def counted(shape: Shape) -> float:
        return bits + 32 / group

    return Peer(f"HQQ {bits} bits, group {group}", counted, quantize)


def _quantizer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses what torch has deprecated
        try:
            return importlib.import_module("hqq.core.quantize").Quantizer
        except ImportError as error:
            raise MissingDependency("hqq", "benchmark", "the peer HQQ") from error
