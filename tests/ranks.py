"""Real ranks of a test file, which import its neighbours wherever pytest was started."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pretrain.jobs.launch import start_ranks

ROOT = Path(__file__).parents[1]


def work(file: str, ranks: int, *words: str | Path) -> None:
    """Run `file` as the main program of every rank, to their end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        # -P: the directory of a test file is no place to import from.
        assert start_ranks([sys.executable, "-P", file, *map(str, words)], ranks) == 0
