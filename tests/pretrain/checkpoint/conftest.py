"""Ranks as threads, and tensors to store."""

from __future__ import annotations

import itertools
import pickle
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.commit import save
from pretrain.checkpoint.pieces import LaneRecord, Piece
from pretrain.checkpoint.ranks import Ranks

T = TypeVar("T")
RunRanks = Callable[[int, Callable[[Ranks], T]], list[T]]


class ThreadRanks:
    """One of several ranks that are threads of this process."""

    def __init__(
        self, rank: int, size: int, barrier: threading.Barrier, board: list[bytes]
    ) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._board = barrier, board

    def gather(self, value: T) -> list[T]:
        self._board[self.rank] = pickle.dumps(value)
        self._barrier.wait()
        values = [pickle.loads(one) for one in self._board]
        self._barrier.wait()
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks[Any]:
    """`run_ranks(size, work)`: each rank's `work(ranks)`, or the exception that it raised."""

    def run(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
        barrier, board, results = threading.Barrier(size, timeout=30), [b""] * size, [None] * size

        def one(rank: int) -> None:
            try:
                results[rank] = work(ThreadRanks(rank, size, barrier, board))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run


@pytest.fixture(scope="session")
def tensors() -> Callable[[int], dict[str, Tensor]]:
    """`tensors(seed)`: one of each kind that a trainer stores, any bit pattern among them."""

    def make(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def bits(count: int) -> Tensor:
            return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)

        return {
            "layers.0.weight/param": bits(7 * 13 * 4).view(torch.float32).reshape(7, 13),
            "layers.0.weight/half": bits(91 * 2).view(torch.bfloat16).reshape(7, 13),
            "layers.0.gate": bits(4 * 4).view(torch.float32),
            "counts": bits(3 * 5 * 8).view(torch.int64).reshape(3, 5),
            "random": bits(501),
            "mask": bits(9) > 127,
            "step": torch.tensor(seed, dtype=torch.int64),
            "empty": torch.zeros(0, 4),
        }

    return make


def random_pieces(tensors: Mapping[str, Tensor], size: int, seed: int) -> list[list[Piece]]:
    """Each rank's pieces: random cuts, also empty ones, dealt to random ranks in random order."""
    choose = random.Random(seed)
    ranks: list[list[Piece]] = [[] for _ in range(size)]
    for name, tensor in tensors.items():
        count = tensor.numel()
        cuts = sorted([0, count, *(choose.randint(0, count) for _ in range(choose.randint(0, 5)))])
        for start, end in itertools.pairwise(cuts):
            piece = Piece(name, tuple(tensor.shape), start, tensor.reshape(-1)[start:end])
            choose.choice(ranks).append(piece)
    for pieces in ranks:
        choose.shuffle(pieces)
    return ranks


class SaveOnRanks(Protocol):
    """The signature of `save_on_ranks`."""

    def __call__(
        self,
        root: Path,
        step: int,
        size: int = 2,
        keep_last: int = 2,
        keep_every: int = 0,
    ) -> Path: ...


@pytest.fixture(scope="session")
def lane_records() -> Callable[[int, int], dict[int, LaneRecord]]:
    """`lane_records(seed, lanes)`: places and memories of lanes."""

    def make(seed: int, lanes: int) -> dict[int, LaneRecord]:
        generator = torch.Generator().manual_seed(seed)
        return {
            lane: LaneRecord(
                {"epoch": seed, "shard": lane, "document": 3, "token": 2**40},
                {
                    "0.matrix": torch.randn(2, 4, 4, generator=generator),
                    "0.normaliser": torch.randn(2, 4, generator=generator),
                    "open": torch.zeros(0),
                    "count": torch.tensor(lane),
                },
            )
            for lane in range(lanes)
        }

    return make


@pytest.fixture(scope="session")
def pieces_of() -> Callable[[Mapping[str, Tensor], int, int], list[list[Piece]]]:
    """`random_pieces`, for tests."""
    return random_pieces


@pytest.fixture(scope="session")
def save_on_ranks(
    run_ranks: RunRanks[Any],
    tensors: Callable[[int], dict[str, Tensor]],
    lane_records: Callable[[int, int], dict[int, LaneRecord]],
) -> SaveOnRanks:
    """Commit `tensors(step)`, four lanes and {"step": step} by `size` ranks."""

    def save_all(
        root: Path, step: int, size: int = 2, keep_last: int = 2, keep_every: int = 0
    ) -> Path:
        pieces = random_pieces(tensors(step), size, step)
        lanes = lane_records(step, 4)

        def work(ranks: Ranks) -> Path:
            mine = {lane: lanes[lane] for lane in lanes if lane % size == ranks.rank}
            return save(
                root, step, pieces[ranks.rank], mine, {"step": step}, ranks, keep_last, keep_every,
                Attempt(root.parent, 1),
            )  # fmt: skip

        paths = run_ranks(size, work)
        for path in paths:
            if isinstance(path, Exception):
                raise path
        return paths[0]

    return save_all
