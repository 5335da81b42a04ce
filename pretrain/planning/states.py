"""What an optimizer keeps, stores and sends under ZeRO-3, counted from the shapes of parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pretrain.config.root import Config
from pretrain.model.transformer import Transformer
from pretrain.trained import PRECISIONS
from pretrain.training import muon, optim


def held_bytes(config: Config, model: Transformer, ranks: int) -> int:
    """Bytes of a rank's float32 masters and states; factors are whole on every rank."""
    return 4 * sum(
        -(-numel // ranks) if partitioned else numel
        for numel, partitioned in _tensors(config, model)
    )


def stored_bytes(config: Config, model: Transformer, ranks: int) -> int:
    """Bytes that a rank writes of them into a checkpoint; with one rank, all of them."""
    return 4 * sum(-(-numel // ranks) for numel, _ in _tensors(config, model))


def sent_bytes(config: Config, model: Transformer, ranks: int) -> float:
    """Bytes that rank 0 sends in a step beside what ZeRO sends, round rings.

    Adafactor's sums of rows, columns, weights and updates; the matrices that Muon exchanges, both
    ways, as if all of what is sent or received, the larger, were another rank's.
    """
    shapes: list[tuple[optim.Group, tuple[int, ...]]] = [
        (group, tuple(parameter.shape))
        for group in _groups(config, model)
        for parameter in group["params"]
    ]
    if config.optim.name == "adafactor":
        sums = sum(2 + (sum(shape) if group["factored"] else 0) for group, shape in shapes)
        return 2 * 4 * sums * (ranks - 1) / ranks
    if config.optim.name == "muon":
        matrices = [shape for group, shape in shapes if group["orthogonal"]]
        owned = muon.owners(matrices, ranks)
        own = sum(-(-math.prod(matrix) // ranks) for matrix in matrices)
        whole = sum(
            math.prod(matrix) for matrix, rank in zip(matrices, owned, strict=True) if rank == 0
        )
        width: int = PRECISIONS[config.train.precision].itemsize
        return 2 * max(own, whole) * width * (ranks - 1) / ranks
    return 0.0


def _groups(config: Config, model: Transformer) -> list[optim.Group]:
    named = ((name, p, p.ndim) for name, p in model.named_parameters())
    return optim.parameter_groups(named, model.gates(), config.optim)


def _tensors(config: Config, model: Transformer) -> Iterator[tuple[int, bool]]:
    """Elements of every master and state, and whether it is partitioned."""
    for group in _groups(config, model):
        for parameter in group["params"]:
            kept = optim.kept(group, tuple(parameter.shape))
            for _ in ("param", *kept.moments):
                yield parameter.numel(), True
            for shape in kept.factors.values():
                yield math.prod(shape), False
