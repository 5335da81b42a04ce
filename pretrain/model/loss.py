"""The output head: logits, or the cross-entropy of each token without all logits in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORE = -100
"""Target of a token that is not in the loss: the last of its document, or padding."""

CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}
"""Logits in memory at once, by device. Each chunk adds to the weight's gradient, a pass over all of
it that is slow on a GPU compared with the products; on a CPU, chunks that fit the caches are
faster."""
_LEAST_CHUNK = 64  # tokens

# Of more tokens than this share all logits are computed: to copy the rows of the others out would
# take longer than the logits of the few that are not needed.
_MOST = 0.75


class Losses(NamedTuple):
    """The losses of a batch of targets."""

    total: Tensor
    """The differentiable sum of all of them and of the z-loss."""
    losses: Tensor
    """[B, T] cross-entropy of each token in nats, float32, without a gradient."""
    z_loss: Tensor
    """The z-loss in `total`, float32, without a gradient."""


class OutputHead(nn.Module):
    """The projection onto the vocabulary; its weight is the embedding's if they are tied.

    The z-loss of a token is `z_loss` times log(Z)^2, with Z the sum of its exponentiated logits
    (PaLM, arXiv 2204.02311, section 5): it keeps logits near the scale at which a softmax is exact.
    """

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        std: float,
        tied: nn.Parameter | None,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.z_loss = z_loss
        if tied is None:
            self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
            nn.init.normal_(self.weight, std=std)
        else:
            self.weight = tied

    def forward(
        self, x: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor | Losses:
        """x [B, T, d_model] -> logits [B, T, V]; given targets [B, T], losses instead.

        A token's losses are 0 where the target is IGNORE, and multiplied by `weights` [B, T],
        float32, if given. No [B, T, V] tensor is ever in memory, and where many weights are 0, as
        of prompts, there are no logits of those tokens at all.
        """
        if targets is None:
            return F.linear(x, self.weight)
        hidden, wanted = x.flatten(0, 1), targets.flatten()
        if weights is None:
            total, losses, z_loss = self._cross_entropy(hidden, wanted, None)
            return Losses(total, losses.view_as(targets), z_loss)
        flat = weights.flatten()
        rows = ((wanted != IGNORE) & (flat != 0)).nonzero().squeeze(1)
        if len(rows) > _MOST * len(wanted):
            total, losses, z_loss = self._cross_entropy(hidden, wanted, flat)
        else:
            total, some, z_loss = self._cross_entropy(
                hidden.index_select(0, rows), wanted[rows], flat[rows]
            )
            losses = some.new_zeros(wanted.shape).index_copy_(0, rows, some)
        return Losses(total, losses.view_as(targets), z_loss)

    def _cross_entropy(
        self, hidden: Tensor, targets: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As _CrossEntropy gives them."""
        found: tuple[Tensor, Tensor, Tensor] = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, self.weight, targets, weights, self.z_loss
        )
        return found


class _CrossEntropy(torch.autograd.Function):
    """hidden [n, d_model], weight [V, d_model], targets [n], weights [n] or None, the z-loss's
    coefficient -> sum, cross-entropies [n], sum of z-losses.

    Each chunk's losses and gradients are computed together, so logits are never recomputed. Only
    the sum is differentiable: its gradient scales the stored gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        coefficient: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        precise = torch.promote_types(torch.float32, hidden.dtype)
        losses = torch.empty(targets.shape, dtype=precise, device=hidden.device)
        z_loss = losses.new_zeros(())
        learning = any(ctx.needs_input_grad)
        if learning:
            d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=precise)
        device = "cpu" if hidden.is_cpu else "cuda"
        size = max(_LEAST_CHUNK, CHUNK_LOGITS[device] // weight.shape[0])
        for first in range(0, len(targets), size):
            rows = slice(first, first + size)
            kept = targets[rows] != IGNORE
            wanted = targets[rows].where(kept, 0)[:, None]
            loss, p, log_z = _losses(F.linear(hidden[rows], weight), wanted, precise)
            losses[rows] = loss.where(kept, 0)
            if weights is not None:
                losses[rows] *= weights[rows]
            if coefficient:
                # The gradient of coefficient * log(Z)^2 is that of log Z, which is p, times this.
                p *= 1.0 + 2.0 * coefficient * log_z
                counted = kept if weights is None else kept * weights[rows]
                z_loss += coefficient * (log_z.squeeze(1).square() * counted).sum()
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
        ctx.mark_non_differentiable(losses, z_loss)
        total = losses.sum()
        return total + z_loss if coefficient else total, losses, z_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        # In place, so only one backward is possible: a second tensor of the weight's size would be
        # the step's peak.
        scaled = d_weight.mul_(d_total).to(ctx.weight_dtype)
        return d_hidden.mul_(d_total), scaled, None, None, None


def _losses(logits: Tensor, targets: Tensor, precise: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """logits [n, V], which are overwritten, targets [n, 1] -> losses [n], probabilities [n, V],
    log Z [n, 1].

    Uses softmax, since log-softmax would need another pass for its exponential. The largest
    probability is 1 / sum(exp(logits - max)), so its logarithm gives the log of that sum.
    """
    wanted, largest = (x.to(precise) for x in (logits.gather(1, targets), logits.amax(1, True)))
    in_place = logits if logits.dtype == precise else None
    p = torch.softmax(logits, dim=1, dtype=precise, out=in_place)
    log_largest = p.amax(1, True).log_()
    return (largest - wanted - log_largest).squeeze(1), p, largest - log_largest


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where total may be more precise than a and b."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        total += a @ b
