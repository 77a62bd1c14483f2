"""A GPU of torch as the place where kernels run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from anyquant.errors import UsageError
from anyquant.runtime.cuda.launcher import launcher
from anyquant.runtime.cuda.products import Output, Type

TYPES = {torch.float32: Type.FP32, torch.float16: Type.FP16, torch.bfloat16: Type.BF16}


class Gpu:
    """See :class:`anyquant.runtime.cuda.products.Machine`; memory is tensors of torch."""

    def __init__(self, device: torch.device) -> None:
        """Raises MachineError where the GPU cannot run the kernels."""
        self._device, self._launcher = device, launcher(device)
        self.multiprocessors = int(torch.cuda.get_device_properties(device).multi_processor_count)

    def launch(
        self, source: str, macros: Mapping[str, int], kernel: str, grid: tuple[int, int], threads: int,
        shared_bytes: int, *arguments: Any,
    ) -> None:  # fmt: skip
        """See Machine."""
        plain = [argument.memory if isinstance(argument, Output) else argument for argument in arguments]
        self._launcher.launch(source, macros, kernel, grid, threads, shared_bytes, *plain)

    def floats(self, count: int) -> torch.Tensor:
        """See Machine."""
        return torch.empty(count, dtype=torch.float32, device=self._device)

    def halves(self, count: int) -> torch.Tensor:
        """See Machine."""
        return torch.empty(count, dtype=torch.float16, device=self._device)


@functools.cache
def machine(device: torch.device) -> Gpu:
    """The GPU of a device, made once.

    Raises:
        UsageError: the device is no GPU.
        MachineError: it cannot run the kernels.
    """
    if device.type != "cuda":
        raise UsageError(f"kernels for GPUs cannot multiply with a matrix on {device}: move the model to 'cuda'")
    return Gpu(device)
