"""The emulator as a place where kernels run, with what our code launches there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anyquant import ir
from anyquant.runtime.cuda import layout, products, reference
from anyquant.runtime.cuda.products import Output, Type
from tests.kernels.cuda.emulated import KERNELS_CUDA, Emulator, Written

Floats = NDArray[np.float32]


class EmulatedGpu:
    """See :class:`anyquant.runtime.cuda.products.Machine`; memory is arrays of NumPy."""

    def __init__(self, folder: Path, kernels: Path = KERNELS_CUDA, multiprocessors: int = 4) -> None:
        """Args: folder: for what is compiled; kernels: the sources; multiprocessors: that it is to say it has."""
        self.multiprocessors, self._folder, self._kernels = multiprocessors, folder, kernels
        self._loaded: dict[tuple[Any, ...], Emulator] = {}
        self.launched: list[str] = []

    def launch(
        self, source: str, macros: Mapping[str, int], kernel: str, grid: tuple[int, int], threads: int,
        shared_bytes: int, *arguments: Any,
    ) -> None:  # fmt: skip
        """See Machine."""
        assert shared_bytes <= products.MOST_SHARED
        key = (source, *sorted(macros.items()))
        if key not in self._loaded:
            self._loaded[key] = Emulator([self._kernels / source], macros, self._folder, include=self._kernels)
        plain = [Written(each.memory) if isinstance(each, Output) else each for each in arguments]
        self._loaded[key].launch(kernel, grid, threads, shared_bytes, *plain)
        self.launched.append(kernel)

    def floats(self, count: int) -> Floats:
        """See Machine; what is not written is not a number."""
        return np.full(count, np.nan, np.float32)

    def halves(self, count: int) -> NDArray[np.float16]:
        """See Machine."""
        return np.full(count, np.nan, np.float16)


class TorchOnEmulator:
    """The emulator, whose memory is tensors on the CPU."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: for what is compiled."""
        self._gpu = EmulatedGpu(folder)
        self.multiprocessors, self.launched = 4, self._gpu.launched

    def launch(
        self, source: str, macros: Mapping[str, int], kernel: str, grid: tuple[int, int], threads: int,
        shared_bytes: int, *arguments: Any,
    ) -> None:  # fmt: skip
        """See Machine."""

        def array(tensor: torch.Tensor) -> NDArray[Any]:
            bits = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
            return bits.detach().numpy()

        given = [
            Output(array(each.memory)) if isinstance(each, Output)
            else array(each) if isinstance(each, torch.Tensor) else each
            for each in arguments
        ]  # fmt: skip
        self._gpu.launch(source, macros, kernel, grid, threads, shared_bytes, *given)

    def floats(self, count: int) -> torch.Tensor:
        """See Machine."""
        return torch.full((count,), torch.nan)

    def halves(self, count: int) -> torch.Tensor:
        """See Machine."""
        return torch.full((count,), torch.nan, dtype=torch.float16)


def to_kind(x: Floats, kind: Type) -> NDArray[Any]:
    """FP32 numbers as kernels are given them: BF16 as the high halves, rounded to nearest even."""
    if kind is Type.FP32:
        return x.copy()
    if kind is Type.FP16:
        return x.astype(np.float16)
    patterns = x.view(np.uint32)
    return ((patterns + 0x7FFF + (patterns >> 16 & 1)) >> 16).astype(np.uint16)


def from_kind(x: NDArray[Any], kind: Type) -> NDArray[np.float64]:
    """The numbers again."""
    if kind is Type.BF16:
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def multiplied(gpu: EmulatedGpu, tensor: ir.Tensor, x: Floats, kind: Type) -> NDArray[np.float64]:
    """x [batch, in] times the packed tensor, [batch, out]."""
    about, packed = layout.pack_codebook(tensor)
    given = to_kind(x, kind)
    y = to_kind(np.full((len(x), about.shape[0]), np.nan, np.float32), kind)
    products.multiply(gpu, about, packed, given, kind, len(x), y)
    return from_kind(y, kind)


def expanded(gpu: EmulatedGpu, tensor: ir.Tensor, kind: Type) -> NDArray[Any]:
    """The weights of the packed tensor, as kernels write them."""
    about, packed = layout.pack_codebook(tensor)
    weight = to_kind(np.full(about.shape, np.nan, np.float32), kind)
    products.expand(gpu, about, packed, kind, weight)
    return weight


def dequantized(gpu: EmulatedGpu, tensor: ir.Tensor) -> Floats:
    """The weights by the reference kernels."""
    spec = tensor.spec
    assert isinstance(spec, reference.KINDS)
    weight = np.full(spec.shape, np.nan, np.float32)
    reference.dequantize(gpu, spec, dict(reference.stored_arrays(tensor)), weight)
    return weight
