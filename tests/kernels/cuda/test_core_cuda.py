"""Our calls of cuda-core, whose driver is a fake on the emulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.cuda.emulated import HERE, KERNELS_CUDA

pytest.importorskip("cuda.core", reason="the extra anyquant[cuda] is not installed")
REPOSITORY = HERE.parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def run(fakes: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tools")))
    return subprocess.run(
        [sys.executable, str(HERE / "core_driver.py"), str(fakes / "libcuda.so.1"), str(folder)],
        env={**os.environ, "LD_LIBRARY_PATH": str(fakes), "PYTHONPATH": paths, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_every_kernel_in_two_threads(fakes: Path, folder: Path) -> None:
    done = run(fakes, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(json.loads(done.stdout)) == {source.name for source in KERNELS_CUDA.glob("*.cu")}


@pytest.mark.parametrize("name", ["cuLaunchKernel", "cuModuleLoadData"])
def test_a_driver_that_fails(fakes: Path, folder: Path, name: str) -> None:
    done = run(fakes, folder, FAKE_CUDA_FAIL=name)
    assert done.returncode == 1
    assert "MachineError: a fake does not start gemv_rows with 4 x 1 blocks of 512 threads and " in done.stderr
    assert "The kernels are compiled by CUDA 13: its driver, 580 or later, is needed" in done.stderr
