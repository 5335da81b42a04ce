"""What a figure was measured on: commit, cores, threads, load and versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def described() -> dict[str, Any]:
    """Of this machine, as it is now; `threads` are those of torch in this process."""
    commit = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty", "--tags"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "commit": commit,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "deepspeed", "numpy")},
    }
