"""What the C library does with memory that tensors on a CPU have freed."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of ``mallopt`` in glibc's malloc.h."""
LARGEST_HEAP_BLOCK = 2**25
"""Bytes; glibc takes no more for the second."""


def keep_freed_memory() -> bool:
    """Keep what is freed for what is asked for next, instead of giving it back to the system.

    A train step frees and asks for the same memory again and again. Whether its end is given back and has to be cleared
    and mapped anew, page by page, depends on what happens to lie behind it: in some processes that takes 1 to 4 % of
    every step, in others nothing. The price is that the process stays as large as it once was.

    Returns:
        whether the C library is one that can be told, glibc.
    """
    library = _glibc()
    if library is None:
        return False
    return bool(library.mallopt(TRIM_THRESHOLD, 2**31 - 1) and library.mallopt(MMAP_THRESHOLD, LARGEST_HEAP_BLOCK))


def give_back_freed_memory() -> None:
    """Give freed memory back to the system now, so that what is asked for next shows in the process's size."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None
