"""Freed memory that stays with the process, where the C library gives it back too eagerly.

glibc maps large blocks one by one and unmaps each when it is freed: a training step on a CPU then
waits for pages that the kernel has to clear again, the more the longer its window is
(tools/bench/training.py heap, docs/speed.md).
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGEST = 2**30
_NEVER = -1


def keep_freed_memory() -> bool:
    """Serve blocks up to a GiB from the heap, and keep it at its largest size.

    For a process that takes and frees the same blocks again and again. False where the C library
    is not glibc, and nothing is changed.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
