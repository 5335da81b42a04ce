"""The linear maps of attention, and the norm of queries and keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pretrain.model.pointwise import RMSNorm, rms_norm


class Projected(NamedTuple):
    """One map x W^T + b, [..., outputs], three times: equal numbers with different gradients."""

    whole: Tensor
    """Its gradient reaches x and the weights."""
    of_weight: Tensor
    """Its gradient reaches the weights alone: that of W applied to sg(x)."""
    of_input: Tensor
    """Its gradient reaches x alone: that of sg(W) applied to x."""


class Projection(nn.Linear):
    """A linear map, initialised from normal(0, std), with a bias of 0 if it has one.

    Initialised in the constructor, since ZeRO-3 may partition a module's weights when it returns.
    """

    def __init__(self, inputs: int, outputs: int, std: float, bias: bool = False) -> None:
        self.std = std
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the weights."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(  # type: ignore[override]  # one module call, since ZeRO-3 gathers for each
        self, x: Tensor, shared: bool = False
    ) -> Tensor | Projected:
        """x [..., inputs] -> [..., outputs].

        With `shared`, the product as `Projected`: for memories that stop gradients, one product
        serves all uses of a layer's inputs.
        """
        if not shared:
            return F.linear(x, self.weight, self.bias)
        return Projected(*_Shared.apply(x, self.weight, self.bias))  # type: ignore[no-untyped-call]


class HeadNorm(RMSNorm):
    """RMSNorm over each head's queries or keys, [..., heads, d_head], with one weight for all."""

    def forward(  # type: ignore[override]  # one module call, as for `Projection`
        self, x: Tensor | Projected
    ) -> Tensor | Projected:
        """x -> the same shape; of what is `Projected`, the weight counts as one of its weights."""
        if isinstance(x, Tensor):
            return super().forward(x)
        whole, of_weight = super().forward(x.whole), super().forward(x.of_weight)
        return Projected(whole, of_weight, rms_norm(x.of_input, self.weight.detach(), self.eps))


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        ctx.set_materialize_grads(False)
        product = F.linear(x, weight, bias)
        return product, product.detach(), product.detach()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, whole: Tensor | None, of_weight: Tensor | None, of_input: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_weight, for_x = _sum(whole, of_weight), _sum(whole, of_input)
        d_x = None if for_x is None else for_x @ weight
        if for_weight is None:
            return d_x, None, None
        rows = for_weight.flatten(0, -2)
        return d_x, rows.T @ x.flatten(0, -2), rows.sum(dim=0) if ctx.biased else None


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
