"""Real ranks of a test file, which import its neighbours wherever pytest was started."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pretrain.jobs.launch import start_ranks

ROOT = Path(__file__).parents[1]
_COMMAND = ROOT / "pretrain" / "cli" / "__main__.py"


def train(ranks: int, *words: str | Path) -> None:
    """`pretrain train` with these words, to its end, without the process that launches ranks."""
    work(_COMMAND, ranks, "train", *words)


def work(file: str | Path, ranks: int, *words: str | Path) -> None:
    """Run `file` as the main program of every rank, to their end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        # -P: the directory of a test file is no place to import from.
        command = [sys.executable, "-P", str(file), *map(str, words)]
        assert start_ranks(command, ranks) == 0
