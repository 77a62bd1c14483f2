"""Which rows of which IR tensors each initializer of the graph holds, found by names and shapes.

The graph source names initializers by module ("model.layers.0.attn.qkv_proj.MatMul.weight"), packs projections that
read the same input into one matrix, and cuts matrices that a checkpoint holds packed. What is found here is a claim;
the exporter proves it by value before it writes anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Rows start to stop of an IR tensor (elements, for a vector)."""

    tensor: str
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Binding:
    """An initializer is the concatenation of parts along rows.

    Attributes:
        initializer: its name.
        transposed: it holds [in, out].
        parts: what it is made of.
        addend: what the graph source added to every value (1 to the norms of Gemma).
    """

    initializer: str
    transposed: bool
    parts: tuple[Part, ...]
    addend: float = 0.0


_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.|(?:^|\.)(?:h|blocks)\.(\d+)\.")

# Module name in the graph -> names in checkpoints, or several whose rows are concatenated.
_SAME: dict[str, tuple[str, ...]] = {
    "o_proj": ("o_proj", "out_proj", "dense", "wo"),
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3"),
    "down_proj": ("down_proj", "w2"),
    "q_norm": ("q_norm", "q_layernorm"),
    "k_norm": ("k_norm", "k_layernorm"),
    "q_layernorm": ("q_norm", "q_layernorm"),
    "k_layernorm": ("k_norm", "k_layernorm"),
    "embed_tokens": ("embed_tokens", "wte", "tok_embeddings", "word_embeddings"),
    "final_norm_layernorm": ("norm", "final_layernorm", "ln_f"),
    "lm_head": ("lm_head", "output", "embed_out"),
}
_PACKED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_CUT: dict[str, tuple[str, int]] = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[1] or found[2]) if found else None


def _module(name: str) -> tuple[int | None, str, str]:
    """(layer, last module name, "weight" or "bias"); the graph's operator names are dropped."""
    stem, _, leaf = re.sub(r"\.(MatMul|Add|layernorm)\.(weight|bias)$", r".\2", name).rpartition(".")
    module = stem.rpartition(".")[2]
    return (None if module == "final_norm_layernorm" else _layer(name)), module, leaf


def bind(
    initializers: Mapping[str, Shape], tensors: Mapping[str, Shape], aliases: Mapping[str, str]
) -> dict[str, Binding]:
    """Initializer name -> binding, for those whose parts are found by name and fit by shape.

    Args:
        initializers: name -> shape of the graph's float initializers.
        tensors: IR name -> shape.
        aliases: tied name -> IR name.
    """
    index: dict[tuple[int | None, str, str], str] = {}
    ambiguous: set[tuple[int | None, str, str]] = set()
    for name in tensors:
        key = _module(name)
        (ambiguous.add(key) if key in index else index.__setitem__(key, name))
    for alias, target in aliases.items():
        index.setdefault(_module(alias), target)
    for key in ambiguous:
        del index[key]
    bindings: dict[str, Binding] = {}
    for initializer, shape in initializers.items():
        for candidate in _candidates(_module(initializer), index, tensors):
            transposed = _fits(initializer, shape, candidate, tensors)
            if transposed is not None:
                bindings[initializer] = Binding(initializer, transposed, candidate)
                break
    return bindings


def left_out(tensor: str, unbound: Iterable[str]) -> bool:
    """Whether no initializer of unknown origin lies in the tensor's layer and is a weight or bias as it is."""
    layer, _, leaf = _module(tensor)
    return all((layer, leaf) != _module(name)[::2] for name in unbound)


def _candidates(
    key: tuple[int | None, str, str], index: Mapping[tuple[int | None, str, str], str], tensors: Mapping[str, Shape]
) -> list[tuple[Part, ...]]:
    layer, module, leaf = key
    found: list[tuple[Part, ...]] = []

    def look_up(name: str) -> str | None:
        return next((index[layer, n, leaf] for n in _SAME.get(name, (name,)) if (layer, n, leaf) in index), None)

    def whole(name: str) -> Part:
        return Part(name, 0, tensors[name][0] if tensors[name] else 1)

    same = look_up(module)
    if same is None and module == "lm_head" and leaf == "weight":
        layer, same = None, look_up("embed_tokens")
    if same is not None:
        found.append((whole(same),))
    names = [look_up(n) for n in _PACKED.get(module, ())]
    if names and all(names):
        found.append(tuple(whole(n) for n in names if n))
    if module in _CUT and (packed := look_up(_CUT[module][0])) is not None:
        half = tensors[packed][0] // 2
        found.append((Part(packed, half * _CUT[module][1], half * (_CUT[module][1] + 1)),))
    return found


def _fits(initializer: str, shape: Shape, parts: tuple[Part, ...], tensors: Mapping[str, Shape]) -> bool | None:
    """Whether the parts fill the shape as [out, in] (False), as [in, out] (True), or not at all (None)."""
    rest = {tensors[p.tensor][1:] for p in parts}
    if len(rest) != 1:
        return None
    filled = (sum(p.rows for p in parts), *rest.pop())
    matmul = initializer.endswith(".MatMul.weight")
    if matmul and len(filled) == 2:
        return True if shape == filled[::-1] else None
    if shape == filled or (len(filled) == 1 and prod(shape) == filled[0]):
        return False
    return None
