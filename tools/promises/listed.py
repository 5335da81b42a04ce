"""All promises, in the order of their numbers."""

from __future__ import annotations

from tools.promises import canaries, checkpoints, fuzzing, malformed, resumes, shard_damage
from tools.promises.campaign import Promise

_ALL = (
    *(*checkpoints.PROMISES, *resumes.PROMISES, *shard_damage.PROMISES, *malformed.PROMISES),
    *(*canaries.PROMISES, *fuzzing.PROMISES),
)
PROMISES: tuple[Promise, ...] = tuple(sorted(_ALL, key=lambda promise: promise.number))
