"""The heap that keeps what is freed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, torch
from pretrain.training.heap import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for count in range(28):
    if count == 12:  # the heap has its size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_blocks_that_come_again_cost_the_kernel_no_new_pages() -> None:
    faults = {}
    for how in ("kept", "given back"):
        ran = subprocess.run(
            [sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True
        )
        faults[how] = int(ran.stdout)
    # 16 blocks of 48 MB: 4 KiB pages, or 2 MiB ones where the kernel takes them by itself.
    assert faults["kept"] * 10 < faults["given back"]


_ABOVE_2_GIB = """
import ctypes, resource
from pretrain.training.heap import keep_freed_memory
assert keep_freed_memory()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [c.malloc(800_000_000) for _ in range(3)]
    for block in blocks:
        c.memset(block, 1, 800_000_000)
    for block in reversed(blocks):
        c.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_more_than_2_gib_of_freed_memory_is_kept_too() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _ABOVE_2_GIB], capture_output=True, text=True, check=True
    )
    # 2.4 GB again: 590,000 pages of 4 KiB, or 1,100 huge ones, if they had been given back.
    assert int(ran.stdout) < 500
