"""What several ranks of a node say, as torchrun, srun and `pretrain train` start them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

_COMMAND = [sys.executable, "-m", "pretrain.cli", "train"]
_OF_TORCHRUN = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
_OF_SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
_FIRST = "pretrain train: this command cannot run:"


def said(ranks: Sequence[tuple[Path, dict[str, str]]], words: Sequence[str]) -> str:
    """The stderr of all ranks, each started in a directory with its own environment."""
    started = [
        subprocess.Popen(
            [*_COMMAND, *words], stderr=subprocess.PIPE, text=True, cwd=cwd,
            env={**os.environ, **environment},
        )
        for cwd, environment in ranks
    ]  # fmt: skip
    texts = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [2] * len(started)
    return "".join(texts)


@pytest.mark.parametrize(
    "environments",
    [
        [{"RANK": str(rank), "LOCAL_RANK": str(rank), **_OF_TORCHRUN} for rank in range(2)],
        [{"SLURM_PROCID": str(rank), **_OF_SRUN} for rank in range(2)],
    ],
    ids=["torchrun", "srun"],
)
def test_a_mistake_that_every_rank_sees_is_said_once(
    environments: list[dict[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("launch: {device: cpu}\n")
    text = said([(tmp_path, one) for one in environments], ["c.yaml", "train.stpes=3"])
    assert text.count(_FIRST) == text.count("did you mean train.steps?") == 1


def test_a_mistake_that_one_rank_alone_sees_is_said_too(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
    (first / "c.yaml").write_text("run: {directry: r}\n")
    ranks = [(first, {"RANK": "0", **_OF_TORCHRUN}), (second, {"RANK": "1", **_OF_TORCHRUN})]
    text = said(ranks, ["c.yaml"])
    assert text.count(_FIRST) == 2
    assert "run.directry" in text and "c.yaml: cannot be read (No such file" in text
