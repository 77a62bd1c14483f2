"""What multiplies in tools/benchmark_cuda.py: our kernels, torch, and peers from a package index."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import numpy as np
import torch
from torch.nn.functional import linear

from anyquant import ir
from anyquant.runtime.cuda import reference
from anyquant.runtime.cuda.linear import CodebookLinear
from anyquant.runtime.cuda.machine import machine
from anyquant.testing import codebook_tensor
from gpu.timing import Call

Shape = tuple[int, int]
NAIVE, DEQUANTIZED, FP16, BF16, NF4, GEMLITE = (
    "ours, naive", "ours, dequantized for torch FP16", "torch FP16", "torch BF16", "bitsandbytes NF4", "gemlite, 4 bits"
)  # fmt: skip
OURS = {
    "rows, 4 bits": (0, [4], 0.0),
    "rows, 3 bits": (0, [3], 0.0),
    "rows, 2 bits": (0, [2], 0.0),
    "rows, 2 to 4 bits, .5 % outliers": (0, [2, 3, 4], 0.005),
    "columns, 4 bits": (1, [4], 0.0),
    "columns, 2 bits": (1, [2], 0.0),
    "columns, 2 and 4 bits, .5 % outliers": (1, [2, 4], 0.005),
}
"""Name -> (axis, widths of channels, part that is outliers)."""


@dataclass(frozen=True)
class Contender:
    """Products of one batch of activations with copies of a matrix, made in turn.

    Attributes:
        name: of its row.
        nbytes: of the matrix, as it lies in memory.
        calls: one for each copy; each returns [batch, out].
        exact: the products that they are to give, FP64 [batch, out]; none where nobody judges it.
    """

    name: str
    nbytes: int
    calls: Sequence[Call]
    exact: torch.Tensor | None = field(default=None, repr=False)


def copies(nbytes: int, rotate: int) -> int:
    """Copies of a matrix that fill more than some bytes."""
    return rotate // nbytes + 1


def random_matrix(shape: Shape, axis: int, widths: Sequence[int], outliers: float) -> ir.Tensor:
    """A codebook matrix [out, in] of random codes; channels have the widths in any order."""
    bits = np.resize(np.array(widths, np.uint8), shape[axis])
    np.random.default_rng(0).shuffle(bits)
    return codebook_tensor(shape, axis, bits, outliers=int(outliers * shape[0] * shape[1]))


def activations(batch: int, columns: int, device: torch.device) -> torch.Tensor:
    """FP16 [batch, in], the same each time."""
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)).half().to(device)


class Ours:
    """A random codebook matrix in its packed copies, and what multiplies with them."""

    def __init__(self, name: str, shape: Shape, device: torch.device, rotate: int) -> None:
        """Pack a matrix of OURS, and copy it until the copies fill ``rotate`` bytes."""
        tensor = random_matrix(shape, *OURS[name])
        layer = CodebookLinear(tensor, None).to(device)
        self.name, self.nbytes, self._layer = name, layer.packed.numel(), layer
        self._layers = [layer, *(copy.deepcopy(layer) for _ in range(copies(self.nbytes, rotate) - 1))]
        self._weight = torch.from_numpy(ir.dequantize(tensor)).to(device)

    def products(self, batch: int) -> Contender:
        """By the layer, as a model uses it."""
        x = activations(batch, self._layer.in_features, self._weight.device)
        exact = torch.cat([x.double() @ some.double().T for some in torch.split(self._weight, 1024)], 1)
        return Contender(self.name, self.nbytes, [_call(layer, x) for layer in self._layers], exact)

    def naive(self, batch: int) -> Contender:
        """By the reference kernels, on FP32 weights that were dequantized once; they are larger than any cache."""
        gpu, shape = machine(self._weight.device), self._layer.layout.shape
        x = activations(batch, shape[1], self._weight.device).float()

        def call() -> torch.Tensor:
            y = torch.empty(batch, shape[0], device=x.device)
            reference.multiply(gpu, shape, self._weight, x, batch, y)
            return y

        return Contender(NAIVE, self._weight.nbytes, [call])

    def dequantized(self, batch: int) -> Contender:
        """By torch, on FP16 weights that are dequantized each time."""
        x = activations(batch, self._layer.in_features, self._weight.device)
        return Contender(DEQUANTIZED, self.nbytes, [_dense_call(one, x) for one in self._layers])


def _call(layer: CodebookLinear, x: torch.Tensor) -> Call:
    return lambda: layer(x)


def _dense_call(layer: CodebookLinear, x: torch.Tensor) -> Call:
    return lambda: linear(x, layer.weights(x.dtype))


Products = Callable[[int], Contender]
"""Rows of activations -> the contender for as many."""


def dense(name: str, shape: Shape, device: torch.device, rotate: int) -> Products:
    """torch's linear on 16-bit weights; name: FP16 or BF16 of this module."""
    dtype = {FP16: torch.float16, BF16: torch.bfloat16}[name]
    weight = torch.randn(shape, generator=_generator(device), device=device).to(dtype)
    weights = [weight, *(weight.clone() for _ in range(copies(weight.nbytes, rotate) - 1))]

    def products(batch: int) -> Contender:
        x = activations(batch, shape[1], device).to(dtype)
        return Contender(name, weight.nbytes, [_linear(x, one) for one in weights])

    return products


def _generator(device: torch.device) -> torch.Generator:
    """Not torch's own, which a capture that failed may leave in disorder."""
    return torch.Generator(device).manual_seed(0)


def _linear(x: torch.Tensor, weight: torch.Tensor) -> Call:
    return lambda: linear(x, weight)


def bitsandbytes_nf4(shape: Shape, device: torch.device, rotate: int) -> Products:
    """NF4 in blocks of 64, FP32 scales; raises ImportError where bitsandbytes is not installed."""
    functional = importlib.import_module("bitsandbytes.functional")
    multiply = importlib.import_module("bitsandbytes").matmul_4bit
    weight = torch.randn(shape, generator=_generator(device), device=device)
    codes, state = functional.quantize_4bit(weight.half(), blocksize=64, quant_type="nf4")
    nbytes = codes.nbytes + state.absmax.nbytes
    count = copies(nbytes, rotate)
    states = [state, *(copy.deepcopy(state) for _ in range(count - 1))]
    stored = [codes, *(codes.clone() for _ in range(count - 1))]

    def products(batch: int) -> Contender:
        x = activations(batch, shape[1], device)

        def call(packed: torch.Tensor, of: object) -> Call:
            return lambda: multiply(x, packed.t(), quant_state=of)

        return Contender(NF4, nbytes, [call(*pair) for pair in zip(stored, states, strict=True)])

    return products


def gemlite_4_bits(shape: Shape, device: torch.device, rotate: int) -> Products:
    """4-bit integers, FP16 scale and zero for each 64; raises ImportError where gemlite is not installed."""
    helper = importlib.import_module("gemlite.helper")
    generator = _generator(device)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator, device=device)
    scales = torch.rand(shape[0], shape[1] // 64, generator=generator, device=device).half() / 64
    packer = helper.A16W4_HQQ_INT(device=str(device), dtype=torch.float16)
    nbytes = codes.numel() // 2 + 2 * scales.nbytes
    layers = [
        packer.from_weights(codes.clone(), scales.view(-1, 1).clone(), torch.full_like(scales, 8).view(-1, 1))
        for _ in range(copies(nbytes, rotate))
    ]

    def products(batch: int) -> Contender:
        x = activations(batch, shape[1], device)

        def call(layer: Callable[[torch.Tensor], torch.Tensor]) -> Call:
            return lambda: layer(x)

        return Contender(GEMLITE, nbytes, [call(layer) for layer in layers])

    return products


PEERS = {NF4: ("bitsandbytes", bitsandbytes_nf4), GEMLITE: ("gemlite", gemlite_4_bits)}
"""Name -> (package, what makes it)."""


def peer_versions() -> dict[str, str]:
    """Package -> its version, or that it is not there."""
    found = {}
    for package, _ in PEERS.values():
        try:
            found[package] = version(package)
        except ImportError:
            found[package] = "not installed"
    return found
