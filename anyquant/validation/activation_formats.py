"""Names of the formats that activations can be quantized to."""

from __future__ import annotations

import re
from dataclasses import dataclass

from anyquant.errors import UsageError

WIDTHS = range(2, 9)
BLOCKS = (16, 32)


@dataclass(frozen=True)
class ActivationFormat:
    """Block floating point (BFP): neighbours along the reduction dimension share an exponent.

    Attributes:
        width: bits per element, its sign included.
        block: elements that share an exponent.
    """

    width: int
    block: int = 16

    @property
    def name(self) -> str:
        """ "bfp6"."""
        return f"bfp{self.width}"

    @property
    def row(self) -> str:
        """Of a model with float weights of the IR and these activations, in a report."""
        return f"IR, A {self.name}"

    @property
    def reason(self) -> str:
        """What is rounded, for a report."""
        return (
            f"inputs of linear layers and both operands of the attention products in {self.name}, "
            f"blocks of {self.block} ({self.width + 8 / self.block:g} bits)"
        )


def activation_format(name: str, block: int = 16) -> ActivationFormat:
    """The format of a name such as "bfp6".

    Raises:
        UsageError: there is none of this name, or no such block.
    """
    found = re.fullmatch(r"bfp([0-9]+)", name.strip().lower())
    if found is None or int(found[1]) not in WIDTHS:
        known = ", ".join(f"bfp{width}" for width in WIDTHS)
        raise UsageError(f"--activations is {name!r:.40}; it must be one of {known}.")
    if block not in BLOCKS:
        raise UsageError(f"the block of activations is {block!r:.40}; it must be 16 or 32.")
    return ActivationFormat(int(found[1]), block)
