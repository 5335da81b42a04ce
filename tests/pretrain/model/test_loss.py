"""The output head against torch's cross-entropy over all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.model import loss
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
def test_losses_in_chunks_are_the_cross_entropy_of_all_logits(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", 128 * VOCABULARY)
    head, x, targets = head_and_tokens(tokens)
    total, losses, _ = head(x, targets)
    ours = torch.autograd.grad(3 * total, [x, head.weight])
    expected = F.cross_entropy(
        (x @ head.weight.T).flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="none",
    ).view(2, tokens)
    theirs = torch.autograd.grad(3 * expected.sum(), [x, head.weight])
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not losses[targets == IGNORE].any() and not losses.requires_grad


@pytest.mark.parametrize("tokens", [4000, 16000])
@pytest.mark.parametrize("vocabulary", [5_000, 50_000])
def test_logits_take_the_same_memory_at_any_window_and_vocabulary(
    tokens: int, vocabulary: int
) -> None:
    head = OutputHead(8, vocabulary, std=0.5, tied=None)
    x = torch.randn(1, tokens, 8, requires_grad=True)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        head(x, torch.zeros(1, tokens, dtype=torch.int64))[0].backward()
    assert 2**24 - vocabulary < largest <= 2**24


def test_losses_are_float32_where_activations_are_bf16() -> None:
    head, x, targets = head_and_tokens(60, torch.bfloat16)
    total, losses, _ = head(x, targets)
    logits = F.linear(x, head.weight)
    assert logits.dtype == torch.bfloat16 and losses.dtype == total.dtype == torch.float32
    expected = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    torch.testing.assert_close(losses.flatten(), expected)
    ours = torch.autograd.grad(total, [x, head.weight])
    theirs = torch.autograd.grad(expected.sum(), [x, head.weight])
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == torch.bfloat16
        torch.testing.assert_close(our, their, rtol=2e-2, atol=2e-2)


def test_a_loss_that_is_not_finite_gives_gradients_that_are_not() -> None:
    head, x, targets = head_and_tokens(9)
    total = head(x, targets).total
    (total * torch.nan).backward()
    assert x.grad is not None and x.grad.isnan().all()


def test_tied_heads_share_the_very_parameter() -> None:
    embedding = torch.nn.Embedding(VOCABULARY, 8)
    head = OutputHead(8, VOCABULARY, std=0.5, tied=embedding.weight)
    assert head.weight is embedding.weight


def test_each_loss_and_its_gradient_have_the_token_s_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", 128 * VOCABULARY)
    head, x, targets = head_and_tokens(300)
    weights = torch.rand(2, 300, dtype=torch.float64) * (torch.rand(2, 300) < 0.7)
    total, losses, _ = head(x, targets, weights)
    ours = torch.autograd.grad(total, [x, head.weight])
    expected = weights * F.cross_entropy(
        (x @ head.weight.T).flatten(0, 1), targets.flatten(), reduction="none"
    ).view(2, 300)
    theirs = torch.autograd.grad(expected.sum(), [x, head.weight])
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_weights_of_1_change_no_bit() -> None:
    head, x, targets = head_and_tokens(60, torch.bfloat16)
    found = []
    for weights in (None, torch.ones(2, 60)):
        total, losses, _ = head(x, targets, weights)
        found.append([total, losses, *torch.autograd.grad(total, [x, head.weight])])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("answers", [0, 1, 40, 300])
def test_tokens_without_weight_cost_no_logits_and_change_no_loss(
    answers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, x, targets = head_and_tokens(300)
    head.z_loss = 0.03
    weights = torch.zeros(600, dtype=torch.float64)
    weights[torch.randperm(600)[:answers]] = 0.7
    rows = 0
    plain = loss._losses

    def counted(logits: Tensor, *more: Any) -> Any:
        nonlocal rows
        rows += len(logits)
        return plain(logits, *more)

    monkeypatch.setattr(loss, "_losses", counted)
    total, losses, z_loss = head(x, targets, weights.view(2, 300))
    ours = torch.autograd.grad(3 * total, [x, head.weight])
    in_loss = weights * (targets.flatten() != IGNORE)
    assert rows == in_loss.count_nonzero()
    logits = (x @ head.weight.T).flatten(0, 1)
    expected = in_loss * F.cross_entropy(
        logits, targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    expected_z = 0.03 * (in_loss * logits.logsumexp(1).square()).sum()
    theirs = torch.autograd.grad(3 * (expected.sum() + expected_z), [x, head.weight])
    torch.testing.assert_close(losses.flatten(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z_loss, expected_z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, expected.sum() + expected_z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_z_loss_is_the_square_of_the_log_of_the_partition_function(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", 128 * VOCABULARY)
    head, x, targets = head_and_tokens(300)
    head.z_loss = 0.03
    weights = torch.rand(2, 300, dtype=torch.float64) if weighted else None
    total, losses, z_loss = head(x, targets, weights)
    ours = torch.autograd.grad(3 * total, [x, head.weight])
    logits = (x @ head.weight.T).flatten(0, 1)
    counted = (targets != IGNORE).double() * (1.0 if weights is None else weights)
    naive = 0.03 * logits.exp().sum(dim=1).log().square().view(2, 300) * counted
    plain = counted * F.cross_entropy(
        logits, targets.flatten(), ignore_index=IGNORE, reduction="none"
    ).view(2, 300)
    theirs = torch.autograd.grad(3 * (plain + naive).sum(), [x, head.weight])
    torch.testing.assert_close(losses, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z_loss, naive.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(total, (plain + naive).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not z_loss.requires_grad


def test_the_z_loss_of_bf16_is_computed_in_float32() -> None:
    head, x, targets = head_and_tokens(60, torch.bfloat16)
    head.z_loss = 0.5
    total, _, z_loss = head(x, targets)
    logits = F.linear(x, head.weight).float()
    kept = targets.flatten() != IGNORE
    expected = 0.5 * logits.logsumexp(dim=-1).flatten()[kept].square().sum()
    assert z_loss.dtype == total.dtype == torch.float32
    torch.testing.assert_close(z_loss, expected.detach())
    ours = torch.autograd.grad(total, [x, head.weight])
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE,
                            reduction="sum")  # fmt: skip
    theirs = torch.autograd.grad(plain + expected, [x, head.weight])
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_without_a_coefficient_there_is_no_z_loss() -> None:
    head, x, targets = head_and_tokens(60)
    total, losses, z_loss = head(x, targets)
    assert z_loss == 0 and torch.equal(total, losses.sum())
