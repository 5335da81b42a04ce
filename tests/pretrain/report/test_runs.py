"""A run is read as far as it is there."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pretrain.report import runs
from tests.pretrain.report.directories import train, written


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (None, "no end recorded"),
        ({"attempt": 1, "code": 0, "why": "finished"}, "no end recorded"),
        ({"attempt": 2, "code": 0, "why": "finished"}, "finished"),
        ({"attempt": 2, "code": 75, "why": "SIGTERM"}, "stopped"),
        ({"attempt": 2, "code": 1, "why": "s3://u:hunter2@h failed"}, "failed"),
    ],
)
def test_what_became_of_a_run_is_what_its_newest_attempt_recorded(
    tmp_path: Path, end: dict[str, object] | None, state: str
) -> None:
    run = runs.read(written(tmp_path / "run", [train(5)], end=end))
    first, second = run.attempts
    assert run.state == state
    if end and end["attempt"] == 2:
        assert second.ended == str(end["why"]).replace("u:hunter2", "[hidden]")
    if end is None:
        assert (first.began, first.host, first.job, first.ranks, first.start, first.reached) == (
            datetime(2026, 11, 1, 6, tzinfo=UTC), "node1", "77", 2, 0, 30,
        )  # fmt: skip
        assert first.ended.startswith("rank 1 failed") and second.ended == ""


def test_the_rank_that_hung_is_how_an_attempt_ended(tmp_path: Path) -> None:
    directory = written(tmp_path / "run", log="")
    (directory / "stacks/attempt-000001").mkdir(parents=True)
    (directory / "stacks/attempt-000001/why.txt").write_text("rank 1 hung in step 30")
    first, second = runs.read(directory).attempts
    assert (first.ended, second.ended) == ("rank 1 hung in step 30", "")


def test_an_attempt_that_finished_or_ended_with_a_mistake_has_a_last_word_once_others_followed(
    tmp_path: Path,
) -> None:
    log = (
        "07:00:00 attempt 1 began at 2026-11-01T06:00:00+00:00 on node1, 2 ranks, from step 0\n"
        "07:00:05   - data.train: none: there is no such directory\n"
        "  - model.d_model: 16 -> 32\n"
        "07:00:10 attempt 2 began at 2026-11-01T06:00:10+00:00 on node1, 2 ranks, from step 0\n"
        "07:00:30 wandb failed (x): metrics.jsonl still has every record\n"
        "07:00:40 finished: 100 steps, 1,280 tokens\n"
    )
    directory = written(tmp_path / "run", log=log, end={"attempt": 3, "code": 0, "why": "finished"})
    assert [attempt.ended for attempt in runs.read(directory).attempts] == ["", "finished"]
    (directory / "attempts/000001.mistake").touch()
    first, second = runs.read(directory).attempts
    assert first.ended.startswith("- data.train: none") and "d_model" in first.ended
    assert second.ended == "finished"


def test_a_run_with_nothing_in_it_or_with_damaged_files_is_read(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    empty = runs.read(tmp_path)
    assert (empty.state, empty.touched, empty.steps) == ("never started", None, None)
    assert (empty.records, empty.attempts, empty.results) == ({}, [], [])
    directory = written(tmp_path / "run", [train(5), train(10)], configuration="{[")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('\x00\x00\n[1]\n{"kind": "train", "step": 15, "lo')
    for name in ("attempts/000001.json", "exit.json", "eval-5-novels.json"):
        (directory / name).write_text('{"step": [')
    os.utime(directory / "log.txt", (0, 0))
    broken = runs.read(directory)
    assert [record["step"] for record in broken.train] == [5, 10]
    assert broken.configuration == {} and broken.results == []
    assert [attempt.start for attempt in broken.attempts] == [None, 20]
    assert broken.touched is not None and broken.touched.year > 2000


def test_results_are_known_by_name_and_step(tmp_path: Path) -> None:
    directory = written(tmp_path / "run")
    for name in ("eval-300-novels-2.json", "passkey-20.json", "run.json", "notes.json"):
        (directory / name).write_text('{"data": "x"}')
    found = [(one.file, one.name, one.step) for one in runs.read(directory).results]
    assert found == [("passkey-20.json", "passkey", 20), ("eval-300-novels-2.json", "eval", 300)]
