"""What we start in a directory with files of the user's own, named as modules are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.jobs.interpreter import python_module

# A watchdog that ran a user's file would end at once.
WATCHED = """
import pathlib, subprocess
from pretrain.jobs.watchdog import Watchdog
watchdog = Watchdog(pathlib.Path("run"), 0, dict.fromkeys(("start", "step", "save"), 60.0))
try:
    watchdog.process.wait(1.5)
except subprocess.TimeoutExpired:
    watchdog.beat("step")
    print("is watched")
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with an empty configuration and files that must not be run."""
    for name in ("pretrain", "data_prep", "queue", "yaml", "torch", "socket", "dataclasses"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user')")
    (tmp_path / "c.yaml").touch()
    (tmp_path / "run").mkdir()
    return tmp_path


def started(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
    return subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, check=False
    )


def test_a_rank_imports_nothing_from_the_working_directory(place: Path) -> None:
    ended = started(place, *python_module("pretrain.cli"), "train", "c.yaml", "run.directory=r")
    assert ended.returncode == 2 and "data.train: not set" in ended.stderr


def test_a_watchdog_imports_nothing_from_the_working_directory(place: Path) -> None:
    assert started(place, sys.executable, "-P", "-c", WATCHED).stdout == "is watched\n"


def test_a_program_that_torchrun_starts_leaves_the_working_directory_out(place: Path) -> None:
    # Without -P a package of the name pretrain is the user's affair; the rest is not.
    (place / "pretrain.py").unlink()
    words = [sys.executable, "-m", "pretrain.cli", "train", "c.yaml", "run.directory=r"]
    ended = started(place, *words)
    assert ended.returncode == 2 and "data.train: not set" in ended.stderr
