"""Failures of workers are reported by their parent."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep import config
from data_prep.pipeline.stages import Stage
from data_prep.pipeline.workers import WorkerLostError, Workers
from data_prep.pipeline.workspace import Work


class Noise(Stage):
    name = "noise"
    label = "working"

    def measure(self) -> list[int]:
        return [10] * self.config.shards.count

    def do(self, unit: int) -> Any:
        print("noise of a worker")
        return {"unit": unit, "process": os.getpid()}


class Later(Noise):
    name = "later"

    def measure(self) -> list[int]:
        return [self.work.read("noise", unit)["unit"] for unit in range(self.config.shards.count)]


class Last(Noise):
    name = "last"

    def do(self, unit: int) -> Any:
        """The first unit takes as long as all the others."""
        deadline = time.monotonic() + 30
        while unit == 0 and sum(self.done()) < len(self.sizes) - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        return super().do(unit)


class Trouble(Noise):
    name = "trouble"

    def do(self, unit: int) -> Any:
        if unit == 3:
            raise KeyError("unit three")
        if unit == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().do(unit)


class Endless(Noise):
    name = "endless"

    def do(self, unit: int) -> Any:
        if unit == 0:
            self.work.finish("noise", 0, super().do(0))
            time.sleep(3600)
        while not self.work.marker("noise", 0).exists():
            time.sleep(0.01)
        raise KeyError("while another works")


def started(directory: Path, units: int, workers: int) -> tuple[Workers, Work]:
    (directory / "work").mkdir(exist_ok=True)
    words = [f"output={directory}", f"shards.count={units}", "sources=[{name: s, paths: ['*']}]"]
    work = Work(directory, [])
    return Workers(config.load(None, words), work, workers), work


def found(work: Work, stage: str, units: int) -> list[Any]:
    return [work.read(stage, unit) for unit in range(units)]


def test_units_are_done_once_and_quietly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, work = started(tmp_path, 2, 2)
    with first:
        first.run(Noise)
    before = found(work, "noise", 2)
    again, _ = started(tmp_path, 3, 1)
    with again:
        again.run(Noise)
        again.run(Noise)
    assert found(work, "noise", 2) == before
    assert work.read("noise", 2)["process"] != os.getpid()
    assert capfd.readouterr() == ("", "")
    assert "noise of a worker" in (tmp_path / "work" / "workers.log").read_text()


def test_a_stage_reads_what_the_one_before_it_left_in_the_same_process(tmp_path: Path) -> None:
    workers, work = started(tmp_path, 10, 1)
    with workers:
        workers.run(Noise)
        workers.run(Later)
    made = found(work, "noise", 10) + found(work, "later", 10)
    assert len({unit["process"] for unit in made}) == 1
    assert [unit["unit"] for unit in made] == [*range(10), *range(10)]


def test_who_is_free_takes_the_next_unit(tmp_path: Path) -> None:
    workers, work = started(tmp_path, 8, 2)
    with workers:
        workers.run(Last)
    first, *others = (unit["process"] for unit in found(work, "last", 8))
    assert first not in others and len(set(others)) == 1


def test_an_exception_of_a_worker_is_raised_here(tmp_path: Path) -> None:
    workers, _ = started(tmp_path, 4, 2)
    with pytest.raises(KeyError, match="unit three"), workers:
        workers.run(Trouble)


def test_a_killed_worker_ends_the_run_with_a_message(tmp_path: Path) -> None:
    (tmp_path / "work" / "trouble").mkdir(parents=True)
    workers, work = started(tmp_path, 6, 2)
    work.finish("trouble", 3, {})
    message = r"killed during 'working'.*continues"
    with pytest.raises(WorkerLostError, match=message), workers:
        workers.run(Trouble)


def test_an_exception_ends_workers_that_are_at_work(tmp_path: Path) -> None:
    workers, work = started(tmp_path, 2, 2)
    with pytest.raises(KeyError, match="while another works"), workers:
        workers.run(Endless)
    process = work.read("noise", 0)["process"]
    assert not Path(f"/proc/{process}").exists()
