"""AutoCompressors: where gradients stop, what is kept, and what the log shows."""

from __future__ import annotations

import itertools

import pytest
import torch

from pretrain.config.memory import AutoCompressorConfig, MemoryConfig
from pretrain.model.transformer import Transformer
from tests.pretrain.model import small
from tests.pretrain.model.memories.test_recurrence import random_state
from tests.pretrain.model.memories.test_rmt import gradients_of_inputs
from tests.pretrain.model.small import SEGMENT, TOKENS, random_tokens, starts_at


def build(capacity: int = 9, group: int = 2) -> Transformer:
    settings = AutoCompressorConfig(vectors=2, capacity=capacity, backprop_segments=group)
    return small.build(MemoryConfig(kind="autocompressor", autocompressor=settings))


@pytest.mark.parametrize("group", [1, 2, 3])
def test_gradient_stops_at_the_groups_of_segments_counted_from_the_window_s_first(
    group: int,
) -> None:
    for segment in range(-(-TOKENS // SEGMENT)):
        model = build(group=group)
        losses = slice(segment * SEGMENT, (segment + 1) * SEGMENT)
        found = gradients_of_inputs(model, losses, random_state(model, (2,)))
        first = segment // group * group * SEGMENT
        assert not found[:first].any() and not found[(segment + 1) * SEGMENT :].any()
        assert (found[first : (segment + 1) * SEGMENT] > 0).all()


def test_no_gradient_flows_into_the_carried_summaries() -> None:
    model, tokens = build(), random_tokens(1)
    (state,) = random_state(model, (2,))
    state.vectors.requires_grad_()
    output = model(tokens, starts_at([]), (state,), tokens)
    output.loss.backward()
    assert state.vectors.grad is None
    assert model.recurrence.learned.weight.grad.any()


def test_a_segment_sees_the_newest_summaries_and_the_oldest_fall_out() -> None:
    tokens = random_tokens(1)
    for capacity in (1, 2, 9):
        model = build(capacity)
        state, reads = model.initial_state(1, "cpu"), []
        model.layers[0].register_forward_pre_hook(
            lambda _, given, reads=reads: reads.append(given[0].shape[1])
        )
        states = []
        for now in tokens.split(SEGMENT, dim=1):
            state = model(now, torch.zeros_like(now, dtype=torch.bool), state).state
            states.append(state[0])
        counts = [min(earlier, capacity) * 2 for earlier in range(5)]
        assert reads == [count + SEGMENT + 2 for count in counts[:4]] + [counts[4] + 3 + 2]
        for old, new in itertools.pairwise(states):
            assert torch.equal(old.vectors[:, 2:], new.vectors[:, :-2])


def test_a_new_document_keeps_no_summary_of_the_one_before() -> None:
    model = build(capacity=3)
    tokens, starts = random_tokens(1, SEGMENT), starts_at([4], length=SEGMENT)
    (after,) = model(tokens, starts, random_state(model, (3,))).state
    assert after.held.tolist() == [[False, False, True]]
    assert not after.vectors[:, :4].any() and after.vectors[:, 4:].all()


def test_the_log_shows_how_many_summaries_are_held() -> None:
    model = build()
    assert model.metrics(random_state(model, (3, 5))) == {"summaries": [16.0]}
