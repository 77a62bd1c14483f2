"""A tensor of the intermediate representation: a spec with its arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from anyquant.ir.checks import ZERO_BLOCK, check_arrays
from anyquant.ir.spec import Spec

__all__ = ["ZERO_BLOCK", "Tensor", "as_stored"]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A spec and the arrays that it calls for, keyed by suffix (".codes", ".exponents", ...)."""

    spec: Spec
    arrays: dict[str, np.ndarray]

    def check(self, name: str) -> None:
        """Check names, dtypes, shapes, ranges and order of all arrays, and that every value is finite in FP32.

        Raises:
            CorruptFileError: names the tensor, the array, the first bad index and what was expected.
        """
        check_arrays(name, self.spec, self.arrays)


def as_stored(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """The array in C order and in the little-endian dtype of its key; a scalar stays one."""
    return np.asarray(array, dtype, order="C")
