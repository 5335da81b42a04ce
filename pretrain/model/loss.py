"""The output head: logits, or the cross-entropy of each token without all logits in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100
"""Target of a token that is not in the loss: the last of its document, or padding."""

_CHUNK = 512
"""Tokens whose logits stand at once; with fewer, adding up the weight's gradient shows."""


class OutputHead(nn.Module):
    """The projection onto the vocabulary; its weight is the embedding's where they are tied."""

    def __init__(
        self, d_model: int, vocab_size: int, std: float, tied: nn.Parameter | None
    ) -> None:
        super().__init__()
        if tied is None:
            self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
            nn.init.normal_(self.weight, std=std)
        else:
            self.weight = tied

    def forward(self, x: Tensor, targets: Tensor | None) -> Tensor:
        """x [B, T, d_model] -> logits [B, T, V]; given targets [B, T], losses [B, T] instead.

        Losses are float32, in nats, 0 where the target is IGNORE. They are computed in chunks of
        tokens that the backward computes again, so no [B, T, V] tensor ever stands in memory.
        """
        if targets is None:
            return F.linear(x, self.weight)
        rows = zip(
            torch.split(x.flatten(0, 1), _CHUNK),
            torch.split(targets.flatten(), _CHUNK),
            strict=True,
        )
        losses = [
            checkpoint(
                _token_losses,
                self.weight,
                hidden,
                wanted,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for hidden, wanted in rows
        ]
        return torch.cat(losses).view_as(targets)


def _token_losses(weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    """weight [V, d_model], hidden [n, d_model], targets [n] -> losses [n]."""
    logits = F.linear(hidden, weight)
    precise = logits.to(torch.promote_types(torch.float32, logits.dtype))
    return F.cross_entropy(precise, targets, ignore_index=IGNORE, reduction="none")
