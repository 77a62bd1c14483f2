"""The kernels under the sanitizers: no access outside of a buffer, nothing undefined, no race between parts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("matmul_driver.cpp")
WITHOUT_UNITS = "-DVECTOR_UNITS=0"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], ["-fsanitize=thread"], [WITHOUT_UNITS]]
)
def test_matmul(tmp_path: Path, flags: list[str]) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-O1", "-g", "-pthread", *flags]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    if subprocess.run([compiler, *flags, probe, "-o", tmp_path / "probe"], capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizer runtime")
    core = REPOSITORY / "kernels" / "core"
    sources = [DRIVER, core / "pool.cpp", *sorted(core.glob("matmul*.cpp"))]
    subprocess.run([compiler, *flags, "-Wall", "-Wextra", "-I", core, *sources, "-o", tmp_path / "driver"], check=True)
    done = subprocess.run([tmp_path / "driver"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
