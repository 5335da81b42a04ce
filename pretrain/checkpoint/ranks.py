"""How the ranks of a run agree about a checkpoint.

Storing and loading need one collective, over small JSON-able objects. There is no bare barrier: an
error on one rank must reach all of them, or it leaves the others waiting for ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from pretrain.checkpoint.manifest import CheckpointError

T = TypeVar("T")


class Ranks(Protocol):
    """The ranks of a run, as one of them sees them."""

    rank: int
    size: int

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` (small, JSON-able), by rank, on every rank."""


class SoloRanks:
    """The one rank of a process that is alone: evaluation, generation, tests."""

    rank = 0
    size = 1

    def gather(self, value: T) -> list[T]:
        """`[value]`."""
        return [value]


class GroupRanks:
    """The ranks of a torch.distributed process group (None: the default one).

    `device` is where the group's backend works: cpu for gloo, the rank's own GPU for NCCL. Values
    travel as JSON: what comes back has lists for tuples and strings for a dict's integer keys.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self._group = group
        self._device = torch.device(device)
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank, on every rank."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self._all_gather(torch.tensor([len(text)]))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(text)] = text
        return [
            json.loads(row[: int(length)].numpy().tobytes())
            for row, length in zip(self._all_gather(padded), lengths, strict=True)
        ]

    def _all_gather(self, row: torch.Tensor) -> list[torch.Tensor]:
        row = row.to(self._device)
        rows = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(rows, row, self._group)
        return [gathered.cpu() for gathered in rows]


def agreed(ranks: Ranks, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return every rank's result (small, JSON-able), by rank.

    Raises the same CheckpointError on all ranks when it failed on any, whatever it raised there.
    It is a barrier: on return every rank has finished its action.
    """
    failure: Exception | None = None
    outcome: dict[str, object] = {}
    try:
        outcome["result"] = action()
    except Exception as error:
        failure = error
        outcome["error"] = str(error) if isinstance(error, CheckpointError) else repr(error)
        if isinstance(error, OSError):
            place = f"{error.filename}: " if error.filename else ""
            outcome["error"] = f"{place}{error.strerror or error}"
    outcomes = ranks.gather(outcome)
    errors = {rank: str(one["error"]) for rank, one in enumerate(outcomes) if "error" in one}
    if errors:
        raise CheckpointError(_told(errors, ranks.size)) from failure
    return [one["result"] for one in outcomes]  # type: ignore[misc]


def _told(errors: dict[int, str], size: int) -> str:
    """One text of all ranks' errors: what several ranks say is said once."""
    ranks_of: dict[str, list[int]] = {}
    for rank, text in errors.items():
        ranks_of.setdefault(text, []).append(rank)
    if len(ranks_of) == 1 and len(errors) == size:
        return next(iter(ranks_of))
    return "; ".join(
        f"{text} (rank {', '.join(map(str, ranks))})" for text, ranks in ranks_of.items()
    )
