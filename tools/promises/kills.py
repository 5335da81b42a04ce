"""Ranks that are forked processes, which save checkpoints until they are killed.

The parent imports torch once and forks, so that a kill takes milliseconds.
"""

from __future__ import annotations

import os
import pickle
import random
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.commit import save
from pretrain.checkpoint.load import Checkpoint, newest_good
from pretrain.checkpoint.pieces import LaneRecord, Piece
from pretrain.checkpoint.ranks import GroupRanks, Ranks, SoloRanks
from pretrain.checkpoint.verify import verify

WORDS = 30_000  # of a rank; small enough that torch starts no threads, which would not survive fork
PATIENCE = 60.0  # seconds after which a child that says nothing hangs


def weights(step: int, rank: int) -> torch.Tensor:
    """What a rank holds after a step, int64 [WORDS]."""
    return torch.arange(WORDS, dtype=torch.int64) * (step + 1) + rank


def save_step(
    root: Path, step: int, ranks: Ranks, attempt: Attempt | None = None, keep_last: int = 2
) -> None:
    """Save `weights` of this rank, and a lane."""
    piece = Piece("w", (ranks.size * WORDS,), ranks.rank * WORDS, weights(step, ranks.rank))
    lane = LaneRecord({"token": step}, {"matrix": weights(step, 7)[:1000]})
    attempt = attempt or Attempt(root.parent, 1)
    save(root, step, [piece], {ranks.rank: lane}, {"step": step}, ranks, keep_last, 50, attempt)


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
        """Both ranks' values."""
        pickle.dump(value, self._stream)
        self._stream.flush()
        other = pickle.load(self._stream)
        return [value, other] if self.rank == 0 else [other, value]

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over both ranks."""
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
            files = dist.FileStore(str(store), 2)  # type: ignore[attr-defined]
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


def save_and_die(root: Path, point: int) -> None:
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
