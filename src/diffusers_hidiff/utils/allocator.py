"""Memory reuse on the CPU."""

import ctypes
import platform
from functools import cache

# glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


@cache
def glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    return ctypes.CDLL("libc.so.6") if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc" else None


def return_freed_memory() -> None:
    """Hands freed memory back to the system, for work within a limit: glibc keeps it between blocks that are in use."""
    if (libc := glibc()) is not None:
        libc.malloc_trim(0)


def keep_freed_memory() -> bool:
    """Lets the C library keep freed memory for the next tensor instead of handing it back to the system.

    By default glibc maps every large tensor anew and the kernel clears each page on first touch: more work than many of
    the network's layers. It holds for the whole process, so programs call it (the command line, the training scripts,
    the benchmarks), never an import.

    Returns:
        Whether the C library took the setting (glibc on Linux does; elsewhere nothing happens).
    """
    if (libc := glibc()) is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)
