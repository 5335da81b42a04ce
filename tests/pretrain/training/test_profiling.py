"""The steps that were asked for are in the files, and no others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config.training import TrainConfig
from pretrain.training.profiling import StepProfiler


def train(directory: Path, steps: range, rank: int = 0, **settings: Any) -> None:
    """Steps of a matrix product each, the last of which ends the run."""
    profiler = StepProfiler(directory, rank, torch.device("cpu"), TrainConfig(**settings))
    matrix = torch.ones(16, 16)
    for number in steps:
        with profiler.step(number):
            matrix = matrix @ matrix.softmax(1)
        profiler.write_if_done(last=number == steps[-1])


def profiled(trace: Path) -> tuple[set[str], int]:
    """The names of the steps in a trace, and how many matrix products it has."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if "dur" in event]
    return {name for name in names if name.startswith("step ")}, names.count("aten::mm")


@pytest.mark.parametrize("first", [1, 101])
def test_so_many_steps_after_so_many_of_this_start_are_profiled(tmp_path: Path, first: int) -> None:
    train(tmp_path, range(first, first + 8), profile_steps=2, profile_after=3)
    stem = f"steps-{first + 3:08d}-{first + 4:08d}.rank-00000"
    names = {f"{stem}.pt.trace.json.gz", f"{stem}.txt"}
    assert {path.name for path in (tmp_path / "profile").iterdir()} == names
    trace = tmp_path / "profile" / f"{stem}.pt.trace.json.gz"
    assert profiled(trace) == ({f"step {first + 3}", f"step {first + 4}"}, 2)
    table = (tmp_path / "profile" / f"{stem}.txt").read_text()
    rows = [line.split() for line in table.splitlines()]
    (product,) = [row for row in rows if row and row[0] == "aten::mm"]
    assert product[-1] == "2"  # calls
    assert "Self CPU" in table


def test_a_run_that_ends_before_leaves_what_was_profiled(tmp_path: Path) -> None:
    train(tmp_path, range(1, 5), profile_steps=10, profile_after=2)
    (trace,) = (tmp_path / "profile").glob("*.gz")
    assert trace.name.startswith("steps-00000003-00000004.")
    assert profiled(trace) == ({"step 3", "step 4"}, 2)


def test_no_step_is_profiled_unless_it_is_asked_for(tmp_path: Path) -> None:
    train(tmp_path, range(1, 10), profile_after=0)
    train(tmp_path, range(1, 4), profile_steps=2, profile_after=3)
    assert not (tmp_path / "profile").exists()


def test_other_ranks_are_profiled_where_all_are_asked_for(tmp_path: Path) -> None:
    train(tmp_path, range(1, 4), rank=1, profile_steps=1, profile_after=0)
    assert not (tmp_path / "profile").exists()
    train(tmp_path, range(1, 4), rank=1, profile_steps=1, profile_after=0, profile_ranks="all")
    assert (tmp_path / "profile" / "steps-00000001-00000001.rank-00001.txt").exists()
