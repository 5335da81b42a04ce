"""Adafactor over ZeRO's partitions: second moments of whole matrices, as row and column means.

Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (2018), their
algorithms 4 to 6 without a first moment and with the schedule's rate in place of their relative
step. For a matrix X [n, m] with gradient G, at its step t, with b = 1 - t^-decay:

    R = b R + (1 - b) mean over columns of (G^2 + eps1)            [n]
    C = b C + (1 - b) mean over rows of (G^2 + eps1)               [m]
    U = G / sqrt(R C^T / mean(R))
    U = U / max(1, RMS(U) / clip)
    X = X - rate * max(eps2, RMS(X)) * U

Vectors keep a second moment for every element. Gates are not scaled by their own size, which begins
as 0: their rate is absolute. Weight decay is decoupled, X (1 - rate * decay), as AdamW's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config.optim import AdafactorConfig
from pretrain.training.partitions import Partition, with_gradients


class Adafactor(torch.optim.Optimizer):
    """Steps groups whose `factored` says if they are matrices, and `scaled` if by their size.

    Row and column means are equal on all ranks; a rank sums over the elements that it holds, and
    two all-reduces of a few numbers per row and column make the sums whole.
    """

    def __init__(self, groups: list[dict[str, Any]], config: AdafactorConfig) -> None:
        super().__init__(groups, {})
        self._config = config
        self._placed: dict[Tensor, list[Partition]] = {}
        self.factors: dict[str, dict[str, Tensor]] = {}
        """By parameter: `row` [n] and `column` [m], float32, whole on every rank."""

    def place(self, partitions: Iterable[Partition], factored: Iterable[str]) -> None:
        """Say where the parameters lie, and name those that are factored; before any step."""
        for partition in partitions:
            self._placed.setdefault(partition.flat, []).append(partition)
            if partition.name in factored:
                rows, columns = partition.matrix
                zeros = partition.flat.new_zeros
                self.factors[partition.name] = {"row": zeros(rows), "column": zeros(columns)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the groups' tensors; their gradients become the updates."""
        for group in self.param_groups:
            placed = [one for flat in group["params"] for one in self._placed[flat]]
            if partitions := with_gradients(placed):
                self._step(group, partitions)

    def _step(self, group: dict[str, Any], partitions: list[Partition]) -> None:
        for flat in {one.flat: None for one in partitions}:
            self.state[flat]["step"] += 1
        beta = 1.0 - float(self.state[partitions[0].flat]["step"]) ** -self._config.decay
        if group["factored"]:
            sizes = self._factor(partitions, beta)
        else:
            sizes = self._normalise(partitions, beta)
        # [parameters]: the sums of squares of the updates, then what they are multiplied by.
        norms = _whole([_square_sum(one.gradient) for one in partitions], partitions)
        counts = norms.new_tensor([one.numel for one in partitions])
        scales = group["lr"] / ((norms / counts).sqrt() / self._config.clip).clamp(min=1.0)
        if group["scaled"]:
            scales = scales * (sizes / counts).sqrt().clamp(min=self._config.eps2)
        for one, scale in zip(partitions, scales.unbind(), strict=True):
            weights = one.of(one.flat.data)
            weights.mul_(1.0 - group["lr"] * group["weight_decay"])
            weights.sub_(one.gradient.mul_(scale))

    def _factor(self, partitions: list[Partition], beta: float) -> Tensor:
        """Update the means of matrices and make gradients updates; sums of squares of weights."""
        found = []
        for one in partitions:
            found += [*_sums(one), _square_sum(one.of(one.flat.data))]
        lengths = [tensor.numel() for tensor in found]
        sums = iter(torch.split(_whole(found, partitions), lengths))
        sizes = []
        for one in partitions:
            row, column = self.factors[one.name]["row"], self.factors[one.name]["column"]
            for mean, other in ((row, column), (column, row)):
                # A row's mean is over as many elements as there are columns.
                fresh = next(sums) / other.numel() + self._config.eps1
                mean.mul_(beta).add_(fresh, alpha=1.0 - beta)
            sizes.append(next(sums))
            _divide(one, row, column)
        return torch.cat(sizes)

    def _normalise(self, partitions: list[Partition], beta: float) -> Tensor:
        """The same for vectors, whose second moment is of every element."""
        for one in partitions:
            gradient, moment = one.gradient, one.of(self.state[one.flat]["exp_avg_sq"])
            moment.mul_(beta).add_(gradient.square() + self._config.eps1, alpha=1.0 - beta)
            gradient.mul_(moment.rsqrt())
        return _whole([_square_sum(one.of(one.flat.data)) for one in partitions], partitions)


def _square_sum(values: Tensor) -> Tensor:
    """[1]."""
    return values.square().sum().view(1)


def _whole(sums: list[Tensor], partitions: list[Partition]) -> Tensor:
    """The sums over all elements, in one tensor, from those over this rank's."""
    joined = torch.cat(sums)
    if not partitions[0].replicated:
        dist.all_reduce(joined)
    return joined


def _rows(one: Partition) -> tuple[Tensor, slice]:
    """The rows [rows, m] of the gradient that this rank holds some of, and which they are.

    A view where the rank holds whole rows, else a copy with zeros for what it does not hold.
    """
    _, columns = one.matrix
    first, last = one.own.start // columns, -(-one.own.stop // columns)
    head, length = one.own.start - first * columns, (last - first) * columns
    held = one.gradient
    if len(held) < length:
        copied = held.new_zeros(length)
        copied[head : head + len(held)] = held
        held = copied
    return held.view(-1, columns), slice(first, last)


def _sums(one: Partition) -> tuple[Tensor, Tensor]:
    """Sums of squares of each row [n] and column [m] of the gradient, over what this rank holds."""
    rows, columns = one.matrix
    row, column = one.flat.new_zeros(rows), one.flat.new_zeros(columns)
    if one.own:
        held, which = _rows(one)
        squares = held.square()
        row[which], column = squares.sum(dim=1), squares.sum(dim=0)
    return row, column


def _divide(one: Partition, row: Tensor, column: Tensor) -> None:
    """Divide the gradient by the square root of its second moment as the factors give it."""
    if one.own:
        held, which = _rows(one)
        held.mul_((row[which] / row.mean()).rsqrt().unsqueeze(1)).mul_(column.rsqrt())
        head = one.own.start - which.start * one.matrix[1]
        one.gradient.copy_(held.view(-1)[head : head + len(one.own)])
