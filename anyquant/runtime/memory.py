"""The allocator of the C library, told to give memory back."""

from __future__ import annotations

import ctypes

_LIMIT = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def return_freed_memory() -> None:
    """Let freed blocks of a megabyte or more go back to the system at once, in this process from now on.

    By default glibc raises that limit, up to 32 MiB, as such blocks are freed, and keeps smaller ones for later: a
    model's block after the other then leaves ever more memory behind that nothing holds. It costs some system time.
    Without glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        mallopt(option, _LIMIT)
