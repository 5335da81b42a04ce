"""Hangs of every kind, in real processes that need no torch: each is ended, with stacks."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.jobs.interpreter import python_module
from tools.promises.hangs import LIMIT, Rank

Start = Callable[..., Rank]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(rank, limit, attempt)`: a rank of the run in `tmp_path / "run"`."""
    ranks: list[Rank] = []

    def start_rank(rank: int = 0, limit: float = LIMIT, attempt: int = 7) -> Rank:
        ranks.append(Rank(tmp_path, rank, limit, attempt))
        return ranks[-1]

    (tmp_path / "run").mkdir()
    yield start_rank
    for rank in ranks:
        rank.process.kill()
        rank.process.communicate()


def state(process: int) -> str:
    """The kernel's letter; empty for a process that is no more."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def stacks(tmp_path: Path, rank: int) -> str:
    return (tmp_path / "run" / "stacks" / "attempt-000007" / f"rank-{rank:05d}.txt").read_text()


def test_a_rank_that_beats_lives_and_its_watchdog_ends_with_it(
    start: Start, tmp_path: Path
) -> None:
    rank = start()
    # Stacks that nobody asked for fill no pipe.
    for _ in range(3000):
        rank.process.send_signal(signal.SIGUSR2)
        time.sleep(2 * LIMIT / 3000)
    assert state(rank.watchdog) not in ("", "Z")
    rank.order("end")
    assert rank.end() == (0, "")
    end = time.monotonic() + 10
    while state(rank.watchdog) not in ("", "Z"):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not (tmp_path / "run" / "stacks").exists()


@pytest.mark.parametrize("way", ["hangs_in_python", "hangs_in_c_with_the_interpreters_lock"])
def test_a_rank_that_hangs_is_killed_and_its_stack_kept(
    start: Start, tmp_path: Path, way: str
) -> None:
    rank = start()
    # Launchers send signals to every process of a job; the watchdog minds none.
    for number in ("TERM", "INT", "HUP", "USR1", "USR2"):
        os.kill(rank.watchdog, getattr(signal, f"SIG{number}"))
    rank.order(way)
    code, said = rank.end()
    assert code == -signal.SIGKILL
    why = f"process {rank.process.pid}: step after step 40, no progress for "
    assert why in said and "and watchdog.step=2 ends a hang; the stacks of all ranks go to" in said
    assert f"in {way}\n" in stacks(tmp_path, 0)
    assert why in (tmp_path / "run" / "log.txt").read_text()
    ending = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (ending["attempt"], ending["code"]) == (7, 137) and why in ending["why"]


def test_a_save_that_hangs_while_steps_continue_ends_the_rank(start: Start, tmp_path: Path) -> None:
    rank = start()
    rank.order("saves_for_ever_while_steps_go_on")
    code, said = rank.end()
    assert code == -signal.SIGKILL
    why = f"process {rank.process.pid}: save after step 30, no progress for "
    assert why in said and "and watchdog.save=2 ends a hang; the stacks of all ranks" in said
    assert "in saves_for_ever_while_steps_go_on\n" in stacks(tmp_path, 0)


def test_saves_that_end_in_time_are_no_hang(start: Start, tmp_path: Path) -> None:
    rank = start()
    rank.order("saves_in_time_while_steps_go_on")
    assert rank.end() == (0, "")
    assert not (tmp_path / "run" / "stacks").exists()


def test_saves_in_the_background_are_no_sign_of_life_of_the_rank_itself(start: Start) -> None:
    rank = start()
    rank.order("waits_in_vain_beside_saves")
    code, said = rank.end()
    assert code == -signal.SIGKILL and ": step after step 40, no progress for " in said


def test_a_hang_is_noticed_so_early_that_all_are_dead_at_the_limit(start: Start) -> None:
    rank = start()
    rank.order("hangs_in_python")
    _, said = rank.end()
    waited = re.search(r"no progress for ([\d.]+) s", said)
    # Noticed within two polls of a 40th; then come 0.475 of the limit.
    assert waited and 0.52 * LIMIT <= float(waited[1]) <= 0.58 * LIMIT


def test_a_stopped_rank_is_woken_to_write_its_stack_which_the_log_says(
    start: Start, tmp_path: Path
) -> None:
    rank = start()
    rank.process.send_signal(signal.SIGSTOP)
    code, said = rank.end()
    assert code == -signal.SIGKILL
    assert "it was stopped by a signal (SIGSTOP), and was woken to write its stacks" in said
    assert 'File "<string>", line' in stacks(tmp_path, 0)


def test_the_state_of_a_rank_that_cannot_write_its_stack_is_reported(
    start: Start, tmp_path: Path
) -> None:
    rank = start()
    rank.order("hangs_where_no_signal_reaches_it")
    code, said = rank.end()
    assert code == -signal.SIGKILL
    assert "it cannot write its stacks: its state is S (sleeping)" in said
    assert "its state is S (sleeping)" in stacks(tmp_path, 0)


def test_peers_of_a_rank_that_hangs_write_their_stacks_too(start: Start, tmp_path: Path) -> None:
    hanging, beating = start(0), start(1, limit=10.0)
    hanging.order("hangs_in_python")
    assert hanging.end()[0] == beating.end()[0] == -signal.SIGKILL
    assert "in hangs_in_python\n" in stacks(tmp_path, 0)
    assert "ends a hang" in stacks(tmp_path, 0)
    assert 'File "<string>", line' in stacks(tmp_path, 1)
    assert "ends a hang" not in stacks(tmp_path, 1)
    why = (tmp_path / "run" / "stacks" / "attempt-000007" / "why.txt").read_text()
    assert why.startswith("rank 0 on ")


def test_stacks_of_another_attempt_end_nobody(start: Start, tmp_path: Path) -> None:
    for attempt in (6, 8):
        (tmp_path / "run" / "stacks" / f"attempt-{attempt:06d}").mkdir(parents=True)
    rank = start(limit=10.0)
    time.sleep(1.5)
    rank.order("end")
    assert rank.end() == (0, "")


def test_a_hang_before_the_attempt_has_a_number_is_kept_apart(start: Start, tmp_path: Path) -> None:
    rank = start(rank=3, attempt=0)
    code, said = rank.end()
    assert code == -signal.SIGKILL and "start after step 0, no progress" in said
    assert "; its stacks go to " in said and said.rstrip().endswith("starting, and it is killed")
    (path,) = (tmp_path / "run" / "stacks" / "starting").glob("rank-00003-*.txt")
    assert path.name.endswith(f"-{os.uname().nodename}-{rank.process.pid}.txt")
    assert 'File "<string>", line' in path.read_text()
    assert not (tmp_path / "run" / "exit.json").exists()


def test_a_hang_is_ended_where_nothing_can_be_written(start: Start, tmp_path: Path) -> None:
    (tmp_path / "run" / "stacks").write_text("in the way")
    (tmp_path / "run" / "log.txt").mkdir()
    rank = start()
    rank.order("hangs_in_python")
    code, said = rank.end()
    assert code == -signal.SIGKILL
    assert "the watchdog cannot write: " in said


def test_a_rank_whose_watchdog_was_killed_fails(start: Start) -> None:
    rank = start()
    os.kill(rank.watchdog, signal.SIGKILL)
    code, said = rank.end()
    assert code == 1
    assert f"WatchdogError: the watchdog of this rank (process {rank.watchdog}) was killed" in said


def test_a_job_that_was_suspended_as_a_whole_continues(start: Start, tmp_path: Path) -> None:
    rank = start()
    time.sleep(0.5)  # both are at work
    both = (rank.watchdog, rank.process.pid)
    for process in both:
        os.kill(process, signal.SIGSTOP)
    time.sleep(2 * LIMIT)
    for process in both:
        os.kill(process, signal.SIGCONT)
    time.sleep(0.5)
    rank.order("end")
    assert rank.end() == (0, "")
    assert not (tmp_path / "run" / "stacks").exists()


def test_the_watchdog_does_not_load_torch() -> None:
    code = "import sys, pretrain.jobs.watchdog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_backlog_of_beats_that_is_read_in_parts_ends_no_watchdog(tmp_path: Path) -> None:
    beats, reports = os.pipe()
    stacks, dumps = os.pipe()
    # As with pages of 64 KiB (arm64), where a pipe holds more than is read at once.
    fcntl.fcntl(reports, fcntl.F_SETPIPE_SZ, 1 << 20)
    line = b'[1, "step", 1, 0, 0]\n'
    count = (1 << 16) // len(line) + 1
    assert (1 << 16) % len(line), "the last line is cut"
    os.write(reports, count * line)
    limits = dict.fromkeys(("start", "step", "save"), 1000.0)
    arguments = json.dumps([str(tmp_path), 0, limits, beats, stacks])
    with subprocess.Popen(
        [*python_module("pretrain.jobs.watchdog"), arguments],
        pass_fds=(beats, stacks),
        stderr=subprocess.PIPE,
        text=True,
    ) as watchdog:
        while select.select([beats], [], [], 0)[0] and watchdog.poll() is None:
            time.sleep(0.05)
        os.close(reports)  # as the rank's end does
        _, said = watchdog.communicate(timeout=30)
    for end in (beats, stacks, dumps):
        os.close(end)
    assert (watchdog.returncode, said) == (0, "")
