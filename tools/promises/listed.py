"""All promises, in the order of their numbers."""

from __future__ import annotations

from itertools import chain

from tools.promises import (
    canaries,
    checkpoints,
    clusters,
    fuzzing,
    hangs,
    ledgers,
    malformed,
    on_ranks,
    pairs_of_starts,
    planted_secrets,
    resumes,
    shard_damage,
)
from tools.promises.campaign import Promise

_MODULES = (
    canaries,
    checkpoints,
    clusters,
    fuzzing,
    hangs,
    ledgers,
    malformed,
    on_ranks,
    pairs_of_starts,
    planted_secrets,
    resumes,
    shard_damage,
)
PROMISES: tuple[Promise, ...] = tuple(
    sorted(
        chain.from_iterable(module.PROMISES for module in _MODULES),
        key=lambda promise: promise.number,
    )
)
