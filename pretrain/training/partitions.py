"""Which elements of a parameter each rank steps, and where in the optimizer's flat tensors.

ZeRO gives the optimizer flat float32 tensors that hold slices of many parameters. An optimizer
whose step depends on whole matrices needs to know which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Partition:
    """A parameter of `shape`, of which rank r holds the elements `parts[r]`, flattened.

    This rank's are in `flat`, a tensor of the optimizer's, from `start` on. Every rank has a
    partition of every parameter, in the same order, however few elements of it it holds.
    """

    name: str
    shape: tuple[int, ...]
    flat: Tensor
    start: int
    parts: tuple[range, ...]
    rank: int

    @property
    def own(self) -> range:
        """The elements that this rank holds."""
        return self.parts[self.rank]

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the whole parameter."""
        return self.shape[0], self.numel // self.shape[0]

    @property
    def replicated(self) -> bool:
        """Whether every rank holds, and steps, all of it: ZeRO stage 0, or one rank."""
        return all(len(part) == self.numel for part in self.parts)

    def of(self, tensor: Tensor) -> Tensor:
        """A flat view of this rank's elements in `tensor`, which lies as `flat` does."""
        return tensor.view(-1)[self.start : self.start + len(self.own)]

    @property
    def gradient(self) -> Tensor:
        """A flat view of the gradient of this rank's elements."""
        assert self.flat.grad is not None
        return self.of(self.flat.grad)


def with_gradients(partitions: list[Partition]) -> list[Partition]:
    """Those that have a gradient: without ZeRO, a parameter that nothing used has none."""
    return [partition for partition in partitions if partition.flat.grad is not None]
