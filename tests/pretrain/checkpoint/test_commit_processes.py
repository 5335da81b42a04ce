"""Ranks that are processes: killed at any moment of a save, or out of disk space.

Nothing half is loaded, nothing good is lost, nobody hangs. Run as a script this file is the parent
of the ranks: it imports torch once and forks them, so that an attempt takes milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.attempts import Attempt, SupersededError, claim
from pretrain.checkpoint.commit import take_over
from pretrain.checkpoint.load import newest_good
from pretrain.checkpoint.ranks import SoloRanks
from tools.promises.kills import (
    PATIENCE,
    RankPair,
    SocketRanks,
    assert_all_whole,
    check,
    save_and_die,
    save_step,
    wait_for,
)


def campaign(root: Path, seed: int, kills: int) -> dict[str, int]:
    """Kill and resume; how often each state was struck, and the last step."""
    choose = random.Random(seed)
    struck: Counter[str] = Counter()
    newest = 0
    root.mkdir()
    for index in range(kills):
        store = root.with_name(f"store-{index}") if index % 5 == 4 else None
        pair = RankPair(root, store)
        moment = choose.choice(["any", "any", "start", ".writing", ".trash"])
        if moment != "start":
            pair.wait_for_commit()
        if moment in ("any", "start"):
            time.sleep(choose.random() * 0.15)
        else:
            wait_for(root, moment)
            time.sleep(choose.random() * (0.03 if moment == ".writing" else 0.0005))
        committed = max(newest, pair.kill(choose))
        struck.update({entry.suffix for entry in root.iterdir()})
        newest = assert_all_whole(root, committed)
    save_step(root, newest + 1, SoloRanks())
    assert not [entry for entry in root.iterdir() if entry.suffix]
    return {**struck, "kills": kills, "newest": newest}


def points(root: Path) -> dict[str, int]:
    """Kill a save at each of its calls that open files or change directories, one by one."""
    prepared = root.with_name("prepared")
    for step in (1, 2):
        save_step(prepared, step, SoloRanks())
    shutil.copytree(prepared / "step-00000001", prepared / "step-00000000.000001.trash")
    shutil.copytree(prepared / "step-00000001", prepared / "step-00000003.000001.writing")
    point, finished = 0, False
    while not finished:
        point += 1
        shutil.copytree(prepared, root)
        child = os.fork()
        if child == 0:
            save_and_die(root, point)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), f"the save failed at point {point}"
        finished = code == 0
        newest = assert_all_whole(root, 3 if finished else 2)
        save_step(root, newest + 1, SoloRanks())
        assert not [entry for entry in root.iterdir() if entry.suffix]
        shutil.rmtree(root)
    return {"points": point - 1}


def left_over(root: Path) -> dict[str, int]:
    """Stop an attempt at each such call of its save, let a newer one begin, and wake it again.

    It is woken when the newer one has looked for a checkpoint, or only when that one has committed
    two more. How often the old one's step was there when the newer one looked, and how often not.
    """
    ends: Counter[str] = Counter()
    for newer_commits in (False, True):
        point, finished = 0, False
        while not finished:
            point += 1
            old = claim(root.parent, 1, 1000, 5)
            for step in (1, 2):
                save_step(root, step, SoloRanks(), old)
            child = os.fork()
            if child == 0:
                _stopped_at(root, point, old)
            _, status = os.waitpid(child, os.WUNTRACED)
            finished = not os.WIFSTOPPED(status)
            if not finished:
                ends[_superseded_and_woken(root, child, newer_commits)] += 1
            shutil.rmtree(root)
    return {**ends}


def _superseded_and_woken(root: Path, stopped: int, newer_commits: bool) -> str:
    """What became of the step that the stopped process was about to save."""
    newer = claim(root.parent, 1, 1000, 5)
    take_over(root, newer)
    found = newest_good(root, SoloRanks())
    assert found.path is not None and found.passed_over == ()
    seen = check(found.path)
    if newer_commits:
        for step in (seen + 1, seen + 2):
            save_step(root, step, SoloRanks(), newer)
    before = {entry.name for entry in root.iterdir() if not entry.suffix}
    os.kill(stopped, signal.SIGCONT)
    code = os.waitstatus_to_exitcode(os.waitpid(stopped, 0)[1])
    after = {entry.name for entry in root.iterdir() if not entry.suffix}
    assert after <= before, f"committed {after - before}"
    assert assert_all_whole(root, seen) == seen + (2 if newer_commits else 0)
    if seen == 3:  # its last act before it was superseded
        if before != after:
            # Stopped between its last look and the renaming of a checkpoint that it may prune.
            assert before - after == {"step-00000001"}
            return "pruned"
        return "committed"
    assert (code, before) == (2, after)
    return "refused"


def _stopped_at(root: Path, point: int, attempt: Attempt) -> None:
    """Save step 3, stopped at the `point`-th event below `root`; it never returns.

    The exit code is 2 where the attempt was told that it was superseded.
    """
    left = point
    code = 1
    try:

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.scandir",
                         "os.listdir"}:  # fmt: skip
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGSTOP)

        sys.addaudithook(count)
        save_step(root, 3, SoloRanks(), attempt)
        code = 0
    except SupersededError:
        code = 2
    finally:
        os._exit(code)


def full_disks(root: Path) -> dict[str, list[str]]:
    """What each rank was told when one of them may not write files over so many bytes."""
    told = {}
    save_step(root, 1, SoloRanks())
    for rank in range(2):
        for limit in (0, 100, 5_000, 200_000):
            told[f"rank {rank}, {limit} bytes"] = _save_with_a_limit(root, rank, limit)
            assert [entry.name for entry in root.iterdir()] == ["step-00000001"]
            assert assert_all_whole(root, 1) == 1
    assert _save_with_a_limit(root, 0, 10_000_000) == ["no error"] * 2
    assert assert_all_whole(root, 2) == 2
    return told


def _save_with_a_limit(root: Path, full_rank: int, limit: int) -> list[str]:
    ends = socket.socketpair()
    children = []
    for rank in range(2):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            told = "no error"
            if rank == full_rank:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                save_step(root, 2, SocketRanks(rank, ends[rank]))
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
            finally:
                os.write(writer, told.encode())
                os._exit(0)
        os.close(writer)
        children.append((child, reader))
    texts = []
    for child, reader in children:
        assert select.select([reader], [], [], PATIENCE)[0], "a rank hangs"
        with os.fdopen(reader, "rb") as stream:
            texts.append(stream.read().decode())
        os.waitpid(child, 0)
    return texts


def run_script(*words: str) -> dict[str, Any]:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.timeout(300)
def test_sixty_kills_of_two_ranks_lose_nothing(tmp_path: Path) -> None:
    counts = run_script("campaign", str(tmp_path / "checkpoints"), "1", "60")
    assert counts["kills"] == 60
    assert counts[".writing"] >= 8
    assert counts[".trash"] >= 2
    assert counts["newest"] >= 30


@pytest.mark.timeout(300)
def test_a_kill_at_any_system_call_of_a_save_loses_nothing(tmp_path: Path) -> None:
    assert run_script("points", str(tmp_path / "checkpoints"))["points"] >= 40


@pytest.mark.timeout(300)
def test_an_attempt_that_was_left_over_commits_and_prunes_nothing_once_a_newer_one_looked(
    tmp_path: Path,
) -> None:
    ends = run_script("left over", str(tmp_path / "checkpoints"))
    assert ends["refused"] >= 40
    assert ends["committed"] >= 6
    assert ends["pruned"] == 1


@pytest.mark.timeout(300)
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_touches_nothing(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    told = run_script("full", str(root))
    assert len(told) == 8
    for case, texts in told.items():
        rank = case.split(",")[0]
        expected = (
            f"CheckpointError: {root}/step-00000002 could not be saved: File too large ({rank}); "
            "earlier checkpoints are untouched"
        )
        assert texts == [expected] * 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[2])
    if sys.argv[1] == "campaign":
        print(json.dumps(campaign(where, int(sys.argv[3]), int(sys.argv[4]))))
    elif sys.argv[1] == "points":
        print(json.dumps(points(where)))
    elif sys.argv[1] == "left over":
        print(json.dumps(left_over(where)))
    else:
        print(json.dumps(full_disks(where)))
