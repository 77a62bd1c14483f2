"""What the allocator is told."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
from anyquant.runtime.memory import return_freed_memory
if sys.argv[1] == "yes":
    return_freed_memory()
def held():
    return int(next(l for l in open("/proc/self/smaps_rollup") if l.startswith("Anonymous")).split()[1])
before = held()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free(libc.malloc(30 << 20))  # after which glibc takes no map of its own for less
blocks = []
for _ in range(20):
    blocks.append(libc.malloc(4 << 20))
    libc.memset(blocks[-1], 1, 4 << 20)
for block in blocks[::2]:
    libc.free(block)
print(held() - before - (40 << 10))
"""


def kept(told: str) -> int:
    """KiB that stay with a process after 40 MiB were freed, in blocks between others that were not."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, told], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_blocks_go_back() -> None:
    assert kept("no") > 30 << 10
    assert kept("yes") < 4 << 10
