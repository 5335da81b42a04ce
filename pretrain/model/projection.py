"""The linear map of attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Projected(NamedTuple):
    """One product x W^T, [..., outputs], three times: equal numbers with different gradients."""

    whole: Tensor
    """Its gradient reaches x and W."""
    of_weight: Tensor
    """Its gradient reaches W alone: that of W applied to sg(x)."""
    of_input: Tensor
    """Its gradient reaches x alone: that of sg(W) applied to x."""


class Projection(nn.Linear):
    """A linear map without bias, initialised from normal(0, std).

    Initialised in the constructor, since ZeRO-3 may partition a module's weights when it returns.
    """

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        self.std = std
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Draw the weights."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(  # type: ignore[override]  # one module call, since ZeRO-3 gathers for each
        self, x: Tensor, shared: bool = False
    ) -> Tensor | Projected:
        """x [..., inputs] -> [..., outputs].

        With `shared`, the product as `Projected`: for memories that stop gradients, one product
        serves all uses of a layer's inputs.
        """
        if not shared:
            return F.linear(x, self.weight)
        return Projected(*_Shared.apply(x, self.weight))  # type: ignore[no-untyped-call]


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        product = F.linear(x, weight)
        return product, product.detach(), product.detach()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, whole: Tensor | None, of_weight: Tensor | None, of_input: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_weight, for_x = _sum(whole, of_weight), _sum(whole, of_input)
        d_x = None if for_x is None else for_x @ weight
        if for_weight is None:
            return d_x, None
        return d_x, for_weight.flatten(0, -2).T @ x.flatten(0, -2)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
