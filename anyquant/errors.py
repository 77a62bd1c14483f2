"""The exceptions of anyquant and the exit codes of its command line.

    AnyquantError                1  a fault of ours
    +-- UsageError               2  the request cannot be met as it was made
    |   +-- InfeasibleTarget        bits or size outside the feasible interval
    |   +-- ExportRefused           an exporter cannot write these values exactly
    +-- InputError               3  a model, file or text is not usable
    |   +-- NonFiniteError          NaN or Inf in a weight
    |   +-- CorruptFileError        truncated, edited or hostile file
    |   +-- UnknownArchitecture     no reader or exporter knows the family
    +-- ValidationFailed         4  a gate of ``validate`` was not met
    +-- MissingDependency        5  an optional package is not installed
    +-- MachineError             6  disk, memory or GPU

    +-- Interrupted            130  Ctrl-C in a run that can be gone on with

Any other Ctrl-C is 130 too. A message says what, where (tensor, index), the numbers, and the next step.
"""

from __future__ import annotations


class AnyquantError(Exception):
    """Base of every error that anyquant raises on purpose."""

    exit_code = 1


class UsageError(AnyquantError):
    """The request contradicts itself or the state of the machine's files."""

    exit_code = 2


class InfeasibleTarget(UsageError):
    """The target lies outside the feasible interval, which the message names.

    Attributes:
        feasible: fewest and most of what the target counts (bits per weight, or bytes).
    """

    def __init__(self, message: str, feasible: tuple[float, float]) -> None:
        """Keep the interval for programs."""
        super().__init__(message)
        self.feasible = feasible


class ExportRefused(UsageError):
    """The format cannot hold these values exactly; the message names what would."""


class InputError(AnyquantError):
    """A model, file or text that cannot be used."""

    exit_code = 3


class NonFiniteError(InputError):
    """A weight holds NaN or Inf."""

    def __init__(self, tensor: str, index: tuple[int, ...], count: int, where: str) -> None:
        """Name the tensor, the first bad index, how many values are bad, and the file."""
        super().__init__(
            f"{tensor}: {count} non-finite value{'s' if count != 1 else ''} (NaN or Inf), the first at index "
            f"{list(index)}, in {where}. The checkpoint is damaged or was saved after a diverged run: "
            "download it again or repair that tensor."
        )
        self.tensor, self.index, self.count = tensor, index, count


class CorruptFileError(InputError):
    """A file is truncated, edited or contradicts itself."""


class UnknownArchitecture(InputError):
    """No reader or exporter knows this model family."""


class ValidationFailed(AnyquantError):
    """A measured value is outside its gate."""

    exit_code = 4


class MissingDependency(AnyquantError):
    """An optional package is missing."""

    exit_code = 5

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        """Say what needs which package, and the pip command: the extra's, or the package's own where extra is ""."""
        command = f"pip install 'anyquant[{extra}]'" if extra else f"pip install {package}"
        super().__init__(f"{purpose} needs the package {package!r}. Install it with: {command}")
        self.package, self.extra = package, extra


class MachineError(AnyquantError):
    """Disk, memory or GPU is not sufficient."""

    exit_code = 6


class Interrupted(AnyquantError):
    """Ctrl-C, and what was done is kept.

    Attributes:
        resume: whether the command goes on with the option --resume; else just when it is repeated.
    """

    exit_code = 130

    def __init__(self, kept: str, *, resume: bool) -> None:
        """Say where it is kept."""
        super().__init__(f"interrupted; what was done is kept in {kept}.")
        self.resume = resume
