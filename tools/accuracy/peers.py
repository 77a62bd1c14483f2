"""All peers of the benchmark, those left out that are not installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from accuracy import ggml, half_quadratic
from accuracy.grids import GROUP, gptq, rtn
from accuracy.interface import Contender, Peer, Shape
from accuracy.mixes import MIXES, Model, mixed

HQQ, GGML = "HQQ is left out", "llama.cpp's types are left out"
WIDTHS = (2, 3, 4)
PURE = ("MXFP4", "Q4_0", "IQ4_NL")
"""Types that fit all matrices of the benchmark, for all of them; the mixes of these names make exceptions."""


def contenders(model: Model, shapes: Mapping[str, Shape], note: Callable[[str], None]) -> list[Contender]:
    """Everyone who can quantize these matrices, fewest bits first.

    Args:
        model: what llama.cpp's mixes depend on.
        shapes: of the matrices, by name.
        note: told who is missing, and why.
    """
    found = [Contender.uniform(peer) for peer in _grids()]
    # In the order of GPTQ's own code: as by default where a paper compares with that, else with ranges searched too.
    ordered = [gptq(bits, group, clipped=True) for bits in WIDTHS for group in (GROUP, None)]
    found += [Contender.uniform(peer, sequential=True) for peer in [*ordered, gptq(3, None, clipped=False)]]
    if half_quadratic.available():
        found += [Contender.uniform(half_quadratic.hqq(bits, axis=axis)) for bits in WIDTHS for axis in (1, 0)]
    else:
        note(f"{HQQ}: pip install -e '.[benchmark]'")
    if ggml.available():
        pure = [Contender.uniform(ggml.ggml(name)) for name in PURE]
        found += _distinct([*pure, *(mixed(mix, model) for mix in MIXES)], shapes, note)
    else:
        note(f"{GGML}: pip install -e '.[ggml]'")
    return sorted(found, key=lambda contender: contender.bits(shapes))


def _grids() -> list[Peer]:
    ways = [(group, clipped) for group in (GROUP, None) for clipped in (False, True)]
    return [rtn(bits) for bits in WIDTHS] + [
        gptq(bits, group, clipped=clipped) for bits in WIDTHS for group, clipped in ways
    ]


def _distinct(mixes: list[Contender], shapes: Mapping[str, Shape], note: Callable[[str], None]) -> list[Contender]:
    """Mixes that differ on these shapes: fallbacks make some of them the same."""
    kept: dict[tuple[str, ...], Contender] = {}
    for contender in mixes:
        types = tuple(contender.peer(name, shape).name for name, shape in shapes.items())
        if types in kept:
            note(f"{contender.name} is the same here as {kept[types].name}")
        else:
            kept[types] = contender
    return list(kept.values())
