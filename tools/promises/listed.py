"""All promises, in the order of their numbers."""

from __future__ import annotations

from tools.promises import checkpoints
from tools.promises.campaign import Promise

PROMISES: tuple[Promise, ...] = tuple(
    sorted([*checkpoints.PROMISES], key=lambda promise: promise.number)
)
