"""What a method is: the protocol that built-in and third-party methods share.

Methods are found through the entry-point group ``anyquant.methods``. They know matrices, not models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from anyquant.ir import Spec, Tensor

Floats = NDArray[np.float32]
Settings = Mapping[str, Any]


class Method(Protocol):
    """The protocol; all functions are pure, so that units can run anywhere in any order."""

    name: str
    summary: str

    def settings(self, options: Settings) -> dict[str, Any]:
        """Complete and check the options; the result is recorded in the IR as JSON.

        Raises:
            UsageError: an option that is unknown to the method or out of range.
        """

    def choices(self, shape: tuple[int, int], settings: Settings) -> Sequence[Spec]:
        """The forms that a matrix [out, in] can take, fewest bytes first; from its shape alone."""

    def errors(self, weight: Floats, choices: Sequence[Spec], settings: Settings) -> list[float]:
        """Squared error sum (w - q)**2 of each choice, FP64."""

    def quantize(self, weight: Floats, spec: Spec, settings: Settings) -> Tensor:
        """The tensor of this form that stands for ``weight``, float32 [out, in]."""
