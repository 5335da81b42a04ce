"""How the ranks of a run agree: on values, on sums, and on errors.

There is no bare barrier: an error on one rank must reach all of them, or it leaves the others
waiting for ever.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from data_prep.dataset.command import explained
from data_prep.dataset.settings import SettingsError
from pretrain.checkpoint.manifest import CheckpointError

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Ranks(Protocol):
    """The ranks of a run, as one of them sees them."""

    rank: int
    size: int

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` (small, JSON-able), by rank, on every rank."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum over the ranks of each of `values`, in float64, the same on every rank."""


class SoloRanks:
    """The one rank of a process that is alone: evaluation, generation, tests."""

    rank = 0
    size = 1

    def gather(self, value: T) -> list[T]:
        """`[value]`."""
        return [value]

    def sum(self, values: Sequence[float]) -> list[float]:
        """`values`."""
        return list(values)


class GroupRanks:
    """The ranks of a torch.distributed process group that has a backend for the CPU.

    None is the default group. Values travel as JSON, never as pickles: tuples come back as lists
    and a dict's integer keys as strings.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank, on every rank."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self._all_gather(torch.tensor([len(text)]))
        padded = torch.zeros(max(map(int, lengths)), dtype=torch.uint8)
        padded[: len(text)] = text
        rows = zip(self._all_gather(padded), lengths, strict=True)
        return [json.loads(row[: int(length)].numpy().tobytes()) for row, length in rows]

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over the ranks, the same on all of them."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._group)
        return tensor.tolist()

    def _all_gather(self, row: torch.Tensor) -> list[torch.Tensor]:
        rows = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(rows, row, self._group)
        return rows


def agreed(ranks: Ranks, action: Callable[[], T], error: type[ValueError] = CheckpointError) -> T:
    """What `action` returns on this rank, once it has succeeded on every rank.

    Raises an `error` with the same text on all ranks where it failed on any, whatever it raised
    there; a SettingsError where that is what it raised, since a job with a mistake is not to be
    started again. It is a barrier: on return every rank has finished its action.
    """
    results: list[T] = []
    failure: Exception | None = None
    try:
        results.append(action())
    except Exception as raised:
        failure = raised
    if ranks.sum([float(failure is not None)]) != [0.0]:
        texts = ranks.gather(None if failure is None else _reason(failure))
        failed = {rank: text for rank, text in enumerate(texts) if text is not None}
        mistakes = ranks.gather(failure.problems if isinstance(failure, SettingsError) else [])
        if all(mistakes[rank] for rank in failed):
            raise SettingsError(list(dict.fromkeys(itertools.chain(*mistakes)))) from failure
        raise error(_joined(failed, ranks.size)) from failure
    return results[0]


def of_first(ranks: Ranks, action: Callable[[], T]) -> T:
    """What `action`, done by rank 0 alone, returned there (small, JSON-able), on every rank.

    For what one rank writes for all of them, or looks at: on a network file system they may not
    see the same. Raises a CheckpointError on all ranks where it failed. It is a barrier.
    """

    def own() -> list[T]:
        return [action()] if ranks.rank == 0 else []

    return ranks.gather(agreed(ranks, own))[0][0]


def _reason(failure: Exception) -> str:
    """The failure in a line; the trace of one that is no message for the user is logged."""
    if isinstance(failure, OSError):
        return explained(failure)
    # Errors with a message for the user are classes of their own below ValueError.
    if isinstance(failure, ValueError) and type(failure) is not ValueError:
        return str(failure)
    _log.error("an unexpected error", exc_info=failure)
    return repr(failure)


def _joined(errors: dict[int, str], size: int) -> str:
    """One text of all ranks' errors, each with its ranks, unless all of them have the same."""
    ranks_of: dict[str, list[int]] = {}
    for rank, text in errors.items():
        ranks_of.setdefault(text, []).append(rank)
    if len(ranks_of) == 1 and len(errors) == size:
        return next(iter(ranks_of))
    return "; ".join(
        f"{text} (rank {', '.join(map(str, ranks))})" for text, ranks in ranks_of.items()
    )
