"""The output head: logits, or the cross-entropy of each token without all logits in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORE = -100
"""Target of a token that is not in the loss: the last of its document, or padding."""

# Logits in memory at once. Each chunk adds to the weight's gradient, a pass over all of it that is
# slow on a GPU compared with the products; on a CPU, chunks that fit the caches are faster.
_CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}
_LEAST_CHUNK = 64  # tokens


class OutputHead(nn.Module):
    """The projection onto the vocabulary; its weight is the embedding's if they are tied."""

    def __init__(
        self, d_model: int, vocab_size: int, std: float, tied: nn.Parameter | None
    ) -> None:
        super().__init__()
        if tied is None:
            self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
            nn.init.normal_(self.weight, std=std)
        else:
            self.weight = tied

    def forward(
        self, x: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, T, d_model] -> logits [B, T, V]; given targets [B, T], losses instead.

        The losses are the differentiable sum over all targets, and each token's loss [B, T] without
        a gradient: cross-entropy in nats, float32, 0 where the target is IGNORE, multiplied by
        `weights` [B, T], float32, if given. No [B, T, V] tensor is ever in memory.
        """
        if targets is None:
            return F.linear(x, self.weight)
        flat = None if weights is None else weights.flatten()
        total, losses = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, 1), self.weight, targets.flatten(), flat
        )
        return total, losses.view_as(targets)


class _CrossEntropy(torch.autograd.Function):
    """hidden [n, d_model], weight [V, d_model], targets [n], weights [n] or None -> sum, losses.

    Each chunk's losses and gradients are computed together, so logits are never recomputed. Only
    the sum is differentiable: its gradient scales the stored gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(torch.float32, hidden.dtype)
        losses = torch.empty(targets.shape, dtype=precise, device=hidden.device)
        learning = any(ctx.needs_input_grad)
        if learning:
            d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=precise)
        device = "cpu" if hidden.is_cpu else "cuda"
        size = max(_LEAST_CHUNK, _CHUNK_LOGITS[device] // weight.shape[0])
        for first in range(0, len(targets), size):
            rows = slice(first, first + size)
            kept = targets[rows] != IGNORE
            wanted = targets[rows].where(kept, 0)[:, None]
            loss, p = _losses(F.linear(hidden[rows], weight), wanted, precise)
            losses[rows] = loss.where(kept, 0)
            if weights is not None:
                losses[rows] *= weights[rows]
            if learning:
                d_logits = p.scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=precise))
                if weights is not None:
                    # Before rounding: a weight of 0.1 is not representable in bfloat16.
                    d_logits *= weights[rows, None]
                d_logits = d_logits.to(weight.dtype)
                # Rows that are not in the loss are zeroed in the small tensors, not in the logits.
                d_hidden[rows] = (d_logits @ weight).mul_(kept[:, None])
                _add_product(d_weight, d_logits.t(), hidden[rows] * kept[:, None])
        if learning:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        # In place, so only one backward is possible: a second tensor of the weight's size would be
        # the step's peak.
        return d_hidden.mul_(d_total), d_weight.mul_(d_total).to(ctx.weight_dtype), None, None


def _losses(logits: Tensor, targets: Tensor, precise: torch.dtype) -> tuple[Tensor, Tensor]:
    """logits [n, V], which are overwritten, targets [n, 1] -> losses [n], probabilities [n, V].

    Uses softmax, since log-softmax would need another pass for its exponential. The largest
    probability is 1 / sum(exp(logits - max)), so its logarithm gives the log of that sum.
    """
    wanted, largest = (x.to(precise) for x in (logits.gather(1, targets), logits.amax(1, True)))
    in_place = logits if logits.dtype == precise else None
    p = torch.softmax(logits, dim=1, dtype=precise, out=in_place)
    return (largest - wanted - p.amax(1, True).log_()).squeeze(1), p


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where total may be more precise than a and b."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        total += a @ b
