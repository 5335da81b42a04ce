"""Muon over ZeRO's partitions: hidden matrices step by their orthogonalised momentum.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the scale of
Liu et al., "Muon is Scalable for LLM Training" (2025, Moonlight). For a matrix X [n, m] with
gradient G:

    B = momentum * B + (1 - momentum) * G
    O = orthogonal((1 - momentum) * G + momentum * B)              (Nesterov)
    X = X (1 - rate * decay) - rate * rms * sqrt(max(n, m)) * O

An orthogonal [n, m] has elements of root mean square 1 / sqrt(max(n, m)), so an update's is rate *
rms; with rms 0.2, that of AdamW's updates, matrices take AdamW's rate and decay. All other
parameters are AdamW's: embedding, head, vectors, gates and memory vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config.optim import OptimConfig
from pretrain.training.partitions import Partition, with_gradients
from pretrain.training.uncompiled import AdamW

# Jordan's: five steps of this quintic bring singular values to between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


class Muon(AdamW):
    """Steps groups that are `orthogonal` as above, and the others as AdamW does.

    A matrix is orthogonalised by one rank, whole: the ranks send it what they hold of the momentum
    and get back their part of the result. Matrices are divided among the ranks by their work.
    `dtype` is that of the iteration and of what is sent.
    """

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimConfig, dtype: torch.dtype, fused: bool
    ) -> None:
        betas = (config.beta1, config.beta2)
        super().__init__(groups, betas=betas, eps=config.eps, fused=fused)
        self._config = config.muon
        self._dtype = dtype
        self._placed: dict[Tensor, list[Partition]] = {}

    def place(self, partitions: Iterable[Partition]) -> None:
        """Say where the parameters lie; before any step."""
        for partition in partitions:
            self._placed.setdefault(partition.flat, []).append(partition)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the groups' tensors; gradients of hidden matrices become Nesterov's momentum."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                self._step_hidden(group)

    def _step_hidden(self, group: dict[str, Any]) -> None:
        placed = [one for flat in group["params"] for one in self._placed[flat]]
        partitions = with_gradients(placed)
        if not partitions:
            return
        for flat in {one.flat: None for one in partitions}:
            assert flat.grad is not None
            self.state[flat]["step"] += 1
            momentum = self.state[flat]["momentum"]
            momentum.lerp_(flat.grad, 1.0 - self._config.momentum)
            flat.grad.lerp_(momentum, self._config.momentum)
        updates = _orthogonalised(partitions, self._dtype)
        for one, update in zip(partitions, updates, strict=True):
            weights = one.of(one.flat.data)
            weights.mul_(1.0 - group["lr"] * group["weight_decay"])
            scale = self._config.rms * math.sqrt(max(one.matrix))
            weights.sub_(update.to(weights.dtype), alpha=group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """U S V^T of [n, m] with all singular values S brought near 1, by Newton-Schulz iterations."""
    a, b, c = _COEFFICIENTS
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    found: Tensor = wide / wide.norm().clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = found @ found.mT
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if matrix.shape[0] > matrix.shape[1] else found


def owners(matrices: Sequence[tuple[int, ...]], ranks: int) -> list[int]:
    """The rank that orthogonalises each matrix: the largest first, each to the least busy rank."""
    work = [math.prod(shape) * min(shape) for shape in matrices]
    busy, found = [0] * ranks, [0] * len(work)
    for index in sorted(range(len(work)), key=lambda index: -work[index]):
        found[index] = busy.index(min(busy))
        busy[found[index]] += work[index]
    return found


def _orthogonalised(partitions: list[Partition], dtype: torch.dtype) -> list[Tensor]:
    """This rank's part of each orthogonalised gradient, flat."""
    rank, ranks = partitions[0].rank, len(partitions[0].parts)
    owned_by = owners([one.matrix for one in partitions], ranks)
    of: list[list[Partition]] = [[] for _ in range(ranks)]
    for one, owner in zip(partitions, owned_by, strict=True):
        of[owner].append(one)
    nothing = partitions[0].flat.new_empty(0, dtype=dtype)
    pieces = _exchanged(
        nothing,
        [[one.gradient[: _supplied(one, rank, to)] for one in of[to]] for to in range(ranks)],
        [[_supplied(one, source, rank) for one in of[rank]] for source in range(ranks)],
    )
    wholes = [
        orthogonal(torch.cat(parts).view(one.matrix)).reshape(-1)
        for one, parts in zip(of[rank], zip(*pieces, strict=True), strict=True)
    ]
    updates = _exchanged(
        nothing,
        [
            [whole[_bounds(one.parts[to])] for one, whole in zip(of[rank], wholes, strict=True)]
            for to in range(ranks)
        ],
        [[len(one.own) for one in of[source]] for source in range(ranks)],
    )
    queues = [iter(parts) for parts in updates]
    return [next(queues[owner]) for owner in owned_by]


def _supplied(one: Partition, source: int, owner: int) -> int:
    """How many elements `source` sends to the owner: what it holds, if the owner lacks it."""
    return 0 if one.replicated and source != owner else len(one.parts[source])


def _bounds(part: range) -> slice:
    return slice(part.start, part.stop)


def _exchanged(
    like: Tensor, outgoing: list[list[Tensor]], lengths: list[list[int]]
) -> list[list[Tensor]]:
    """What each rank sent here, from what this one sends to each; in the dtype of `like`.

    Flat tensors, whose lengths the receiver knows: `lengths` of each rank.
    """
    sent = torch.cat([like, *(tensor.to(like.dtype) for to in outgoing for tensor in to)])
    received = sent
    if len(outgoing) > 1:
        received = like.new_empty(sum(map(sum, lengths)))
        sizes = [sum(tensor.numel() for tensor in to) for to in outgoing]
        dist.all_to_all_single(received, sent, [sum(each) for each in lengths], sizes)
    pieces = iter(torch.split(received, [length for each in lengths for length in each]))
    return [[next(pieces) for _ in each] for each in lengths]
