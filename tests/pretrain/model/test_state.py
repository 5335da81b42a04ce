"""States are cut, joined and cleaned by lanes."""

from __future__ import annotations

import torch

from pretrain.model import state
from pretrain.model.memories.infini import MemoryState
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


def test_a_model_without_memory_has_an_empty_state() -> None:
    assert (
        state.of_lanes((), slice(0, 2)) == state.detached(()) == state.without_nonfinite(()) == ()
    )
    assert state.joined([(), ()]) == ()
