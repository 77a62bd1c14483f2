"""The driver and the compiler of NVIDIA's, as fakes on the emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.cuda.emulated import HERE


def build_fake(source: str, library: Path, *flags: str) -> None:
    """Compile one of them; skips the test where there is no C++ compiler."""
    program = shutil.which("c++")
    if program is None:
        pytest.skip("no C++ compiler")
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", *flags]
    subprocess.run([program, *options, str(HERE / source), "-o", str(library), "-ldl"], check=True)


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libcuda.so.1 and libnvrtc.so.13."""
    folder = tmp_path_factory.mktemp("fakes")
    build_fake("fake_cuda.cpp", folder / "libcuda.so.1")
    build_fake("fake_nvrtc.cpp", folder / "libnvrtc.so.13")
    return folder
