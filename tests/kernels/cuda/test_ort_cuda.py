"""CodebookMatMul's kernel for GPUs: in the emulator, between fakes of the driver, of NVRTC and of ONNX Runtime."""

from __future__ import annotations

import ctypes.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from anyquant.runtime import native
from anyquant.runtime.cuda import compiler
from anyquant.runtime.onnx_session import LIBRARY
from tests.kernels.cuda.conftest import build_fake
from tests.kernels.cuda.emulated import HERE, KERNELS_CUDA
from tests.kernels.cuda.ort_driver import CASES, LARGE

REASON = f"no compiled operators: {native.missing(LIBRARY)}"
pytestmark = pytest.mark.skipif(native.path_of(LIBRARY) is None, reason=REASON)
DRIVER = HERE / "ort_driver.py"
Answer = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests share that do not care whether kernels have been compiled before."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def answer(fakes: Path, cache: Path, tmp_path: Path) -> Answer:
    """answer(scenario, cache=, found=, **environment): what the driver's process found."""

    def run(*scenario: str, cache: Path = cache, found: Path = fakes, **environment: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, str(DRIVER), str(native.path_of(LIBRARY)), str(fakes / "libcuda.so.1"), str(tmp_path),
             *scenario],
            env={
                **os.environ, "LD_LIBRARY_PATH": str(found), "ANYQUANT_CACHE": str(cache),
                "FAKE_NVRTC_FOLDER": str(fakes), "FAKE_NVRTC_EMULATOR": str(HERE), "ANYQUANT_ONNXRUNTIME_CUDA": "1",
                **environment,
            },
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        result: dict[str, Any] = json.loads((tmp_path / "answer.json").read_text())
        assert (result["live"], result["depth"]) == (0, 0)  # no memory and no context is left behind
        return result

    return run


def message(answer: dict[str, Any], case: str = "columns") -> str:
    """Why the first run failed, or the kernel was not made."""
    found = answer["cases"][case]
    code, text = found.get("created") or found["statuses"][0]
    assert code == 1
    assert text.startswith("anyquant CodebookMatMul")
    result: str = text
    return result


def test_products(answer: Answer) -> None:
    found = answer()
    assert found["providers"] == ["CPUExecutionProvider", "CUDAExecutionProvider"]
    assert found["memory"] == [0, *[-2] * 8]  # constants stay with the host
    assert set(found["cases"]) == set(CASES)
    for name, case in found["cases"].items():
        assert not any(case["statuses"]), (name, case)
        assert max(case["errors"]) < 2e-6, (name, case)
        assert all(case["same"]), name
        assert case.get("packed", name == "nothing"), name  # to the last byte what Python makes


def test_a_large_matrix_is_packed_the_same(answer: Answer) -> None:
    found = answer(LARGE, FAKE_CUDA_FAIL="cuLaunchKernel")
    assert found["cases"][LARGE]["packed"]
    assert "does not start a kernel" in message(found, LARGE)


def test_kernels_are_compiled_once(answer: Answer, tmp_path: Path) -> None:
    cache = tmp_path / "new"
    first = answer("columns", cache=cache)
    kept = sorted((cache / "cubins").iterdir())
    assert [file.name.rpartition("-")[0] for file in kept] == ["ort-finish.cu-sm_90", *["ort-gemv.cu-sm_90"] * 2]
    assert first["loaded"] == 4  # for one row and for eight, with a finish each
    again = answer("columns", cache=cache, FAKE_NVRTC_FAIL="not this time")
    assert again["cases"] == first["cases"]
    content = kept[1].read_bytes()
    kept[1].write_bytes(content[:-3] + b"?" + content[-2:])
    assert "not this time" in message(answer("columns", cache=cache, FAKE_NVRTC_FAIL="not this time"))
    answer("columns", cache=cache)
    answer("columns", cache=cache, FAKE_NVRTC_FAIL="not this time")  # it is whole again
    assert sorted((cache / "cubins").iterdir()) == kept


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuStreamGetCtx", "the stream of the session is on no GPU"),
        ("cuMemAlloc_v2", r"the GPU has no memory for a matrix: out of memory (CUDA error 2)"),
        ("cuMemcpyHtoDAsync_v2", "a matrix does not get to the GPU"),
        ("cuStreamSynchronize", "a matrix does not get to the GPU"),
        ("cuModuleLoadData", "is the driver older than NVRTC?"),
        ("cuMemAllocAsync", "no memory for the sums of columns: out of memory"),
        ("cuLaunchKernel", "the GPU does not start a kernel"),
    ],
)
def test_what_fails_is_said(answer: Answer, name: str, said: str) -> None:
    assert said in message(answer("columns", FAKE_CUDA_FAIL=name))


def test_sources_that_do_not_compile(answer: Answer, tmp_path: Path) -> None:
    found = answer("rows", cache=tmp_path / "none", FAKE_NVRTC_FAIL="line 7: no such thing")
    assert "gemv.cu does not compile (NVRTC_ERROR_COMPILATION): line 7: no such thing" in message(found, "rows")
    # Where nothing can be kept, nothing is.
    (tmp_path / "file").write_text("")
    assert not any(answer("rows", cache=tmp_path / "file" / "cache")["cases"]["rows"]["statuses"])


def test_the_real_compiler(answer: Answer, fakes: Path, tmp_path: Path) -> None:
    """NVRTC compiles what the library gives it, as the library gives it."""
    try:
        files = metadata.files("nvidia-cuda-nvrtc") or []
    except metadata.PackageNotFoundError:
        pytest.skip("the extra anyquant[cuda] is not installed")
    nvrtc = next(Path(str(file.locate())).parent for file in files if file.name.startswith("libnvrtc.so"))
    (tmp_path / "driver").mkdir()
    build_fake("fake_cuda.cpp", tmp_path / "driver" / "libcuda.so.1", "-DFAKE_WITHOUT_CUDA_CORE")
    for case in ("rows", "columns"):
        found = Path(f"{tmp_path / 'driver'}:{nvrtc}")
        answered = answer(case, cache=tmp_path / case, found=found, FAKE_CUDA_FAIL="cuModuleLoadData")
        assert "the kernels cannot be loaded" in message(answered, case)
        kept = list((tmp_path / case / "cubins").iterdir())
        assert len(kept) == 2  # for one row, and for eight
        assert all(file.read_bytes()[8:12] == b"\x7fELF" for file in kept)


@pytest.mark.parametrize(("version", "chosen"), [("13000", "libnvrtc.so.13"), ("12080", "libnvrtc.so.12")])
def test_the_compiler_is_the_drivers(answer: Answer, fakes: Path, tmp_path: Path, version: str, chosen: str) -> None:
    """What a newer one compiles, a driver need not load."""
    (tmp_path / "both").mkdir()
    for name in ("libcuda.so.1", "libnvrtc.so.12", "libnvrtc.so.13"):
        (tmp_path / "both" / name).symlink_to(fakes / name.replace("12", "13"))
    settings = {"FAKE_NVRTC_FAIL": "from", "FAKE_CUDA_VERSION": version}
    assert f"from {chosen}" in message(answer(cache=tmp_path, found=tmp_path / "both", **settings), "rows")


def test_gpus_that_are_too_old(answer: Answer, tmp_path: Path) -> None:
    assert "compute capability 7.0; the kernels need 8.0" in message(answer("columns", FAKE_CUDA_MAJOR="7"))


@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="there is a driver")
def test_without_a_driver(answer: Answer, tmp_path: Path) -> None:
    # The driver's process has the fake by its path, but the loader does not find it by its name.
    (tmp_path / "empty").mkdir()
    found = answer("columns", found=tmp_path / "empty")
    assert "/7: there is no NVIDIA driver (libcuda.so.1)" in message(found)


@pytest.mark.skipif(ctypes.util.find_library("nvrtc") is not None, reason="there is NVRTC")
def test_without_a_compiler(answer: Answer, fakes: Path, tmp_path: Path) -> None:
    (tmp_path / "driver").mkdir()
    shutil.copy(fakes / "libcuda.so.1", tmp_path / "driver")
    assert "pip install nvidia-cuda-nvrtc" in message(answer("columns", found=tmp_path / "driver"))


def test_only_where_it_is_asked_for(answer: Answer) -> None:
    """It is untested on GPUs."""
    assert answer("nothing", ANYQUANT_ONNXRUNTIME_CUDA="0")["providers"] == ["CPUExecutionProvider"]


def test_the_library_holds_the_sources() -> None:
    path = native.path_of(LIBRARY)
    assert path is not None
    library = path.read_bytes()
    for name in ("platform.cuh", "packed.cuh", "lookup.cuh", "gemv.cu", "finish.cu"):
        source = (KERNELS_CUDA / name).read_bytes()
        assert library.count(source) == 1, name
        assert (compiler.source_folder() / name).read_bytes() == source
