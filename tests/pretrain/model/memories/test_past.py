"""Which rows of the pool are before each segment, against lists that tokens pass through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.config.memory import MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.model import local_attention
from pretrain.model.memories import past
from pretrain.model.memories.past import Slots
from pretrain.model.window import Window
from tests.pretrain.model.small import DOCUMENTS, SEGMENT, TOKENS, starts_at

CONFIG = ModelConfig(segment=SEGMENT, memory=MemoryConfig(kind="transformer_xl"))


def window_of(starts: Tensor) -> Window:
    return Window.of(starts, CONFIG, local_attention.sdpa, torch.float32)


def ends_of(starts: Tensor) -> list[int]:
    """Where segments begin, and the window's end."""
    return [*range(0, starts.shape[1], SEGMENT), starts.shape[1]]


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_the_last_document_start_before_each_segment_is_found(documents: str) -> None:
    starts = starts_at(*DOCUMENTS[documents])
    found = past.last_starts(window_of(starts))
    for lane, own in zip(found.tolist(), starts, strict=True):
        before = [own[:end].nonzero().flatten().tolist() for end in ends_of(starts)]
        assert lane == [places[-1] if places else -1 for places in before]


def by_lists(starts: Tensor, carried: Tensor, initial: Tensor | None) -> list[list[int | None]]:
    """The pool's row in each slot before each segment and after the last; None: it is empty."""
    count, parts = len(carried), [carried] if initial is None else [initial, carried]
    of_parts = [
        [index * count + slot if held else None for slot, held in enumerate(part)]
        for index, part in enumerate(parts)
    ]
    begins_with: list[int | None] = [None] * count if initial is None else of_parts[0]
    slots, found = of_parts[-1], []
    for t in range(len(starts)):
        if t % SEGMENT == 0:
            found.append(slots)
        slots = [*(begins_with if starts[t] else slots)[1:], len(parts) * count + t]
    return [*found, slots]


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("count", [1, 3, SEGMENT, 12, 30])
def test_slots_are_the_latest_inputs_of_the_open_document(
    count: int, with_initial: bool, documents: str
) -> None:
    starts, generator = starts_at(*DOCUMENTS[documents]), torch.manual_seed(count)
    carried, first = (torch.rand(2, count, generator=generator) < 0.7 for _ in range(2))
    initial = first if with_initial else None
    rows, visible = past.latest(window_of(starts), carried, initial)
    for lane in range(2):
        shown = [
            [row if seen else None for row, seen in zip(*pair, strict=True)]
            for pair in zip(rows[lane].tolist(), visible[lane].tolist(), strict=True)
        ]
        begins_with = None if initial is None else initial[lane]
        assert shown == by_lists(starts[lane], carried[lane], begins_with)


def test_a_window_of_whole_segments_has_no_padding_in_its_slots() -> None:
    starts = starts_at([], [9], length=2 * SEGMENT)
    rows, visible = past.latest(window_of(starts), torch.ones(2, 3, dtype=torch.bool), None)
    assert rows[0].tolist() == [[0, 1, 2], [5, 6, 7], [10, 11, 12]]
    assert visible[1].tolist() == [[True] * 3, [True] * 3, [False, False, True]]


def test_rows_are_gathered_from_their_own_lane_with_a_gradient_for_each_use() -> None:
    pool = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([[[0, 3], [3, 3]], [[1, 2], [0, 1]]])
    found = past.gathered(pool, rows)
    for lane in range(2):
        assert torch.equal(found[lane], pool[lane][rows[lane]])
    found.sum().backward()
    uses = [[1, 0, 0, 3], [1, 2, 1, 0]]
    assert pool.grad is not None and pool.grad[:, :, 0, 0].tolist() == uses


def test_what_is_kept_is_a_constant_and_0_where_nothing_is_held() -> None:
    pool = torch.randn(1, 6, 4, requires_grad=True)
    rows = torch.tensor([[[0, 1, 2], [3, 4, 5]]])
    visible = torch.tensor([[[True] * 3, [False, True, True]]])
    found = past.kept(pool, Slots(rows, visible))
    assert not found.requires_grad and not found[0, 0].any()
    assert torch.equal(found[0, 1:], pool[0, 4:])


def test_what_is_not_finite_in_an_empty_slot_is_forgotten() -> None:
    pool = torch.full((1, 2, 4), float("nan"))
    nothing = Slots(torch.tensor([[[0, 1]]]), torch.zeros(1, 1, 2, dtype=torch.bool))
    assert torch.equal(past.kept(pool, nothing), torch.zeros(1, 2, 4))


def test_the_flops_of_slots_are_those_of_their_two_products() -> None:
    assert past.slot_flops(CONFIG, TOKENS, 7) == 2 * (2 * TOKENS * 7 * 4 * 64)
