"""What a calibration is asked to do."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from anyquant.errors import InputError, UsageError

SELF = "self"
IMPORTANCE = ("gradient", "norms", "activation", "fisher")
"""What is recorded; see CalibrationSettings."""
GRADIENT_FREE = ("norms", "activation")
"""Without gradients errors of different matrices do not compare."""
LEARNED_TOKENS = 2048
"""Enough for a gradient of each row."""
DOCUMENTS = 2
"""Sampled for a window: many short documents are more diverse than few long ones, and larger batches are faster."""
SAMPLED_TOKENS = 8192
"""Sampled in one batch, at most: their keys and values are in memory."""
_DATASET = re.compile(r"[\w][\w.-]*(?:/[\w][\w.-]*)?(?::[\w][\w.-]*)?")
_TEXT_SUFFIXES = (".txt", ".md", ".text", ".jsonl", ".json", ".csv", ".cor", ".xml", ".gz", ".bz2", ".zst")


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings of one calibration.

    Attributes:
        source: "self" (text sampled from the model itself), a UTF-8 text file, or the id of a Hugging Face dataset
            with a column "text" ("owner/name" or "owner/name:configuration").
        windows: at most this many windows of text.
        window: tokens in each, the leading one (BOS) among them if the tokenizer puts one.
        seed: of the sampling, or of the choice of windows.
        importance: "norms" records the mean squares of the inputs x, E[x_j^2]; "activation" all their second moments,
            E[x x^T]; "gradient" also those of the gradients g of the loss at each output, E[g_i^2], on the first few
            windows; "fisher" E[g_i^2 x_j^2] for each weight. None is what the method of a job wants, else "gradient".
        row_groups: of neighbouring rows, for each of which E[g^2 x x^T] is recorded as well, with g^2 the mean over the
            group; 0 for none. It takes gradients of all windows.
    """

    source: str = SELF
    windows: int = 32
    window: int = 256
    seed: int = 0
    importance: str | None = None
    row_groups: int = 0

    def resolved(self, importance: str = "gradient") -> CalibrationSettings:
        """With an importance: its own, or this one."""
        return self if self.importance is not None else replace(self, importance=importance)

    def check(self) -> None:
        """Refuse settings out of range, before anything is loaded.

        Raises:
            UsageError: names the setting.
        """
        for name, least in (("windows", 1), ("window", 2), ("seed", 0), ("row_groups", 0)):
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"the calibration's {name} is {value}; it must be at least {least}")
        if self.importance is not None and self.importance not in IMPORTANCE:
            raise UsageError(f"--importance is {self.importance!r}; it is one of {', '.join(IMPORTANCE)}")
        if self.row_groups and self.importance in GRADIENT_FREE:
            raise UsageError(
                f"--row-groups weights tokens by gradients, and --importance {self.importance} records none: add "
                "--importance gradient (cmpq goes without unless told otherwise)."
            )

    @property
    def has_moments(self) -> bool:
        """Whether of inputs more is recorded than their mean squares."""
        return self.importance != "norms"

    @property
    def kind(self) -> str:
        """ "self", "text" or "dataset".

        Raises:
            InputError: there is no such file, and it does not look like the id of a dataset either.
        """
        if self.source == SELF:
            return "self"
        try:
            if Path(self.source).is_file():
                return "text"
        except (OSError, ValueError):
            pass
        if _DATASET.fullmatch(self.source) and not self.source.lower().endswith(_TEXT_SUFFIXES):
            return "dataset"
        raise InputError(
            f"the calibration text {self.source!r:.200} is no file and does not look like the id of a dataset "
            "('owner/name'). Give a UTF-8 text file, a dataset on the Hugging Face hub, or 'self'."
        )

    def identity(self) -> dict[str, Any]:
        """JSON of all that determines the result on a given model; of a text file, its SHA-256 instead of its path.

        Raises:
            InputError: the source is neither a readable file nor a possible dataset.
        """
        identity: dict[str, Any] = {**asdict(self.resolved()), "source": self.kind}
        if self.kind == "text":
            try:
                identity["sha256"] = hashlib.sha256(Path(self.source).read_bytes()).hexdigest()
            except OSError as error:
                raise InputError(f"cannot read the text {self.source}: {error.strerror or error}") from None
        elif self.kind == "dataset":
            identity["dataset"] = self.source
        return identity
