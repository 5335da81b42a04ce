"""All promises, in the order of their numbers."""

from __future__ import annotations

from tools.promises import checkpoints, fuzzing, shard_damage
from tools.promises.campaign import Promise

PROMISES: tuple[Promise, ...] = tuple(
    sorted(
        [*checkpoints.PROMISES, *shard_damage.PROMISES, *fuzzing.PROMISES],
        key=lambda promise: promise.number,
    )
)
