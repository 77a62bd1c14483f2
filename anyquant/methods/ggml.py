"""Stock types of ggml, one per matrix, by ggml's own quantizer with our importances.

Source: the quantizers of ggml (``ggml_quantize_chunk``; package ``libggml-python``), and llama.cpp's importance
matrices, E[x_j^2] of each column. llama.cpp gives types by rules of thumb; here each matrix takes the type that a
budget of the whole model leaves it, by measured loss: what llama.cpp's users ask for as ``--target-bpw`` (pull request
15550 of ggml-org/llama.cpp).

Types come in blocks of 32 or of 256 weights. Rows that are no multiple of 256 take those of 32 alone, which ggml's own
tool then chooses silently; :meth:`GgmlMethod.notes` says which matrices these are, and types that were asked for by
name and that a matrix cannot take are refused.

Weighting. ggml multiplies an importance by sqrt(sigma^2 + w^2), sigma^2 being the mean square of the row or block, as
if large weights counted more. ``weighting=exact`` undoes that with an importance of its own for each row, so that the
quantizer minimizes the very error by which types are compared; it also takes S-diag as it is. Measured on SmolLM2-135M
(a down projection, weighted squared error, relative): IQ2_XXS .115 -> .106, Q2_K .070 -> .067, IQ3_S .0185 -> .0177,
Q4_0 .0078 -> .0077, IQ4_NL .0060 -> .0059. KL to the dithered source, all matrices in Q4_0: .234 -> .216, a paired
difference of .018 +- .003 over ten windows of 512 tokens. Without statistics an importance of 1 is better than none in
just the same way: IQ3_S .0296 -> .0191, Q2_K .094 -> .073. sigma is the row's for every type: with that of blocks of
256 or 32, and with sigma^2 doubled, as one type or another has it, errors differ by .3 % or are larger (IQ1 by 2 %).
``weighting=ggml`` (also in the profile "paper") is what llama.cpp does.

Measuring takes seconds per million weights where rows take all types. ``sample=4`` takes a quarter of that, but few
rows of a query projection lose most of it: errors of layer 5's came out 1.5 times too large, an MLP's within 7 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anyquant.errors import MissingDependency, UsageError
from anyquant.ir import GGML_TYPES, GGMLSpec, Tensor
from anyquant.methods.importance import Importance, chunks
from anyquant.methods.options import Option, complete
from anyquant.methods.protocol import Floats, JobDefaults, LevelArray, Levels, Method, Settings
from anyquant.runtime import libggml

if TYPE_CHECKING:
    from anyquant.calibration import MatrixStatistics

AUTO = "auto"
_AUTO = {
    256: ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
    32: ("MXFP4", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
}
"""What rows of a multiple of so many weights are offered: no type that another of at most its bytes outdoes."""

_BETTER_FIRST = (
    "IQ2_XXS", "TQ2_0", "IQ3_S", "Q3_K", "IQ4_XS", "MXFP4", "Q4_K", "IQ4_NL", "Q4_0", "Q5_K", "Q5_0",
)  # fmt: skip
"""Types of equal size, the one that measured best first; the others have a size of their own."""

_UNWEIGHTED = ("Q6_K",)  # takes importances as they are
_IGNORANT = ("Q8_0", "MXFP4", "TQ1_0", "TQ2_0")  # take none


class GgmlMethod(Method):
    """A stock ggml type per matrix."""

    name = "ggml"
    summary = "stock ggml types, one per matrix by measured loss"
    options = (
        Option("types", AUTO, "types to choose from, with commas between; auto offers the best of each size"),
        Option("importance_matrix", True, "weight errors by the inputs of a calibration text"),
        Option(
            "weighting",
            "exact",
            "exact weights errors by importance alone; ggml counts large weights more, as llama.cpp does",
            ("exact", "ggml"),
            paper="ggml",
        ),
        Option("sample", 1, "errors are measured on one row of so many, which is faster", low=1, high=64),
    )

    def settings(self, options: Settings, bits: float | None = None) -> dict[str, Any]:
        """Complete and check the options; types in the order of their size.

        Raises:
            UsageError: unknown option, value or type.
            MissingDependency: libggml-python is not installed.
        """
        settings = complete(self.name, self.options, options)
        if settings["types"] != AUTO:
            settings["types"] = ",".join(_parse(settings["types"]))
        if not libggml.available():
            raise MissingDependency(libggml.PACKAGE, libggml.EXTRA, "quantizing to stock ggml types")
        return settings

    def needs_statistics(self, settings: Settings) -> bool:
        """With the option importance_matrix."""
        return bool(settings["importance_matrix"])

    def wants_moments(self, settings: Settings) -> str:
        """Nothing does."""
        return ""

    def defaults(self, settings: Settings) -> JobDefaults:
        """A budget of the whole model; importances of llama.cpp are those of activations."""
        return JobDefaults("activation" if settings["profile"] == "paper" else "gradient", "model")

    def notes(self, shapes: Mapping[str, tuple[int, int]], settings: Settings) -> list[str]:
        """What a user should know of matrices, name -> [out, in], whose rows rule some types out."""
        wanted = _AUTO[256] if settings["types"] == AUTO else settings["types"].split(",")
        long = [name for name in wanted if GGML_TYPES[name][0] == 256]
        lengths = sorted({columns for _, columns in shapes.values() if columns % 256})
        if not long or not lengths:
            return []
        count = sum(columns % 256 != 0 for _, columns in shapes.values())
        offered = list(dict.fromkeys(name for columns in lengths for name in _offered((1, columns), settings)))
        return [
            f"{count} of {len(shapes)} matrices have rows of {_listed(lengths)} weights, no multiple of 256, and "
            f"cannot take {_listed(long)}: they choose from {_listed(offered)}."
        ]

    def levels(self, shape: tuple[int, int], settings: Settings) -> Levels:
        """The types on offer by size. ``--count index`` counts all of a block too: its codes are never counted alone.

        Raises:
            UsageError: the matrix can take none; says which length of rows would be needed.
        """
        nbytes = tuple(GGMLSpec(shape, name).nbytes for name in _offered(shape, settings))
        return Levels(1, nbytes, nbytes)

    def spec(self, shape: tuple[int, int], chosen: LevelArray, settings: Settings) -> GGMLSpec:
        """The form of a matrix of this type."""
        return GGMLSpec(shape, _offered(shape, settings)[int(chosen[0])])

    def errors(self, weight: Floats, statistics: MatrixStatistics | None, settings: Settings) -> NDArray[np.float64]:
        """Weighted squared error of each type, float64 [1, types]: rows are quantized to all of them.

        Of sampled rows, all of them are taken to lose the same part of their weighted squares.
        """
        importance = Importance(weight, statistics if settings["importance_matrix"] else None)
        names = _offered((weight.shape[0], weight.shape[1]), settings)
        totals, sampled, power = np.zeros(len(names)), 0.0, 0.0
        step = int(settings["sample"])
        for rows in chunks(weight):
            power += _sum(importance.whole(rows), weight[rows])
        for rows in chunks(weight, np.arange(0, len(weight), step)):
            values, counted = np.ascontiguousarray(weight[rows]), importance.whole(rows)
            sampled += _sum(counted, values)
            for level, name in enumerate(names):
                blocks = _quantize(values, name, _weights(values, name, importance, rows, settings))
                totals[level] += _sum(counted, values - libggml.library().dequantize(blocks, name))
        share = power / sampled if sampled > 0 else 1.0
        return totals[None] * (share * importance.scale(weight))

    def quantize(
        self, weight: Floats, chosen: LevelArray, statistics: MatrixStatistics | None, settings: Settings
    ) -> Tensor:
        """The blocks of float32 [out, in] in this type.

        Raises:
            InputError: weights too large for the type's FP16 scales.
        """
        spec = self.spec((weight.shape[0], weight.shape[1]), chosen, settings)
        importance = Importance(weight, statistics if settings["importance_matrix"] else None)
        blocks = np.empty(spec.arrays()[".blocks"][1], np.uint8)
        for rows in chunks(weight):
            values = np.ascontiguousarray(weight[rows])
            blocks[rows] = _quantize(values, spec.type, _weights(values, spec.type, importance, rows, settings))
        return Tensor(spec, {".blocks": blocks})


def _parse(text: str) -> list[str]:
    """Names of types, smallest first, those of equal size in the order of _BETTER_FIRST.

    Raises:
        UsageError: one of them is no type that there is.
    """
    names = [part.strip().upper() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in GGML_TYPES]
    if unknown or not names:
        raise UsageError(
            f"the option types of the method ggml is {text!r}: there is no type {(unknown or [''])[0]!r}. "
            f"Write {AUTO}, or some of {', '.join(_by_size(GGML_TYPES))}."
        )
    return _by_size(names)


def _by_size(names: Iterable[str]) -> list[str]:
    def rank(name: str) -> tuple[float, int]:
        length, size = GGML_TYPES[name]
        return size / length, _BETTER_FIRST.index(name) if name in _BETTER_FIRST else 0

    return sorted(dict.fromkeys(names), key=rank)


def _offered(shape: tuple[int, int], settings: Settings) -> list[str]:
    """The types that a matrix can choose from, by size, one of each.

    Raises:
        UsageError: none.
    """
    columns = shape[1]
    if settings["types"] == AUTO:
        names: Iterable[str] = next((types for length, types in _AUTO.items() if columns % length == 0), ())
        wanted = "any ggml type"
    else:
        names = settings["types"].split(",")
        wanted = " or ".join(f"{name} (blocks of {GGML_TYPES[name][0]})" for name in names)
    fitting = [name for name in _by_size(names) if columns % GGML_TYPES[name][0] == 0]
    by_size: dict[int, str] = {}
    for name in fitting:
        by_size.setdefault(GGMLSpec(shape, name).nbytes, name)
    if by_size:
        return list(by_size.values())
    if columns % 32:
        raise UsageError(
            f"a matrix of shape {list(shape)} cannot take {wanted}: its rows of {columns} weights are no multiple of "
            "32, the shortest block. Use another method: skim and block take any shape."
        )
    raise UsageError(
        f"a matrix of shape {list(shape)} cannot take {wanted}: its rows of {columns} weights are no multiple of 256. "
        f"Add a type with blocks of 32 to types, such as IQ4_NL, or leave types at {AUTO}."
    )


def _weights(values: Floats, name: str, importance: Importance, rows: Any, settings: Settings) -> Floats | None:
    """What ggml is given as importances of some rows: float32 [in] or [rows, in], of mean 1; None for nothing.

    A factor that all of a row has in common changes nothing.
    """
    if name in _IGNORANT:
        return None
    if settings["weighting"] == "ggml":
        if not settings["importance_matrix"]:
            return None
        return _normal(importance.rows(rows, np.empty(0, np.int64)))
    shared = importance.rows(rows, np.empty(0, np.int64))
    if name in _UNWEIGHTED:
        return _normal(shared)
    square = values.astype(np.float64) ** 2
    sigma = np.maximum(square.mean(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return _normal((shared / np.sqrt(1 + square / sigma)).astype(np.float32))


def _normal(importance: Floats) -> Floats:
    """Divided by the mean of each row, lest tiny ones vanish in ggml's FP32 sums."""
    mean = importance.mean(axis=-1, dtype=np.float64, keepdims=True)
    return (importance / np.where(mean > 0, mean, 1)).astype(np.float32)


def _quantize(values: Floats, name: str, weights: Floats | None) -> NDArray[np.uint8]:
    return libggml.library().quantize(values, name, weights)


def _sum(importance: Floats, values: Floats) -> float:
    return float(np.einsum("ij,ij,ij->", importance, values, values, dtype=np.float64))


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))
