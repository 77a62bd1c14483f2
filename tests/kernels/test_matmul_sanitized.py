"""The kernels under the sanitizers: no access outside of a buffer, nothing undefined, no race between parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import RunDriver

CORE = Path(__file__).resolve().parents[2] / "kernels" / "core"
DRIVER = Path(__file__).with_name("matmul_driver.cpp")
WITHOUT_UNITS = "-DVECTOR_UNITS=0"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], ["-fsanitize=thread"], [WITHOUT_UNITS]]
)
def test_matmul(flags: list[str], run_driver: RunDriver) -> None:
    done = run_driver(DRIVER, [CORE / "pool.cpp", *sorted(CORE.glob("matmul*.cpp"))], flags)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
