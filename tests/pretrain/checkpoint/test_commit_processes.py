"""Ranks that are processes: killed at any moment of a save, or out of disk space.

Nothing half is loaded, nothing good is lost, nobody hangs. Run as a script this file is the parent
of the ranks: it imports torch once and forks them, so that an attempt takes milliseconds.
"""

from __future__ import annotations

import json
import os
import pickle
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoint.attempts import Attempt, SupersededError, claim
from pretrain.checkpoint.commit import save, take_over
from pretrain.checkpoint.load import Checkpoint, newest_good
from pretrain.checkpoint.pieces import LaneRecord, Piece
from pretrain.checkpoint.ranks import GroupRanks, Ranks, SoloRanks
from pretrain.checkpoint.verify import verify

WORDS = 30_000  # of a rank; small enough that torch starts no threads, which would not survive fork
PATIENCE = 60.0  # seconds after which a child that says nothing hangs


def weights(step: int, rank: int) -> torch.Tensor:
    return torch.arange(WORDS, dtype=torch.int64) * (step + 1) + rank


def save_step(root: Path, step: int, ranks: Ranks, attempt: Attempt | None = None) -> None:
    piece = Piece("w", (ranks.size * WORDS,), ranks.rank * WORDS, weights(step, ranks.rank))
    lane = LaneRecord({"token": step}, {"matrix": weights(step, 7)[:1000]})
    attempt = attempt or Attempt(root.parent, 1)
    save(root, step, [piece], {ranks.rank: lane}, {"step": step}, ranks, 2, 50, attempt)


def check(path: Path) -> int:
    """The checkpoint's step, if every bit of it is that step's."""
    with Checkpoint(path) as checkpoint:
        step = checkpoint.step
        expected = torch.cat([weights(step, rank) for rank in range(checkpoint.ranks)])
        assert checkpoint.tensor("w").equal(expected)
        for lane in range(checkpoint.ranks):
            assert checkpoint.lane(lane).place == {"token": step}
            assert checkpoint.lane(lane).tensors["matrix"].equal(weights(step, 7)[:1000])
    return step


class SocketRanks:
    """Two ranks that are processes, over a socket pair."""

    size = 2

    def __init__(self, rank: int, end: socket.socket) -> None:
        self.rank = rank
        self._stream = end.makefile("rwb")

    def gather(self, value: Any) -> list[Any]:
        pickle.dump(value, self._stream)
        self._stream.flush()
        other = pickle.load(self._stream)
        return [value, other] if self.rank == 0 else [other, value]

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]


class RankPair:
    """Two forked ranks that resume and then save one step after another until they are killed."""

    def __init__(self, root: Path, store: Path | None) -> None:
        self._reader, writer = os.pipe()
        ends = socket.socketpair()
        self._children = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                _run_rank(root, rank, ends[rank], ends[1 - rank], store, writer)
            self._children.append(child)
        os.close(writer)
        for end in ends:
            end.close()
        self._told = b""

    def wait_for_commit(self) -> None:
        """Return once a save of this pair has returned on rank 0."""
        ready, _, _ = select.select([self._reader], [], [], PATIENCE)
        assert ready, "no save was committed: the ranks hang"
        self._told += os.read(self._reader, 1 << 16)
        assert self._told, "the ranks died before a save was committed"

    def kill(self, choose: random.Random) -> int:
        """Kill both ranks, one a little before the other; the last step that was committed."""
        for index, child in enumerate(choose.sample(self._children, 2)):
            time.sleep(index * choose.random() * 0.005)
            os.kill(child, signal.SIGKILL)
        for child in self._children:
            os.waitpid(child, 0)
        while data := os.read(self._reader, 1 << 16):
            self._told += data
        os.close(self._reader)
        return max(map(int, self._told.split()), default=0)


def _run_rank(
    root: Path, rank: int, mine: socket.socket, other: socket.socket, store: Path | None, told: int
) -> None:
    """The life of a forked rank; it never returns."""
    other.close()
    try:
        ranks: Ranks = SocketRanks(rank, mine)
        if store is not None:
            files = dist.FileStore(str(store), 2)
            dist.init_process_group("gloo", store=files, rank=rank, world_size=2)
            ranks = GroupRanks()
        found = newest_good(root, ranks)
        step = check(found.path) if found.path is not None else 0
        while True:
            step += 1
            save_step(root, step, ranks)
            if rank == 0:
                os.write(told, f"{step}\n".encode())
    except BaseException as error:
        # The other rank's death is the usual end; anything else shows as "died before ...".
        print(f"rank {rank}: {error!r}", file=sys.stderr)
    finally:
        os._exit(1)


def wait_for(root: Path, suffix: str) -> None:
    """Return when a save has reached the state whose directories bear `suffix`."""
    deadline = time.monotonic() + PATIENCE
    while not any(entry.suffix == suffix for entry in root.iterdir()):
        assert time.monotonic() < deadline


def assert_all_whole(root: Path, committed: int) -> int:
    """The newest step, at least `committed`; every directory of a step's name must be whole."""
    directories = [entry for entry in root.iterdir() if not entry.suffix]
    for directory in directories:
        assert verify(directory, SoloRanks()) is None
    found = newest_good(root, SoloRanks())
    if found.path is None:
        assert committed == 0
        return 0
    newest = check(found.path)
    assert newest >= committed, f"step {committed} was committed, found {newest}"
    assert len(directories) >= min(newest, 2), "more was pruned than keep_last allows"
    return newest


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
            _killed_at(root, point)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), f"the save failed at point {point}"
        finished = code == 0
        newest = assert_all_whole(root, 3 if finished else 2)
        save_step(root, newest + 1, SoloRanks())
        assert not [entry for entry in root.iterdir() if entry.suffix]
        shutil.rmtree(root)
    return {"points": point - 1}


def _killed_at(root: Path, point: int) -> None:
    """Save step 3 and die at the `point`-th event below `root`; it never returns."""
    left = point
    try:
        newest_good(root, SoloRanks())

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.scandir"}:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        save_step(root, 3, SoloRanks())
        os._exit(0)
    finally:
        os._exit(1)


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
