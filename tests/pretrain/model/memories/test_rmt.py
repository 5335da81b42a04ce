"""The Recurrent Memory Transformer: how far gradient flows, and what the log shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.model.state import ModelState, detached
from pretrain.model.transformer import Transformer
from tests.pretrain.model.memories.test_recurrence import build, random_state
from tests.pretrain.model.small import SEGMENT, TOKENS, random_tokens, starts_at


def gradients_of_inputs(model: Transformer, losses: slice, state: ModelState) -> Tensor:
    """[T]: how much the losses of some tokens change with each token's embedding."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, embedded: Tensor) -> None:
        embedded.retain_grad()
        found.append(embedded)

    hook = model.embedding.register_forward_hook(keep)
    logits = model(random_tokens(1), starts_at([]), state).logits
    hook.remove()
    logits[:, losses].square().sum().backward()
    assert found[0].grad is not None
    return found[0].grad[0].abs().sum(dim=1)


def test_gradient_flows_through_all_segments_of_a_window() -> None:
    model = build("rmt")
    found = gradients_of_inputs(model, slice(TOKENS - 1, TOKENS), random_state(model, (1,)))
    assert (found > 0).all()


def test_no_gradient_flows_into_the_window_before() -> None:
    """The trainer carries the state detached."""
    model, tokens = build("rmt"), random_tokens(1, 2 * TOKENS)
    starts = starts_at([], length=TOKENS)
    before = model(tokens[:, :TOKENS], starts, random_state(model, (1,))).state
    kept = before[0].vectors
    kept.retain_grad()
    model(tokens[:, TOKENS:], starts, detached(before), tokens[:, TOKENS:]).loss.backward()
    assert kept.grad is None
    model(tokens[:, TOKENS:], starts, before, tokens[:, TOKENS:]).loss.backward()
    assert kept.grad.any()


def test_the_memory_is_written_from_the_memory_that_was_read() -> None:
    model = build("rmt")
    for block in model.layers:  # blocks that add nothing: the output is the norm of the input
        block.attention.o_proj.weight.data.zero_()
        block.feed_forward.down_proj.data.zero_()
    (state,) = random_state(model, (1, 0))
    tokens = random_tokens(2, SEGMENT)
    (after,) = model(tokens, starts_at([], [], length=SEGMENT), (state,)).state
    learned = model.recurrence.learned()
    torch.testing.assert_close(after.vectors, model.norm(torch.stack((state.vectors[0], learned))))
    started = starts_at([3], [3], length=SEGMENT)
    begins = random_state(model, (0, 1), seed=8)
    (after,) = model(tokens, started, (state,), initial=begins).state
    torch.testing.assert_close(
        after.vectors, model.norm(torch.stack((learned, begins[0].vectors[1])))
    )


def test_the_log_shows_the_norm_of_the_memory() -> None:
    model = build("rmt")
    (state,) = random_state(model, (1, 1))
    assert model.metrics((state,)) == {"memory_norm": [pytest.approx(state.vectors.norm() ** 2)]}
