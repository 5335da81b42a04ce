"""Stragglers: ranks that are slow themselves, not because they wait for others.

In a step every rank waits for the slowest one, so step times do not identify it. Instead, two
things that a rank does alone are measured: a fixed matrix product on its device, at every log line,
and how long it waited for its batches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from pretrain.checkpoint.ranks import Ranks

Cause = Literal["compute", "data"]

_SLOW_PRODUCT = 1.5  # times the median of the ranks
_LONG_WAIT = 0.1  # of the interval, more than the median of the ranks
_SHARE = 0.002  # of the interval that the products may take
_SIZE = {"cpu": 256, "cuda": 4096}


@dataclass(frozen=True)
class Straggler:
    """A slow rank; `excess` is in times the median (compute) or seconds over it (data)."""

    rank: int
    cause: Cause
    excess: float

    def described(self, host: str) -> str:
        """A message for the log, with the rank's host."""
        if self.cause == "compute":
            return f"rank {self.rank} ({host}) computes {self.excess:.1f} times slower than others"
        return f"rank {self.rank} ({host}) waited {self.excess:.1f} s longer for data than others"


class Stragglers:
    """Finds stragglers among `ranks`; this process computes on `device`."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        size = _SIZE[device.type]
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        # Its square is itself, so products neither grow nor vanish.
        self._matrix = torch.full((size, size), 1 / size, dtype=dtype, device=device)
        self._product = torch.empty_like(self._matrix)
        self._ranks = ranks
        self._count = 1
        self._suspects: set[tuple[int, Cause]] = set()

    def look(self, data_wait: float, interval: float) -> list[Straggler]:
        """Ranks that were slow both in this interval and the previous one; call it on all ranks.

        For this rank, since the last call: `data_wait` is the seconds that it waited for batches,
        `interval` the seconds elapsed.
        """
        measured = self._ranks.gather([self._time_product(), data_wait, interval])
        products, waits = [row[0] for row in measured], [row[1] for row in measured]
        interval = measured[0][2]
        # The same count on every rank, so that the times are comparable.
        self._count = max(1, int(_SHARE * interval / min(products)))
        found = slow_ranks(products, waits, interval)
        again = [one for one in found if (one.rank, one.cause) in self._suspects]
        self._suspects = {(one.rank, one.cause) for one in found}
        return again

    def _time_product(self) -> float:
        """Seconds per product."""
        if self._matrix.device.type == "cuda":
            torch.cuda.synchronize(self._matrix.device)
        began = time.perf_counter()
        for _ in range(self._count):
            torch.mm(self._matrix, self._matrix, out=self._product)
        if self._matrix.device.type == "cuda":
            torch.cuda.synchronize(self._matrix.device)
        return (time.perf_counter() - began) / self._count


def slow_ranks(
    products: Sequence[float], waits: Sequence[float], interval: float
) -> list[Straggler]:
    """Ranks much slower than the median, given each one's seconds per product and of data wait."""
    # With two ranks, the reference is the faster one.
    product, wait = statistics.median_low(products), statistics.median_low(waits)
    slow = [
        Straggler(rank, "compute", own / product)
        for rank, own in enumerate(products)
        if own > _SLOW_PRODUCT * product
    ]
    late = [
        Straggler(rank, "data", own - wait)
        for rank, own in enumerate(waits)
        if own - wait > _LONG_WAIT * interval
    ]
    return slow + late
