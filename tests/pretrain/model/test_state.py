"""States are cut, joined and cleaned by lanes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.model import state
from pretrain.model.memories.infini import MemoryState
from pretrain.model.memories.none import Nothing
from pretrain.model.state import ModelState


def random_state(lanes: int, layers: int = 2) -> ModelState:
    return tuple(
        MemoryState(torch.randn(lanes, 2, 3, 3), torch.rand(lanes, 2, 3)) for _ in range(layers)
    )


def test_parts_of_a_state_joined_again_are_the_state() -> None:
    whole = random_state(5)
    parts = [state.of_lanes(whole, slice(0, 2)), state.of_lanes(whole, [2, 3, 4])]
    again = state.joined(parts)
    for layer, expected in zip(again, whole, strict=True):
        assert torch.equal(layer.matrix, expected.matrix)
        assert torch.equal(layer.normaliser, expected.normaliser)


def test_a_detached_state_has_no_history() -> None:
    matrix = torch.ones(1, 1, 2, 2, requires_grad=True)
    (layer,) = state.detached((MemoryState(matrix * 2, torch.ones(1, 1, 2)),))
    assert not layer.matrix.requires_grad
    assert torch.equal(layer.matrix, torch.full((1, 1, 2, 2), 2.0))


def test_a_lane_that_is_not_finite_in_one_layer_is_emptied_in_all_and_others_stay() -> None:
    spoiled = random_state(3)
    expected = state.of_lanes(spoiled, [0, 2])
    spoiled[1].normaliser[1, 0, 0] = torch.nan
    cleaned = state.without_nonfinite(spoiled)
    for layer, kept in zip(cleaned, expected, strict=True):
        assert not layer.matrix[1].any() and not layer.normaliser[1].any()
        assert torch.equal(layer.matrix[[0, 2]], kept.matrix)
        assert torch.equal(layer.normaliser[[0, 2]], kept.normaliser)


def test_stored_memories_are_read_in_the_dtype_of_the_activations() -> None:
    stored = random_state(2)
    lanes = [state.lane_tensors(stored, row) for row in range(2)]
    like = tuple(layer._make(tensor.bfloat16() for tensor in layer) for layer in stored)
    for layer, expected in zip(state.from_lane_tensors(lanes, like), stored, strict=True):
        assert layer.matrix.dtype == torch.bfloat16
        assert torch.equal(layer.matrix, expected.matrix.bfloat16())
        assert torch.equal(layer.normaliser, expected.normaliser.bfloat16())


def test_a_state_without_tensors_stays_one() -> None:
    empty = (Nothing(), Nothing())
    assert state.of_lanes(empty, slice(0, 2)) == state.detached(empty) == empty
    assert state.without_nonfinite(empty) == state.joined([empty, empty]) == empty


class Slots(NamedTuple):
    """A state of another kind: numbers, places and flags."""

    values: Tensor
    places: Tensor
    filled: Tensor


def test_places_and_flags_are_finite_and_are_emptied_as_zero() -> None:
    before = Slots(
        torch.tensor([[1.0, torch.inf], [2.0, 3.0]]),
        torch.tensor([[4, 5], [6, 7]]),
        torch.tensor([[True], [True]]),
    )
    ((values, places, filled),) = state.without_nonfinite((before,))
    assert values.tolist() == [[0, 0], [2, 3]] and values.dtype == torch.float32
    assert places.tolist() == [[0, 0], [6, 7]] and places.dtype == torch.int64
    assert filled.tolist() == [[False], [True]] and filled.dtype == torch.bool
