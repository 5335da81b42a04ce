"""The ranks of a run: process groups, the share of each rank, and shared windows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.dataset.settings import SettingsError
from data_prep.dataset.wording import counted
from pretrain.checkpoint.ranks import Ranks
from pretrain.config.root import Config
from pretrain.config.run import LaunchConfig
from pretrain.jobs.launch import Place
from pretrain.training.heap import keep_freed_memory


@contextmanager
def ranks_joined(launch: LaunchConfig, place: Place) -> Iterator[torch.device]:
    """The process group of all ranks, and this rank's device.

    Raises SettingsError where this rank was to have a GPU that its machine has not.
    """
    cuda = launch.device == "cuda" or (launch.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    if cuda:
        gpus = torch.cuda.device_count()
        if place.local_rank >= gpus:
            raise SettingsError(
                [
                    f"launch.device: rank {place.rank} would have GPU {place.local_rank} of its "
                    f"machine, where torch finds {counted(gpus, 'GPU')}; launch at most a rank for "
                    "each, let every rank see all of them (srun without --gpus-per-task and "
                    "--gpu-bind), or set launch.device=cpu"
                ]
            )
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    # Small exchanges between ranks use gloo on the CPU, the model's tensors their device's backend.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=place.init_method,
        rank=place.rank,
        world_size=place.size,
    )
    yield device
    # Not after an error: NCCL would wait here for peers that in turn wait for this rank.
    dist.destroy_process_group()


@dataclass(frozen=True)
class Share:
    """This rank's share of each step: a part of the windows of some lanes.

    `tokens` is its part of a window; `group` is its group with the ranks that compute the other
    parts, None if it computes whole windows.
    """

    rank: int
    lanes: range
    tokens: slice
    group: SequenceGroup | None
    device: torch.device

    @staticmethod
    def of(config: Config, ranks: Ranks, device: torch.device) -> Share:
        """The share of this rank; all of `ranks` must call it together."""
        count = config.parallel.sequence
        return Share(
            ranks.rank,
            config.lanes_of_rank(ranks.rank, ranks.size),
            config.tokens_of_rank(ranks.rank),
            SequenceGroup(count) if count > 1 else None,
            device,
        )

    @property
    def owned(self) -> range:
        """The lanes that this rank stores and counts: the first rank of a sequence group does."""
        return self.lanes if self.tokens.start == 0 else range(0)


class SequenceGroup:
    """This rank's sequence group: `count` consecutive ranks, each with a part of the windows.

    Every rank must create it, with the same count, which divides the number of ranks. It implements
    the model's `Parts` protocol.
    """

    def __init__(self, count: int) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        assert ranks % count == 0
        # All ranks must take part in creating each group, members or not.
        groups = [dist.new_group(range(first, first + count)) for first in range(0, ranks, count)]
        self._group = groups[rank // count]
        self.index = rank % count
        self.count = count

    def gather(self, own: Tensor) -> Tensor:
        """Every part's tensor, in order: `own` [...] -> [count, ...].

        The backward sums all ranks' gradients of this rank's tensor.
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
