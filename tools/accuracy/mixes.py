"""llama.cpp's mixes: which ggml type llama-quantize gives to which matrix, where there is an importance matrix.

Source: llama.cpp, src/llama-quant.cpp (as llama-cpp-python 0.3.36 has it), for dense models that are neither Falcon nor
of 70 billion parameters. What it does, in three steps:

1. A mix has a default type, and exceptions by the role of a matrix and by its layer; many hold only for models with
   at least four query heads to a key head ("grouped" below).
2. Where rows are no multiple of the type's block, another type takes its place: IQ1 to IQ3 and IQ4_XS become IQ4_NL,
   Q2_K and Q3_K become Q4_0, Q4_K becomes Q5_0, Q5_K becomes Q5_1, Q6_K becomes Q8_0.
3. Where that does not fit either, F16.

Embeddings and the output head are not part of this: the benchmark leaves them as they are for everyone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from accuracy import ggml
from accuracy.interface import Contender, Peer, Shape
from anyquant.errors import UsageError
from anyquant.ir import GGML_TYPES


@dataclass(frozen=True)
class Model:
    """What the choice depends on.

    Attributes:
        layers: number of blocks.
        gqa: query heads to a key head.
    """

    layers: int
    gqa: int

    @property
    def grouped(self) -> bool:
        """Whether at least four query heads share a key head."""
        return self.gqa >= 4


Rule = Callable[[int, Model], str | None]
"""(layer, model) -> the type; None where the default holds."""

_FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def _always(name: str) -> Rule:
    return lambda layer, model: name


def _grouped(name: str, otherwise: str | None = None) -> Rule:
    return lambda layer, model: name if model.grouped else otherwise


def _first(part: int, name: str, otherwise: str | None = None) -> Rule:
    """In the first of so many parts of the layers."""
    return lambda layer, model: name if layer < model.layers // part else otherwise


def _below(count: int, name: str, otherwise: str | None = None) -> Rule:
    """In the first so many layers."""
    return lambda layer, model: name if layer < count else otherwise


def _middle(name: str) -> Rule:
    """Between the first and the last eighth of the layers."""
    return lambda layer, model: name if model.layers // 8 <= layer < 7 * model.layers // 8 else None


def _more(name: str) -> Rule:
    """In the first and the last eighth, and in every third layer between them."""

    def rule(layer: int, model: Model) -> str | None:
        eighth = model.layers // 8
        return name if layer < eighth or layer >= 7 * model.layers // 8 or (layer - eighth) % 3 == 2 else None

    return rule


_SMALL = {"v": _grouped("Q4_K", "Q2_K"), "down": _first(8, "Q2_K")}
_MEDIUM = {"v": _grouped("Q4_K", "IQ3_S"), "down": _first(8, "IQ3_S"), "o": _always("IQ3_S")}

MIXES: Mapping[str, tuple[str, Mapping[str, Rule]]] = {
    "IQ1_S": ("IQ1_S", {**_SMALL, "o": _always("IQ2_XXS")}),
    "IQ1_M": ("IQ1_M", {**_SMALL, "o": _always("IQ2_XXS")}),
    "IQ2_XXS": ("IQ2_XXS", _SMALL),
    "IQ2_XS": ("IQ2_XS", _SMALL),
    "IQ2_S": ("IQ2_XS", _MEDIUM),
    "IQ2_M": ("IQ2_S", _MEDIUM),
    "Q2_K_S": ("Q2_K", {"v": _grouped("Q4_K"), "down": _first(8, "Q4_K")}),
    "Q2_K": ("Q2_K", {"v": _grouped("Q4_K", "Q3_K"), "down": _always("Q3_K"), "o": _always("Q3_K")}),
    "IQ3_XXS": (
        "IQ3_XXS",
        {"v": _grouped("Q4_K"), "q": _always("IQ2_S"), "k": _always("IQ2_S"), "o": _always("IQ3_S")},
    ),
    "IQ3_XS": (
        "IQ3_S",
        {
            "v": _grouped("Q4_K"),
            "q": _always("IQ3_XXS"),
            "k": _always("IQ3_XXS"),
            "gate": _middle("IQ3_XXS"),
            "up": _middle("IQ3_XXS"),
        },
    ),
    "IQ3_S": ("IQ3_S", {"v": _grouped("Q4_K")}),
    "IQ3_M": ("IQ3_S", {"v": _always("Q4_K"), "down": _first(8, "Q4_K"), "o": _always("Q4_K")}),
    "Q3_K_S": ("Q3_K", {}),
    "Q3_K_M": ("Q3_K", {"v": _below(2, "Q5_K", "Q4_K"), "down": _first(16, "Q5_K", "Q4_K"), "o": _always("Q4_K")}),
    "Q3_K_L": ("Q3_K", dict.fromkeys(("v", "down", "o"), _always("Q5_K"))),
    "IQ4_XS": ("IQ4_XS", {"v": _grouped("Q5_K")}),
    "IQ4_NL": ("IQ4_NL", {"v": _grouped("Q5_K")}),
    "Q4_0": ("Q4_0", {"down": _first(8, "Q4_1")}),
    "Q4_1": ("Q4_1", {}),
    "Q4_K_S": ("Q4_K", {"v": _below(4, "Q5_K"), "down": _first(8, "Q5_K")}),
    "Q4_K_M": ("Q4_K", {"v": _more("Q6_K"), "down": _more("Q6_K")}),
}
"""Name of a mix -> default type, and role -> exception."""

_ROLES = {
    "q": r"(self_attn\.q_proj|attention\.self\.query)\.weight$",
    "k": r"(self_attn\.k_proj|attention\.self\.key)\.weight$",
    "v": r"(self_attn\.v_proj|attention\.self\.value)\.weight$",
    "o": r"(self_attn\.o_proj|attention\.output\.dense)\.weight$",
    "gate": r"mlp\.gate_proj\.weight$",
    "up": r"(mlp\.up_proj|intermediate\.dense)\.weight$",
    "down": r"(mlp\.down_proj|(?<!attention\.)output\.dense)\.weight$",
}


def role_and_layer(name: str) -> tuple[str, int]:
    """What a matrix of a llama-like model or of BERT is, from its name in a Hugging Face checkpoint.

    Returns:
        One of q, k, v, o, gate, up, down; and the number of its layer.

    Raises:
        UsageError: none of these.
    """
    layer = re.search(r"\blayers?\.(\d+)\.", name)
    role = next((role for role, pattern in _ROLES.items() if re.search(pattern, name)), None)
    if role is None or layer is None:
        raise UsageError(f"llama.cpp's mixes are known for matrices of llama-like models and of BERT, not for {name!r}")
    return role, int(layer[1])


def type_of(mix: str, role: str, layer: int, columns: int, model: Model) -> str:
    """The ggml type of a matrix in a mix.

    Args:
        mix: of :data:`MIXES`.
        role: as :func:`role_and_layer` names it.
        layer: its number, from 0.
        columns: of the matrix.
        model: that it is part of.
    """
    default, exceptions = MIXES[mix]
    chosen = (role in exceptions and exceptions[role](layer, model)) or default
    if columns % GGML_TYPES[chosen][0] and chosen in _FALLBACK:
        chosen = _FALLBACK[chosen]
    return "F16" if columns % GGML_TYPES[chosen][0] else chosen


def mixed(mix: str, model: Model) -> Contender:
    """A mix as llama-quantize makes it.

    Raises:
        MissingDependency: libggml-python is not installed.
    """

    def peer(name: str, shape: Shape) -> Peer:
        role, layer = role_and_layer(name)
        return ggml.ggml(type_of(mix, role, layer, shape[1], model))

    return Contender(f"llama.cpp {mix}", peer)
