"""The feed-forward that computes its hidden activations again, against the one that keeps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config.model import ModelConfig
from pretrain.config.training import Checkpointing
from pretrain.model import feed_forward
from pretrain.model.feed_forward import FeedForward

CONFIG = ModelConfig(d_model=6, d_ff=10, n_layers=2, n_heads=1, n_kv_heads=1, d_head=6)


def layer_of(checkpointing: Checkpointing) -> FeedForward:
    torch.manual_seed(1)
    return FeedForward(CONFIG, checkpointing).double()


def results(layer: FeedForward, kept: list[Tensor] | None = None) -> list[Any]:
    """Output and gradients over 2 lanes of 50 tokens; `kept` takes what the backward needs."""
    x = torch.randn(2, 50, 6, dtype=torch.float64, generator=torch.manual_seed(2)).requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        if kept is not None:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    y.square().sum().backward()
    return [y, x.grad, *(weight.grad for weight in layer.parameters())]


@pytest.mark.parametrize("chunk", [1000, 100, 32])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_computing_again_in_chunks_changes_no_number(
    checkpointing: Checkpointing, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_forward, "_CHUNK", chunk)
    ours, theirs = results(layer_of(checkpointing)), results(layer_of("none"))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_selective_keeps_no_hidden_activation() -> None:
    kept: list[Tensor] = []
    results(layer_of("selective"), kept)
    assert kept and not any(tensor.shape == (100, 10) for tensor in kept)
    kept.clear()
    results(layer_of("none"), kept)
    assert sum(tensor.shape[-1] == 10 and tensor.numel() == 1000 for tensor in kept) >= 2


def test_hidden_activations_exist_for_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, "_CHUNK", 32)
    rows = []
    product = torch.nn.functional.linear

    def watched(x: Tensor, weight: Tensor) -> Tensor:
        rows.append(len(x))
        return product(x, weight)

    monkeypatch.setattr(feed_forward.F, "linear", watched)
    results(layer_of("selective"))
    assert max(rows) == 32 and sum(rows) == 2 * 2 * 100
