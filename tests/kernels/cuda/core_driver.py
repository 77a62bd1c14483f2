"""Every kernel launched by way of cuda-core, in a process whose driver is a fake that runs the emulator.

python core_driver.py FAKE_CUDA FOLDER

With the fake's folder on LD_LIBRARY_PATH, and the repository and its folder tools on PYTHONPATH. Memory is that of the
host: what torch has to do with a GPU is replaced, what cuda-core has is not. FOLDER is for what is compiled.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from gpu import worker

from anyquant.runtime.cuda import launcher, linear
from anyquant.runtime.cuda.machine import Gpu
from tests.kernels.cuda.emulated import KERNELS_CUDA, Emulator

STREAM, CPU = 0x57, torch.device("cpu")


def main() -> None:
    """Launch them; print the names of sources that were compiled, as a JSON list."""
    fake, folder = ctypes.CDLL(sys.argv[1]), Path(sys.argv[2])
    sources: list[str] = []
    word = launcher._word

    def compiled(source: str, macros: Mapping[str, int], architecture: str) -> bytes:
        assert architecture == "sm_90"
        sources.append(source)
        built = Emulator([KERNELS_CUDA / source], macros, folder)
        return str(built._library._name).encode() + b"\0"

    def lent(argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            fake.fake_lend(ctypes.c_uint64(argument.data_ptr()), ctypes.c_size_t(argument.nbytes))
        return word(argument)

    with (
        patch.object(launcher, "require_gpu", lambda device: "sm_90"),
        patch.object(launcher, "compiled", compiled),
        patch.object(launcher, "_word", lent),
        patch("torch.cuda.device", lambda device: nullcontext()),
        patch("torch.cuda.current_device", lambda: 0),
        patch("torch.cuda.current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM)),
        patch("torch.cuda.get_device_name", lambda device: "a fake"),
        patch("torch.cuda.get_device_properties", lambda device: SimpleNamespace(multi_processor_count=4)),
    ):
        gpu = Gpu(CPU)
        with patch.object(linear, "machine", lambda device: gpu), patch.object(worker, "machine", lambda device: gpu):
            failures: list[BaseException] = []

            def launches() -> None:
                try:
                    worker.launches(CPU)
                except BaseException as error:
                    failures.append(error)

            launches()
            if not failures:  # another thread has no current context of its own
                thread = threading.Thread(target=launches)
                thread.start()
                thread.join()
            if failures:
                raise failures[0]
    print(json.dumps(sources))


if __name__ == "__main__":
    main()
