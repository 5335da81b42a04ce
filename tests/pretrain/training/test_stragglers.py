"""Stragglers: who is much slower, and only twice in a row."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch

from pretrain.checkpoint.ranks import SoloRanks
from pretrain.training.stragglers import Straggler, Stragglers, slow_ranks

T = TypeVar("T")


@pytest.mark.parametrize(
    ("products", "waits", "found"),
    [
        ([1.0, 1.0], [0.0, 0.0], []),
        ([1.0, 1.4, 0.9, 1.2], [0.5, 0.1, 0.9, 0.3], []),
        ([1.0, 3.0], [0.0, 0.0], [(1, "compute", 3.0)]),
        ([2.0, 0.5], [0.0, 0.0], [(0, "compute", 4.0)]),
        ([1.0, 1.0, 1.0, 2.0], [3.0, 0.5, 0.5, 0.5], [(3, "compute", 2.0), (0, "data", 2.5)]),
        # Where half of the ranks are slow, the others are the measure.
        ([1.0, 2.0, 2.0, 1.0], [0.0] * 4, [(1, "compute", 2.0), (2, "compute", 2.0)]),
    ],
)
def test_ranks_that_are_much_slower_are_found(
    products: list[float], waits: list[float], found: list[tuple[int, str, float]]
) -> None:
    slow = slow_ranks(products, waits, interval=10.0)
    assert [(one.rank, one.cause, one.excess) for one in slow] == found


class WithAnother:
    """Rank 0 of two; the other one reports what the test says."""

    rank = 0
    size = 2

    def __init__(self) -> None:
        self.factor, self.wait = 1.0, 0.0

    def gather(self, value: T) -> list[T]:
        product, _, interval = value  # type: ignore[misc]
        return [value, [self.factor * product, self.wait, interval]]  # type: ignore[list-item]


def test_a_rank_is_named_when_it_was_slow_twice_in_a_row() -> None:
    ranks = WithAnother()
    stragglers = Stragglers(ranks, torch.device("cpu"))
    named = []
    for ranks.factor in (1.0, 4.0, 1.0, 4.0, 4.0, 4.0, 1.0):
        named.append([one.rank for one in stragglers.look(0.0, 1.0)])
    assert named == [[], [], [], [], [1], [1], []]
    ranks.wait = 2.0
    assert stragglers.look(0.5, 10.0) == []
    assert stragglers.look(0.5, 10.0) == [Straggler(1, "data", 1.5)]


def test_a_single_rank_is_no_straggler() -> None:
    stragglers = Stragglers(SoloRanks(), torch.device("cpu"))
    assert [stragglers.look(9.0, 10.0) for _ in range(3)] == [[], [], []]


def test_a_straggler_is_described_with_its_host_and_its_measure() -> None:
    assert Straggler(3, "compute", 2.04).described("n7") == (
        "rank 3 (n7) computes 2.0 times slower than others"
    )
    assert Straggler(3, "data", 2.04).described("n7") == (
        "rank 3 (n7) waited 2.0 s longer for data than others"
    )
