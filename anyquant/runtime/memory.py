"""The allocator of the C library, told to give memory back."""

from __future__ import annotations

import ctypes
import os

_LIMIT = 1 << 18
_OPTIONS = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1}
"""Variable by which a user sets an option of glibc's -> its number in malloc.h."""


def return_freed_memory() -> None:
    """Let freed blocks of a quarter of a megabyte or more go back to the system at once, in this process from now on.

    By default glibc raises that limit, up to 32 MiB, as such blocks are freed, and keeps smaller ones for later: a
    model's block after the other then leaves ever more memory behind that nothing holds. It costs some system time.
    What the user has set in the environment stays. Without glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for variable, option in _OPTIONS.items():
        if variable not in os.environ:
            mallopt(option, _LIMIT)
