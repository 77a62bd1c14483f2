"""What is asked for: a target, and how it is to be met."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from anyquant import __version__
from anyquant.calibration import CalibrationSettings
from anyquant.calibration.settings import GRADIENT_FREE
from anyquant.checkpoint import Checkpoint
from anyquant.errors import UsageError
from anyquant.methods import get_method
from anyquant.workers import default_workers

ALLOCATIONS = ("model", "matrix", "uniform")
SEARCHES = ("greedy", "tpe")


@dataclass(frozen=True)
class Target:
    """How large the result is to be: bits per weight of the quantized matrices, or bytes of a file.

    Attributes:
        bits: counted bits per weight, over the quantized matrices; exclusive with ``size``.
        size: most bytes of the written model, side files such as the tokenizer not counted.
        size_of: what ``size`` is the size of: "ir", or the name of an exporter.
        count: "all" stored bytes, or "index": codes alone, as the papers count.
    """

    bits: float | None = None
    size: int | None = None
    size_of: str = "ir"
    count: str = "all"

    def __post_init__(self) -> None:
        """Check that exactly one of bits and size is given.

        Raises:
            UsageError: both, none, or a value that is no size.
        """
        if (self.bits is None) == (self.size is None):
            raise UsageError("give exactly one of --bits and --size.")
        if self.bits is not None:
            object.__setattr__(self, "bits", float(self.bits))  # 3 is recorded as 3.0 is
        if self.bits is not None and not 0 < self.bits < 64:
            raise UsageError(f"--bits is {self.bits}, must be a positive number of bits per weight.")
        if self.bits is not None and self.size_of != "ir":
            raise UsageError(f"--for {self.size_of} says what --size is the size of; it has no meaning with --bits.")
        if self.size is not None and self.count != "all":
            raise UsageError(f"--count {self.count} says what --bits counts; it has no meaning with --size.")


@dataclass(frozen=True)
class Job:
    """What is to be done to a checkpoint.

    Attributes:
        method: name of the method.
        target: how large the result is to be.
        options: of the method.
        quantize_embeddings: whether embeddings and head are included.
        allocation: which units compete for bits: those of the whole "model", those of each "matrix", or none
            ("uniform": all have the same level). Unless given it is the model, but each matrix where errors do not
            compare across matrices: weighted by activations alone, of outputs without gradients, or an order.
        calibration: the texts that statistics are taken on, and what is recorded of them; see
            :attr:`calibration_settings`. Of no account where neither the method nor ``refine`` needs statistics.
        refine: whether codes, and codebooks or scales, are refined for the outputs of their matrix at last.
        sequential: whether matrices are quantized in the order of the model, each for the inputs that it has with all
            those before it quantized.
        search: how the bits of matrices are found: "greedy", by measured errors, or "tpe", by trials after that.
        trials: of the search.
        workers: threads.
    """

    method: str
    target: Target
    options: dict[str, Any] = field(default_factory=dict)
    quantize_embeddings: bool = False
    allocation: str | None = None
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    refine: bool = False
    sequential: bool = False
    search: str = "greedy"
    trials: int = 64
    workers: int = field(default_factory=default_workers)

    def __post_init__(self) -> None:
        """Check the allocation and the settings of the calibration, and that it records what is needed.

        Raises:
            UsageError: out of range, or what the method cannot have or do with.
        """
        if self.sequential and not self.needs_statistics:
            raise UsageError(f"--sequential has no meaning for the method {self.method} here: it needs no text.")
        if self.allocation is not None and self.allocation not in ALLOCATIONS:
            raise UsageError(f"--allocation is {self.allocation!r}, must be one of {', '.join(ALLOCATIONS)}.")
        if self.allocation == "model" and not self.has_losses:
            raise UsageError(
                f"--allocation model compares errors of all matrices; what {self.method} measures with these settings "
                "is for use within a matrix alone. Leave it out: each matrix has its own budget then."
            )
        if self.search not in SEARCHES or self.trials < 1:
            raise UsageError(f"--search is {self.search!r} with {self.trials} trials, must be greedy or tpe with some.")
        self.calibration_settings.check()
        if not self.calibration_settings.has_moments and self.needs_statistics:
            wanting = "--refine" if self.refine else get_method(self.method).wants_moments(self.settings)
            if wanting:
                raise UsageError(
                    f"--importance norms records the mean square of each input alone, and {wanting} needs how inputs "
                    "go together: take --importance activation or gradient."
                )

    @property
    def calibration_settings(self) -> CalibrationSettings:
        """The calibration with what it records: unless it says so, what the method wants with these options."""
        wanted = get_method(self.method).defaults(self.settings).importance
        return self.calibration.resolved("activation" if self.refine and wanted == "norms" else wanted)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the method.

        Raises:
            UsageError: a bad option.
        """
        codes = self.target.bits if self.target.count == "index" else None
        return get_method(self.method).settings(self.options, codes)

    @property
    def scope(self) -> str:
        """The allocation that was asked for, or the one that suits the importance."""
        apart = self.needs_statistics and not (self.has_gradients and self.has_losses)
        default = get_method(self.method).defaults(self.settings).allocation
        return self.allocation or default or ("matrix" if apart else "model")

    @property
    def needs_statistics(self) -> bool:
        """Whether the method wants a calibration, or what refines its result."""
        return self.refine or get_method(self.method).needs_statistics(self.settings)

    @property
    def has_gradients(self) -> bool:
        """Whether gradients weight the errors, so that their sum is a rise of the loss in nats."""
        return self.needs_statistics and self.calibration_settings.importance not in GRADIENT_FREE

    @property
    def has_losses(self) -> bool:
        """Whether what is measured is a loss; see :meth:`anyquant.methods.Method.has_losses`."""
        return get_method(self.method).has_losses(self.settings, str(self.calibration_settings.importance))

    def identity(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """All that statistics and measured errors depend on, as JSON: what a work folder belongs to."""
        return {
            "anyquant": __version__,
            "model": checkpoint.fingerprint(),
            "method": self.method,
            "settings": self.settings,
            "quantize_embeddings": self.quantize_embeddings,
            "calibration": self.calibration_settings.identity() if self.needs_statistics else None,
        }

    def recorded_target(self) -> dict[str, Any]:
        """The target as JSON, without what was not asked for."""
        target = {key: value for key, value in vars(self.target).items() if value is not None}
        asked: dict[str, Any] = {key: True for key in ("refine", "sequential") if getattr(self, key)}
        if self.search != "greedy":
            asked |= {"search": self.search, "trials": self.trials}
        return {**target, "allocation": self.scope, **asked}
