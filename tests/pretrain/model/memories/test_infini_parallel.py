"""Memories that pass from part to part of a window, the parts being threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from pretrain.model.memories import infini
from pretrain.model.memories.infini import Divisor, MemoryState
from pretrain.model.memories.infini_parallel import Passing
from pretrain.model.window import resets, resets_of_parts

PARTS, SEGMENTS = 3, 2  # segments of a part
RULES: list[Divisor | None] = [None, "paper", "inclusive"]  # of Linear, and of Linear + Delta
T = TypeVar("T")


class Table:
    """Where the parts lay down what they hand out."""

    def __init__(self) -> None:
        self.slots: list[Tensor] = [torch.empty(0)] * PARTS
        self.barrier = threading.Barrier(PARTS)


class Seat:
    """A part's place at the table."""

    count = PARTS

    def __init__(self, index: int, table: Table) -> None:
        self.index = index
        self.table = table

    def gather(self, own: Tensor) -> Tensor:
        self.table.slots[self.index] = own
        self.table.barrier.wait(timeout=60)
        gathered = torch.stack(self.table.slots)
        self.table.barrier.wait(timeout=60)
        return gathered


def in_parts(work: Callable[[Seat], T]) -> list[T]:
    """What each part finds, all at the same time."""
    table = Table()
    with ThreadPoolExecutor(PARTS) as pool:
        return list(pool.map(work, [Seat(index, table) for index in range(PARTS)]))


def segments(seed: int) -> tuple[Tensor, Tensor]:
    """K and V of a window of one lane, [1, S, 8, 2, 4]."""
    generator = torch.manual_seed(seed)
    shape = (1, PARTS * SEGMENTS, 8, 2, 4)
    keys, values = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "kv")
    return keys, values


def advanced(
    keys: Tensor,
    values: Tensor,
    carried: MemoryState,
    starting: Tensor,
    rule: Divisor | None,
    initial: MemoryState | None = None,
) -> tuple[MemoryState, list[MemoryState]]:
    """The states before each segment of the window, and each part's state after it."""

    def work(seat: Seat) -> tuple[MemoryState, MemoryState]:
        own = slice(seat.index * SEGMENTS, (seat.index + 1) * SEGMENTS)
        passing = Passing(seat, resets_of_parts(starting[:, own], seat))
        return infini.advance(
            *(keys[:, own], values[:, own], carried, None, resets(starting[:, own]), rule),
            initial=initial,
            passing=passing,
        )

    found = in_parts(work)
    before = MemoryState(
        torch.cat([part.matrix for part, _ in found], dim=1),
        torch.cat([part.normaliser for part, _ in found], dim=1),
    )
    return before, [after for _, after in found]


def a_carried_state(value: float | None = None) -> MemoryState:
    like = torch.zeros((), dtype=torch.float64)
    empty = MemoryState(like.new_zeros(1, 2, 4, 4), like.new_zeros(1, 2, 4))
    if value is not None:
        return MemoryState(*(torch.full_like(part, value) for part in empty))
    generator = torch.manual_seed(3)
    return MemoryState(*(torch.rand(part.shape, generator=generator).double() for part in empty))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("places", [[], [0], [2], [3], [5], [1, 4], list(range(6))], ids=str)
@pytest.mark.parametrize("begun", [None, 2.0], ids=["empty", "with a memory"])
def test_parts_find_the_states_of_the_whole_window(
    rule: Divisor | None, places: list[int], begun: float | None
) -> None:
    initial = None if begun is None else a_carried_state(begun)
    starting = torch.zeros(1, PARTS * SEGMENTS, dtype=torch.bool)
    starting[0, places] = True
    given = (*segments(1), a_carried_state())
    before, ends = advanced(*given, starting, rule, initial)
    whole_before, whole_after = infini.advance(
        *(*given, None, resets(starting), rule), initial=initial
    )
    torch.testing.assert_close(before, whole_before, rtol=1e-12, atol=1e-12)
    for after in ends:
        torch.testing.assert_close(after, whole_after, rtol=1e-12, atol=1e-12)
        assert torch.equal(after.matrix, ends[0].matrix)


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.parametrize("rule", RULES)
def test_a_document_that_overflowed_does_not_poison_the_next_one_in_a_later_part(
    rule: Divisor | None, poison: float
) -> None:
    starting = torch.zeros(1, PARTS * SEGMENTS, dtype=torch.bool)
    starting[0, SEGMENTS + 1] = True
    keys, values = segments(2)
    keys, values = keys.clone(), values.clone()
    values[:, 0] = poison
    _, ends = advanced(keys, values, a_carried_state(poison), starting, rule)
    new = slice(SEGMENTS + 1, None)
    _, alone = infini.advance(
        keys[:, new], values[:, new], a_carried_state(0.0), None, [None] * (SEGMENTS + 1), rule
    )
    for after in ends:
        torch.testing.assert_close(after, alone, rtol=1e-12, atol=1e-12)
