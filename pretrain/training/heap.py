"""Keeps freed memory in the process, instead of returning it to the kernel.

glibc maps large blocks one by one and unmaps each when it is freed. A training step on a CPU then
waits for the kernel to clear pages again, and more so the longer its window is
(tools/bench/training.py heap, docs/speed.md).
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGEST = 2**30
_NEVER = -1


def keep_freed_memory() -> bool:
    """Serve blocks up to 1 GiB from the heap, and never shrink it.

    For a process that repeatedly allocates and frees the same blocks. If the C library is not
    glibc, it changes nothing and returns False.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
