"""Kernels on a GPU of torch, launched on its current stream."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from anyquant.errors import AnyquantError, MachineError, MissingDependency
from anyquant.runtime.cuda.compiler import compiled
from anyquant.runtime.cuda.products import MOST_SHARED

OLDEST = (8, 0)
"""Compute capability that the kernels need: tensor cores for 16 x 8 x 16 in FP16, loads past the L1 cache."""


def require_gpu(device: torch.device) -> str:
    """The architecture of a GPU that the kernels run on, such as "sm_90".

    Raises:
        MachineError: there is no such GPU, torch cannot use it, or it is too old.
    """
    if torch.version.cuda is None:
        raise MachineError(
            f"torch {torch.__version__} is built without CUDA, so that it sees no GPU. Install the build for your "
            "driver: https://pytorch.org/get-started/locally"
        )
    if not torch.cuda.is_available():
        raise MachineError(f"torch {torch.__version__} finds no NVIDIA GPU, or no driver that fits it: see nvidia-smi")
    number, count = device.index or 0, torch.cuda.device_count()
    if number >= count:
        raise MachineError(f"there is no GPU {number}: torch sees {count}, counted from 0")
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        raise MachineError(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; the kernels "
            f"need {OLDEST[0]}.{OLDEST[1]} or later (Ampere). Load with dequantize=True instead"
        )
    return f"sm_{capability[0]}{capability[1]}"


class Launcher:
    """Kernels on one GPU, each source loaded once for each set of macros."""

    def __init__(self, device: torch.device) -> None:
        """Raises MachineError where the kernels do not run there, MissingDependency without cuda-core."""
        self._architecture, self._device = require_gpu(device), device
        try:
            from cuda.core import Device, LaunchConfig, ObjectCode, Stream, launch  # noqa: F401
        except ImportError:
            raise MissingDependency("cuda-core", "cuda", "running kernels on a GPU") from None
        self._loaded: dict[tuple[Any, ...], Any] = {}
        self._threads = threading.local()

    def launch(
        self, source: str, macros: Mapping[str, int], kernel: str, grid: tuple[int, int], threads: int,
        shared_bytes: int, *arguments: int | torch.Tensor | None,
    ) -> None:  # fmt: skip
        """Put a kernel onto torch's current stream of the GPU.

        Args:
            source: file of kernels.
            macros: to compile it with.
            kernel: its name.
            grid: blocks, x and y.
            threads: of a block.
            shared_bytes: of memory that a block shares, at most what any GPU gives without being asked for more.
            arguments: 32-bit integers, tensors and null pointers.

        Raises:
            MachineError: the driver does not load or start it.
            AnyquantError: see :func:`anyquant.runtime.cuda.compiler.compiled`.
        """
        from cuda.core import launch

        assert shared_bytes <= MOST_SHARED
        words = [_word(argument) for argument in arguments]
        with torch.cuda.device(self._device):
            try:
                self._make_current()
                stream = _stream(torch.cuda.current_stream(self._device).cuda_stream)
                launch(stream, _config(grid, threads, shared_bytes), self._kernel(source, macros, kernel), *words)
            except Exception as error:  # CUDAError, which is no public name
                if isinstance(error, AnyquantError):
                    raise
                name = torch.cuda.get_device_name(self._device)
                raise MachineError(
                    f"{name} does not start {kernel} with {grid[0]} x {grid[1]} blocks of {threads} threads and "
                    f"{shared_bytes:,} bytes of shared memory: {error}. {_DRIVER}"
                ) from error

    def _make_current(self) -> None:
        """torch makes a GPU the current one of a new thread when it first works on it, which may be later than this."""
        from cuda.core import Device

        if not hasattr(self._threads, "ready"):
            Device(torch.cuda.current_device()).set_current()
            self._threads.ready = True

    def _kernel(self, source: str, macros: Mapping[str, int], name: str) -> Any:
        from cuda.core import ObjectCode

        key = (source, *sorted(macros.items()))
        if (key, name) not in self._loaded:
            if key not in self._loaded:
                self._loaded[key] = ObjectCode.from_cubin(compiled(source, macros, self._architecture))
            self._loaded[key, name] = self._loaded[key].get_kernel(name)
        return self._loaded[key, name]


# Made once: in a small product they take longer than the launch.
@functools.lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)


@functools.lru_cache(maxsize=1024)
def _config(grid: tuple[int, int], threads: int, shared_bytes: int) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=grid, block=threads, shmem_size=shared_bytes)


_DRIVER = "The kernels are compiled by CUDA 13: its driver, 580 or later, is needed"


def _word(argument: int | torch.Tensor | None) -> Any:
    """As cuda-core wants it: Python's integers are pointers there, those of NumPy have a size."""
    if argument is None:
        return 0
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else np.int32(argument)


@functools.cache
def launcher(device: torch.device) -> Launcher:
    """The launcher of a GPU, made once; raises as it does."""
    return Launcher(device)
