"""A mistake that all ranks of a node see is said by one of them."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import time
from collections.abc import Mapping

from data_prep.dataset import command

# What tells the ranks that belong together from those of other jobs: the place where they meet.
_TOGETHER = ("MASTER_ADDR", "MASTER_PORT", "PRETRAIN_STORE", "SLURM_JOB_ID", "SLURM_STEP_ID")
# A rank that has said a mistake stays this long, so that those that start later learn of it. It is
# less than ranks that `pretrain train` launches have to end after one has failed.
_SECONDS = 3.0


def say(message: object) -> None:
    """Print a user's mistake on stderr, unless another rank on this node has just said the same.

    Ranks may not have met yet, and may never: the first of them to have a message holds a name
    that is made of it, in the kernel, where nothing is left behind. A message that no other rank
    has is said by the one that has it; one rank alone says its own at once.
    """
    if not _has_peers(os.environ):
        command.say(message)
        return
    together = [str(os.getuid()), *(os.environ.get(name, "") for name in _TOGETHER), str(message)]
    name = hashlib.sha256("\0".join(together).encode(errors="surrogateescape")).hexdigest()
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(f"\0pretrain-{name}")
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            command.say(message)
        return
    with holder:
        command.say(message)
        time.sleep(_SECONDS)


def _has_peers(environment: Mapping[str, str]) -> bool:
    """Whether torchrun, srun or `pretrain train` started other processes beside this one."""
    size = environment.get("WORLD_SIZE") if "RANK" in environment else None
    if size is None and "SLURM_STEP_ID" in environment:
        size = environment.get("SLURM_STEP_NUM_TASKS")
    return size not in (None, "1")
