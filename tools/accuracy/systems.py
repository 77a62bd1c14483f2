"""What the benchmark runs: anyquant's methods and baselines as its command line takes them, and the papers' claims."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from anyquant.errors import UsageError

TARGETS = (2.3, 2.5, 3.0, 3.3, 3.5, 4.0, 4.5)
"""Counted bits per weight that every method is asked for."""

CHAMPION = "skim --refine"
"""The method that most peers are beaten by."""

CHALLENGERS = (CHAMPION, "affine --refine --set widths=4")
"""Methods that are asked in turn for the bits of each peer that no other target beats; where rows are short, codebooks
are dear and grids of 4 bits may be ahead."""

METHODS = ("skim", CHAMPION, "claq", "cmpq", "block", "affine", "affine --refine", "ggml")

VARIANTS = (
    "skim --refine --row-groups 4",
    "skim --refine --sequential",
    "claq --refine",
    "cmpq --refine",
    "block --set format=minifloat",
)
"""Settings of the methods that are asked for fewer targets, or the benchmark would take a day; rounding as well."""

VARIANT_TARGETS = (2.5, 3.3)
"""Unless others are asked for."""

_KMEANS = "skim --allocation uniform --importance fisher --set shared=0"
BASELINES = {
    "rounding": "affine --set feedback=no --set clip=no",
    "weighted k-means (SqueezeLLM dense)": _KMEANS,
    "weighted k-means, .5 % outliers (SqueezeLLM)": f"{_KMEANS} --outliers 0.5 --set outlier_rule=magnitude",
}
"""Label -> how anyquant is told to do it."""

CODE_BITS = (2, 3, 4)
"""Bits of a code: what methods with one width for all rows are asked for. Their counted bits follow."""

SKIM_PAPER = "SKIM as published"
SKIM_ABLATIONS = {
    f"{SKIM_PAPER} but one width": "--allocation uniform",
    f"{SKIM_PAPER} but widths by S-diag": "--set objective=diag",
    f"{SKIM_PAPER} but unscaled": "--set scale=off",
    f"{SKIM_PAPER} but gradients of rows": "--importance gradient",
}
"""Label -> what it changes of the published method: which part of it pays on this model."""

SKIM_INDEX = "skim --count index"
CMPQ_PAPER = "CMPQ as published"
CLAQ_PAPER = "CLAQ as published"
CLAQ_IN_SEQUENCE = f"{CLAQ_PAPER}, sequential"
W6A6 = "BFP W6A6"
KMEANS = "weighted k-means (SqueezeLLM dense)"


@dataclass(frozen=True)
class System:
    """Something that makes a quantized model.

    Attributes:
        name: of its row, unique.
        role: "method", "baseline", "claim" (a paper's setting) or "peer".
        arguments: of ``anyquant quantize``, without model, output and calibration; none for a peer.
        label: without the target, the same at all of them.
        activations: format that the model's activations are rounded to while it is measured.
    """

    name: str
    role: str
    arguments: tuple[str, ...] = ()
    label: str = ""
    activations: str | None = None

    @property
    def slug(self) -> str:
        """Name of its files."""
        words = re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")
        return f"{words[:80]}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"


def method(label: str, bits: float, *, role: str = "method", command: str | None = None) -> System:
    """A setting of anyquant at so many counted bits."""
    arguments = ("--method", *(command or label).split(), "--bits", f"{bits:g}")
    return System(f"{label} @ {bits:g}", role, arguments, label)


def by_codes(label: str, bits: float, command: str, role: str, activations: str | None = None) -> System:
    """A setting of anyquant at so many bits of a code, as the papers count."""
    arguments = ("--method", *command.split(), "--count", "index", "--bits", f"{bits:g}")
    return System(f"{label} @ {bits:g} of codes", role, arguments, label, activations)


def ours(targets: Sequence[float] = TARGETS) -> list[System]:
    """Everything that anyquant itself runs, baselines and claims included."""
    found = [method(label, bits) for label in METHODS for bits in targets]
    fewer = VARIANT_TARGETS if tuple(targets) == TARGETS else targets
    found += [method(label, bits) for label in VARIANTS for bits in fewer]
    for label, command in BASELINES.items():
        if "--allocation uniform" in command:
            found += [by_codes(label, bits, command, "baseline") for bits in CODE_BITS]
        else:
            found += [method(label, bits, role="baseline", command=command) for bits in fewer]
    return [*found, *claims()]


def claims() -> list[System]:
    """The papers' settings, in the papers' accounting, and ours in the same."""
    paper = "{} --profile paper"
    return [
        by_codes(SKIM_PAPER, 3, paper.format("skim"), "claim"),
        *(by_codes(label, 3, f"{paper.format('skim')} {words}", "claim") for label, words in SKIM_ABLATIONS.items()),
        by_codes(SKIM_INDEX, 3, "skim", "claim"),
        by_codes(CMPQ_PAPER, 2, paper.format("cmpq"), "claim"),
        by_codes(CMPQ_PAPER, 2.2, paper.format("cmpq"), "claim"),
        by_codes(CLAQ_PAPER, 2.05, paper.format("claq"), "claim"),
        by_codes(CLAQ_IN_SEQUENCE, 2.05, f"{paper.format('claq')} --sequential", "claim"),
        by_codes(W6A6, 6, "block --block 16 --allocation uniform", "claim", activations="bfp6"),
    ]


def peer(name: str) -> System:
    """A quantizer that is not anyquant's."""
    return System(name, "peer", label=name)


def matches(system: System, patterns: Sequence[str]) -> bool:
    """Whether the name matches one of the patterns (the shell's * and ?)."""
    return any(fnmatchcase(system.name, pattern) for pattern in patterns)


def chosen(systems: Iterable[System], patterns: Sequence[str]) -> list[System]:
    """Those that match one of the patterns; all without patterns.

    Raises:
        UsageError: a pattern matches none.
    """
    found = list(systems)
    for pattern in patterns:
        if not any(matches(system, [pattern]) for system in found):
            raise UsageError(f"--systems: {pattern!r} matches none of: {'; '.join(system.name for system in found)}")
    return [system for system in found if not patterns or matches(system, patterns)]


def at_bits_of(peer_bits: float) -> float:
    """A target of at most a peer's bits, in four decimals."""
    return math.floor(peer_bits * 10_000 + 1e-6) / 10_000
