"""What happens in a worker is told by its parent."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from data_prep import config, engine
from data_prep.engine import WorkerLostError
from data_prep.stages import UnitStep
from data_prep.workspace import Work


class Trouble(UnitStep):
    stage = "trouble"
    label = "working"

    def do(self, unit: int) -> Any:
        if unit == 3:
            raise KeyError("unit three")
        if unit == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        print("noise of a worker")
        return {"unit": unit, "process": os.getpid()}


def step(directory: Path, units: int) -> Trouble:
    (directory / "work").mkdir(exist_ok=True)
    words = [f"output={directory}", "sources=[{name: s, paths: ['*']}]"]
    made = Trouble(config.load(None, words), Work(directory, []))
    made.sizes = [10] * units
    return made


def test_units_are_done_once_and_quietly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = step(tmp_path, 2)
    engine.run_stage(first, 2)
    before = [first.work.read("trouble", unit) for unit in range(2)]
    again = step(tmp_path, 3)
    assert again.done() == [True, True, False]
    engine.run_stage(again, 1)
    assert [again.work.read("trouble", unit) for unit in range(2)] == before
    assert again.done() == [True, True, True]
    assert capfd.readouterr() == ("", "")
    assert "noise of a worker" in (tmp_path / "work" / "workers.log").read_text()


def test_an_exception_of_a_worker_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="unit three"):
        engine.run_stage(step(tmp_path, 4), 2)


def test_a_killed_worker_ends_the_run_with_a_message(tmp_path: Path) -> None:
    (tmp_path / "work" / "trouble").mkdir(parents=True)
    stepping = step(tmp_path, 6)
    stepping.work.finish("trouble", 3, {})
    with pytest.raises(WorkerLostError, match=r"killed while it was at 'working'.*continues"):
        engine.run_stage(stepping, 2)
