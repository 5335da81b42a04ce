"""The contract's seam: a memory's own loss reaches the loss of the window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config.memory import MemoryConfig
from pretrain.model.memories.contract import Attended
from pretrain.model.memories.infini import LinearAttention
from pretrain.model.transformer import Transformer
from tests.pretrain.model.small import build, random_tokens, starts_at


class WithLoss(LinearAttention):
    """A memory whose own loss is the sum of its layer's squared inputs, times 3."""

    def attend(self, x: Tensor, *more: Any) -> Attended:
        return super().attend(x, *more)._replace(auxiliary=3 * x.square().sum())


def with_loss(**changes: Any) -> tuple[Transformer, list[Tensor]]:
    """A model with that memory, and a list that its layers' inputs go to in each forward."""
    model = build(MemoryConfig(kind="linear"), **changes)
    inputs: list[Tensor] = []
    for layer in model.layers:
        layer.attention.__class__ = WithLoss
        layer.attention.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    return model, inputs


def test_a_memory_s_own_losses_are_added_over_all_layers() -> None:
    tokens, starts = random_tokens(), starts_at([6], [])
    plain = build(MemoryConfig(kind="linear"))
    expected = plain(tokens, starts, plain.initial_state(2, "cpu"), tokens)
    model, inputs = with_loss()
    found = model(tokens, starts, model.initial_state(2, "cpu"), tokens)
    own = 3 * sum(float(x.square().sum()) for x in inputs)
    assert len(inputs) == 2 and own > 1
    assert found.loss.item() == pytest.approx(expected.loss.item() + own, rel=1e-12)
    assert torch.equal(found.losses, expected.losses)


def test_a_memory_s_own_loss_has_the_same_gradients_in_chunks_that_are_computed_again() -> None:
    length = 2**14 + 19
    tokens = random_tokens(length=length)
    starts = starts_at([6], [9_001], length=length)
    gradients = []
    for checkpointing in ("none", "full"):
        model, _ = with_loss(checkpointing=checkpointing)
        output = model(tokens, starts, model.initial_state(2, "cpu"), tokens)
        output.loss.backward()
        gradients.append([output.loss, *(weight.grad for weight in model.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
