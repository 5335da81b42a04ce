"""How much of the machine this process may use."""

from __future__ import annotations

import os
import sys


def usable() -> int:
    """The cores that this process may run on; a job of Slurm's may be limited to some of all."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
