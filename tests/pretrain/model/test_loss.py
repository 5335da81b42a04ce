"""The output head against torch's cross-entropy over all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.loss import IGNORE, OutputHead

VOCABULARY = 37


def head_and_tokens(
    tokens: int, dtype: torch.dtype = torch.float64
) -> tuple[OutputHead, Tensor, Tensor]:
    torch.manual_seed(1)
    head = OutputHead(8, VOCABULARY, std=0.5, tied=None).to(dtype)
    x = torch.randn(2, tokens, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, (2, tokens))
    targets[torch.rand(2, tokens) < 0.2] = IGNORE
    return head, x, targets


@pytest.mark.parametrize("tokens", [1, 256, 257, 700])
def test_losses_in_chunks_are_the_cross_entropy_of_all_logits(tokens: int) -> None:
    head, x, targets = head_and_tokens(tokens)
    weights = torch.rand(2, tokens, dtype=torch.float64)
    losses = head(x, targets)
    ours = torch.autograd.grad((losses * weights).sum(), [x, head.weight])
    expected = F.cross_entropy(
        (x @ head.weight.T).flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="none",
    ).view(2, tokens)
    theirs = torch.autograd.grad((expected * weights).sum(), [x, head.weight])
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not losses[targets == IGNORE].any()


def test_no_window_by_vocabulary_tensor_is_kept_for_the_backward() -> None:
    head, x, targets = head_and_tokens(4000)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head(x, targets).sum().backward()
    assert max(kept) <= 512 * VOCABULARY < targets.numel() * VOCABULARY / 10


def test_losses_are_float32_where_activations_are_bf16() -> None:
    head, x, targets = head_and_tokens(60, torch.bfloat16)
    losses = head(x, targets)
    logits = F.linear(x, head.weight)
    assert logits.dtype == torch.bfloat16 and losses.dtype == torch.float32
    expected = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    assert torch.equal(losses.flatten(), expected)


def test_tied_heads_share_the_very_parameter() -> None:
    embedding = torch.nn.Embedding(VOCABULARY, 8)
    head = OutputHead(8, VOCABULARY, std=0.5, tied=embedding.weight)
    assert head.weight is embedding.weight
