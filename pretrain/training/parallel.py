"""Sequence parallelism: ranks that share the windows of their lanes, and what they exchange."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SequenceGroup:
    """This rank's sequence group: `count` consecutive ranks, each with a part of the windows.

    Every rank makes it, with the same count, which divides the number of ranks. It is what the
    model knows as Parts.
    """

    def __init__(self, count: int) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        assert ranks % count == 0
        # All ranks take part in making each group, also those that are not in it.
        groups = [dist.new_group(range(first, first + count)) for first in range(0, ranks, count)]
        self._group = groups[rank // count]
        self.index = rank % count
        self.count = count

    def gather(self, own: Tensor) -> Tensor:
        """Every part's tensor, in order: `own` [...] -> [count, ...].

        The backward sums over the ranks what each of them has for this one's.
        """
        gathered: Tensor = _Gather.apply(  # type: ignore[no-untyped-call]
            own, self._group, self.count
        )
        return gathered


class _Gather(torch.autograd.Function):
    """An all-gather, with a reduce-scatter as its backward."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup, count: int) -> Tensor:
        ctx.group = group
        gathered = own.new_empty(count, *own.shape)
        dist.all_gather_single(gathered.view(-1), own.contiguous().view(-1), group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None, None]:
        own = gradients.new_empty(gradients.shape[1:])
        dist.reduce_scatter_single(own.view(-1), gradients.contiguous().view(-1), group=ctx.group)
        return own, None, None
