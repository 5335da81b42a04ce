"""Attempts: numbers that are given once, progress that is counted, endings that are recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.dataset.settings import EXIT_MISTAKE, SettingsError
from pretrain.checkpoint.attempts import (
    Attempt,
    RunDirectoryError,
    claim,
    committed_step,
    failures_recorded,
)
from pretrain.checkpoint.manifest import PASSED_OVER

STEPS = 100


def record(run: Path, number: int) -> dict[str, Any]:
    text = (run / "attempts" / f"{number:06d}.json").read_text()
    read: dict[str, Any] = json.loads(text)
    return read


def commit(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


def claims(run: Path, count: int, limit: int = 3) -> list[bool]:
    """Whether each of the next attempts is futile."""
    return [claim(run, 2, STEPS, limit).futile != "" for _ in range(count)]


def test_an_attempt_says_when_where_and_from_which_step_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    commit(tmp_path, 40)
    (tmp_path / "checkpoints" / "step-00000050.000001.writing").mkdir()
    assert claim(tmp_path, 6, STEPS, 3) == Attempt(tmp_path, 1)
    written = record(tmp_path, 1)
    assert written.pop("time").endswith("+00:00")
    assert written == {
        "attempt": 1, "host": os.uname().nodename, "process": os.getpid(), "job": "4711",
        "restart": "2", "ranks": 6, "step": 40, "counts": True,
    }  # fmt: skip


def test_processes_that_start_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from pretrain.checkpoint.attempts import claim\n"
        "sys.stdin.readline()\n"
        "for _ in range(25): print(claim(pathlib.Path(sys.argv[1]), 1, 100, 99).number)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(4)
    ]  # fmt: skip
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    given = [int(word) for process in processes for word in process.communicate()[0].split()]
    assert sorted(given) == list(range(1, 101))


def test_so_many_attempts_in_a_row_without_progress_make_the_next_one_futile(
    tmp_path: Path,
) -> None:
    assert claims(tmp_path, 3) == [False] * 3
    commit(tmp_path, 10)
    assert claims(tmp_path, 2) == [False] * 2
    commit(tmp_path, 11)
    assert claims(tmp_path, 3) == [False] * 3
    futile = claim(tmp_path, 2, STEPS, 3)
    assert futile.futile.startswith(
        "no progress: attempts 6 to 8 started from step 11, and none committed a later checkpoint"
    )


def test_after_a_futile_attempt_the_user_has_as_many_again(tmp_path: Path) -> None:
    assert claims(tmp_path, 9, limit=3) == [False, False, False, True, False, False, False, True,
                                            False]  # fmt: skip


def test_starting_a_finished_run_is_never_futile(tmp_path: Path) -> None:
    commit(tmp_path, STEPS)
    assert claims(tmp_path, 5) == [False] * 5
    # With more steps to do, those starts were no attempts at them.
    assert claim(tmp_path, 2, STEPS + 1, 3).futile == ""


def test_an_attempt_that_was_killed_while_it_claimed_is_passed_over(tmp_path: Path) -> None:
    assert claims(tmp_path, 2) == [False] * 2
    (tmp_path / "attempts" / "000003.json").write_text('{"attempt": 3, "time"')
    assert claims(tmp_path, 2) == [False, True]
    assert record(tmp_path, 4)["attempt"] == 4


def test_attempts_that_end_with_a_mistake_of_the_user_are_no_tries(tmp_path: Path) -> None:
    for _ in range(5):
        attempt = claim(tmp_path, 2, STEPS, 3)
        assert attempt.futile == ""
        with (
            pytest.raises(SettingsError),
            failures_recorded(attempt, lambda error: EXIT_MISTAKE),
        ):
            raise SettingsError(["model.segment: 256 -> 16"])
    # Nor do they hide those around them.
    assert claims(tmp_path, 2) == [False] * 2
    claim(tmp_path, 2, STEPS, 3).end(EXIT_MISTAKE, "a mistake")
    assert claims(tmp_path, 2) == [False, True]


@pytest.mark.parametrize("text", ["", "[]", "7", '{"attempt": 2}', "\0\0"])
def test_a_record_of_an_attempt_that_cannot_be_read_costs_nothing(
    tmp_path: Path, text: str
) -> None:
    assert claims(tmp_path, 2) == [False] * 2
    (tmp_path / "attempts" / "000002.json").write_text(text)
    assert claims(tmp_path, 3) == [False, False, True]
    assert Attempt(tmp_path, 1).superseded() is not None


def test_a_newer_attempt_supersedes_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = claim(tmp_path, 2, STEPS, 3)
    assert old.superseded() is None
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    new = claim(tmp_path, 2, STEPS, 3)
    assert new.superseded() is None
    reason = old.superseded()
    assert reason is not None and reason.startswith(
        f"attempt 1 of {tmp_path} was superseded: attempt 2 began at "
        f"{record(tmp_path, 2)['time']} on {os.uname().nodename}, Slurm job 4712"
    )


def test_the_newest_attempt_alone_records_how_it_ended(tmp_path: Path) -> None:
    old = claim(tmp_path, 2, STEPS, 3)
    commit(tmp_path, 40)
    old.end(75, "stopped")
    ending = {"attempt": 1, "code": 75, "step": 40, "why": "stopped"}
    assert json.loads((tmp_path / "exit.json").read_text()) == ending
    new = claim(tmp_path, 2, STEPS, 3)
    old.end(0, "finished")
    assert json.loads((tmp_path / "exit.json").read_text()) == ending
    new.end(0, "finished")
    assert json.loads((tmp_path / "exit.json").read_text())["attempt"] == 2


def test_a_failure_is_recorded_logged_and_raised(tmp_path: Path) -> None:
    attempt = claim(tmp_path, 2, STEPS, 3)
    with pytest.raises(ValueError), failures_recorded(attempt, lambda error: 7):
        raise ValueError("shard-00003.tar: sha256 differs")
    assert json.loads((tmp_path / "exit.json").read_text()) == {
        "attempt": 1, "code": 7, "step": 0, "why": "shard-00003.tar: sha256 differs"
    }  # fmt: skip
    assert (tmp_path / "log.txt").read_text().endswith(" shard-00003.tar: sha256 differs\n")


def test_of_a_failure_after_a_hang_the_hang_is_the_reason(tmp_path: Path) -> None:
    attempt = claim(tmp_path, 2, STEPS, 3)
    attempt.stacks.mkdir(parents=True)
    attempt.hang.write_text("rank 1 on n7: step after step 4, no progress for 600.0 s")
    with pytest.raises(RuntimeError), failures_recorded(attempt, lambda error: 1):
        raise RuntimeError("Connection closed by peer")
    ending = json.loads((tmp_path / "exit.json").read_text())
    assert (ending["code"], ending["why"][:13]) == (137, "rank 1 on n7:")
    attempt.end(0, "finished")
    assert json.loads((tmp_path / "exit.json").read_text())["why"] == "finished"


def test_a_run_directory_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"run\.directory: .*/file.*: Not a directory"):
        claim(tmp_path / "file" / "run", 1, STEPS, 3)


def test_the_committed_step_is_that_of_the_newest_name(tmp_path: Path) -> None:
    assert committed_step(tmp_path) == 0
    for step in (4, 120, 8):
        commit(tmp_path, step)
    assert committed_step(tmp_path) == 120


def test_behind_a_checkpoint_that_was_passed_over_every_later_one_is_progress(
    tmp_path: Path,
) -> None:
    for step in (40, 50):
        commit(tmp_path, step)
    assert claims(tmp_path, 3) == [False] * 3
    (tmp_path / "checkpoints" / "step-00000050" / PASSED_OVER).write_text("a reason\n")
    assert committed_step(tmp_path) == 40
    assert claims(tmp_path, 3) == [False] * 3
    commit(tmp_path, 45)
    assert claims(tmp_path, 4) == [False] * 3 + [True]
