"""How further Python processes are started: with this code, whatever lies where the user is."""

from __future__ import annotations

import sys


def python_module(name: str) -> list[str]:
    """The command that runs a module of ours as a program.

    `python -m` looks for modules in the working directory first, where a user's pretrain.py or
    queue.py would be taken for ours or for Python's. -P leaves the working directory out.
    """
    return [sys.executable, "-P", "-m", name]
