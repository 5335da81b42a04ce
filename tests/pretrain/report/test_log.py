"""The log gives progress, with its repeated steps, and what was not routine."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pretrain.checkpoint import attempts
from pretrain.report import log
from tests.pretrain.report.directories import LOG


def read(tmp_path: Path, text: str) -> log.Log:
    (tmp_path / "log.txt").write_text(text)
    return log.read(tmp_path)


def test_steps_have_times_over_midnight_and_attempts_the_step_that_they_reached(
    tmp_path: Path,
) -> None:
    found = read(tmp_path, LOG)
    times = [f"{time:%d %H:%M:%S}" for time, _ in found.progress]
    # The log's clock is an hour ahead of UTC; the second attempt goes on after midnight.
    assert times == [
        *("01 06:00:00", "01 06:00:30", "01 06:01:00", "01 06:01:30"),
        *("01 22:59:50", "01 23:00:10", "01 23:00:20"),
    ]
    assert [step for _, step in found.progress] == [0, 10, 20, 30, 20, 20, 30]
    assert found.reached == {1: 30, 2: 30}


def test_an_attempt_that_resumes_from_an_older_checkpoint_has_not_reached_the_newer(
    tmp_path: Path,
) -> None:
    text = LOG.replace("from step 20", "from step 40").replace("step 20", "step 15")
    found = read(tmp_path, text.replace("step 30/100 | loss 3.6", "step 25/100 | loss 3.6"))
    assert [step for _, step in found.progress][-3:] == [40, 15, 25]
    assert found.reached[2] == 25
    assert [event.step for event in found.events][-2:] == [40, 15]


def test_lines_that_are_not_routine_are_events_of_a_kind_an_attempt_and_a_step(
    tmp_path: Path,
) -> None:
    found = [(e.kind, e.clock, e.attempt, e.step) for e in read(tmp_path, LOG).events]
    assert found == [
        ("straggler", "07:01:10", 1, 20),
        ("fault", "07:01:31", 1, 30),
        ("fallback", "23:59:58", 2, 20),
        ("resume", "00:00:10", 2, 20),
    ]
    fault = read(tmp_path, LOG).events[1]
    assert fault.time == datetime(2026, 11, 1, 6, 1, 31, tzinfo=UTC)
    assert fault.text.startswith("rank 1 failed\nTraceback") and "[hidden]@host" in fault.text
    assert "hunter2" not in fault.text


def test_a_changed_setting_is_no_fault_and_an_evaluation_that_failed_is_one(
    tmp_path: Path,
) -> None:
    text = (
        "07:00:00 changed since the checkpoint: train.max_skipped: 5 -> 10\n"
        "07:00:10 step 4/100 | loss 3.6\n"
        "07:00:20 step 4 | passkey: 4k 0.5\n"
        "07:00:30 step 8 | passkey: failed: a prompt of 64 tokens has no room\n"
    )
    found = [(event.kind, event.step, event.text) for event in read(tmp_path, text).events]
    assert found == [
        ("note", 0, "changed since the checkpoint: train.max_skipped: 5 -> 10"),
        ("fault", 4, "step 8 | passkey: failed: a prompt of 64 tokens has no room"),
    ]


def test_a_checkpoint_is_routine_wherever_its_run_lies(tmp_path: Path) -> None:
    path = "/data/my runs/an error in it/checkpoints/step-00000010"
    text = f"07:00:00 checkpoint {path} in 0.1 s, training stalled for 0.02 s\n"
    assert read(tmp_path, text).events == []


def test_what_a_launch_writes_is_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step-00000040").mkdir(parents=True)
    for number in (1, 2):
        assert attempts.claim(tmp_path, 2, 100, None).number == number
    found = log.read(tmp_path)
    assert found.reached == {1: 40, 2: 40} and found.events == []
    (first, _), (second, _) = found.progress
    assert 0 <= (second - first).total_seconds() < 60
    assert abs((datetime.now(UTC) - second).total_seconds()) < 60


def test_a_log_of_an_older_version_has_events_without_times(tmp_path: Path) -> None:
    found = read(tmp_path, "07:00:30 step 10/100 | loss 5\n07:00:31 wandb failed (x): it goes on\n")
    assert [(e.kind, e.time, e.clock, e.step) for e in found.events] == [
        ("fault", None, "07:00:31", 10)
    ]
    assert (found.progress, found.reached) == ([], {0: 10})


def test_no_log_and_a_log_of_garbage_say_nothing(tmp_path: Path) -> None:
    assert log.read(tmp_path) == log.Log()
    (tmp_path / "log.txt").write_bytes(b"\xff\x00garbage\n\n99:99 step 3/4\n")
    assert log.read(tmp_path) == log.Log()


def test_a_long_entry_is_shown_from_both_ends(tmp_path: Path) -> None:
    (event,) = read(tmp_path, f"07:00:30 failed {'x' * 5000} at the end\n").events
    assert event.text.startswith("failed xxx") and event.text.endswith("at the end")
    assert len(event.text) < 700
