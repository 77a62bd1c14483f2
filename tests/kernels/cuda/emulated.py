"""Kernels of kernels/cuda compiled by the C++ compiler for the emulator, and launched."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

HERE = Path(__file__).parent
KERNELS_CUDA = HERE.parents[2] / "kernels" / "cuda"
_MOST_ARGUMENTS = 12


class EmulatorError(Exception):
    """A kernel did what a GPU would punish; the message says which thread did what."""


@dataclass(frozen=True)
class Written:
    """Memory that a kernel may write; all else is constant."""

    array: NDArray[np.generic]


class Emulator:
    """Kernels of one source."""

    def __init__(
        self, sources: Sequence[Path], macros: Mapping[str, int], folder: Path, include: Path = KERNELS_CUDA,
        flags: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Compile, unless that was done in this folder; skips the test where there is no C++ compiler.

        Args:
            sources: files whose kernels are wanted.
            macros: that they are compiled with.
            folder: for what is compiled.
            include: where their headers are.
            flags: of the compiler, besides.
        """
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            pytest.skip("no C++ compiler")
        flags = [*flags, *(f"-D{name}={value}" for name, value in sorted(macros.items()))]
        text = "".join(f'#include "{source}"\n' for source in sources)
        warnings = ["-Wall", "-Wextra", "-Werror"] if include == KERNELS_CUDA else []  # not of planted mistakes
        key = hashlib.sha256((text + str(flags) + str(include)).encode()).hexdigest()[:16]
        library = folder / f"{key}.so"
        if not library.exists():
            (folder / f"{key}.cpp").write_text(text)
            subprocess.run(
                [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", *warnings,
                 "-Wno-unknown-pragmas", "-Wno-unused-function", "-DAQ_EMULATOR", *flags, "-I", str(include),
                 "-I", str(HERE), str(folder / f"{key}.cpp"), "-o", str(library)],
                check=True,
            )  # fmt: skip
        self._library = ctypes.CDLL(str(library))

    def launch(
        self, kernel: str, grid: tuple[int, int], threads: int, shared_bytes: int,
        *arguments: int | NDArray[np.generic] | Written | None,
    ) -> None:  # fmt: skip
        """Run a kernel on integers, constant arrays, arrays that it may write, and null pointers.

        Raises:
            EmulatorError: see there.
        """
        assert threads % 32 == 0
        assert len(arguments) <= _MOST_ARGUMENTS
        words, ranges = [], []
        for argument in arguments:
            array = argument.array if isinstance(argument, Written) else argument
            if isinstance(array, np.ndarray):
                assert array.flags.c_contiguous
                ranges.append((array.ctypes.data, array.nbytes, isinstance(argument, Written)))
                words.append(array.ctypes.data)
            else:
                words.append(0 if array is None else int(array))
        message = ctypes.create_string_buffer(500)
        flat = [int(word) for each in ranges for word in each]
        failed = self._library.emulate(
            kernel.encode(), ctypes.cast(getattr(self._library, kernel), ctypes.c_void_p), (ctypes.c_uint32 * 2)(*grid),
            threads, shared_bytes, (ctypes.c_uint64 * len(words))(*words), len(words),
            (ctypes.c_uint64 * len(flat))(*flat), len(ranges), message, ctypes.c_uint64(len(message)),
        )  # fmt: skip
        if failed:
            raise EmulatorError(message.value.decode())
