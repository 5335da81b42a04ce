"""The loader: a rank's lanes, read ahead by threads, as batches of windows.

Threads suffice, since hashing, reading and copying release the interpreter's lock. They touch numpy
alone: a thread that is inside torch when the interpreter ends can abort the process.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from data_prep.dataset.shards import DataError
from pretrain.data.lanes import Lane, LanePlace, Mix
from pretrain.data.packing import Window

# A thread that hashes a shard cannot be interrupted. It only reads, and dies with the process.
_JOIN_SECONDS = 1.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Batch:
    """A window of each of a rank's lanes: tensors [lanes, length] on the CPU.

    `tokens` and `targets` are int64, `starts` bool, `weights` float32 or None, as `Lane.window`
    says. `places` are the lanes' places after this batch: with them a new loader continues with
    the next one.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    starts: torch.Tensor
    weights: torch.Tensor | None
    places: list[LanePlace]


_Placed = tuple[Window, LanePlace]
_Part = list[_Placed] | BaseException


class Loader(Iterator[Batch]):
    """Batches of `lanes` (of `total_lanes`), forever; the same for any `workers` and `prefetch`.

    `places` are where each lane of `lanes` continues, after `step` windows; None: at its beginning.
    `workers` threads share the lanes and hold at most `prefetch` batches ready. Raises DataError
    where a lane cannot begin; what fails in a thread is raised, once, in place of the batch that it
    was to be part of.
    """

    def __init__(
        self,
        mix: Mix,
        lanes: range,
        total_lanes: int,
        length: int,
        seed: int,
        places: Sequence[LanePlace] | None,
        prefetch: int,
        workers: int,
        step: int = 0,
    ) -> None:
        starts = [None] * len(lanes) if places is None else places
        own = [
            Lane(mix, index, total_lanes, seed, place, step)
            for index, place in zip(lanes, starts, strict=True)
        ]
        workers = min(workers, len(own))
        self._shares = [range(worker, len(own), workers) for worker in range(workers)]
        shares = [[own[row] for row in share] for share in self._shares]
        self._team = _Team(mix, shares, length, prefetch)
        # Also where nobody closes: on collection, and before the interpreter takes itself apart.
        self._finalizer = weakref.finalize(self, self._team.stop)

    def __next__(self) -> Batch:
        if not self._finalizer.alive:
            raise RuntimeError("the loader is closed")
        try:
            placed: dict[int, _Placed] = {}
            for share, part in zip(self._shares, self._team.parts(), strict=True):
                if isinstance(part, BaseException):
                    raise part
                placed.update(zip(share, part, strict=True))
        except BaseException:
            # An interrupt too: the threads' windows are no longer of the same step.
            self.close()
            raise
        windows, places = zip(*(placed[row] for row in sorted(placed)), strict=True)
        tokens, targets, starts, weights = zip(*windows, strict=True)
        return Batch(
            torch.from_numpy(np.stack(tokens)),
            torch.from_numpy(np.stack(targets)),
            torch.from_numpy(np.stack(starts)),
            None if weights[0] is None else torch.from_numpy(np.stack(weights)),
            list(places),
        )

    def close(self) -> None:
        """End the threads; may be called again."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Team:
    """A loader's threads and queues; apart from the loader, so that it can be collected."""

    def __init__(self, mix: Mix, shares: list[list[Lane]], length: int, prefetch: int) -> None:
        self._mix = mix
        self._length = length
        self._stopped = False
        self._upcoming: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._ready: list[queue.Queue[_Part]] = [queue.Queue(prefetch) for _ in shares]
        self._threads = [
            threading.Thread(target=self._work, args=pair, name="loader-read", daemon=True)
            for pair in zip(shares, self._ready, strict=True)
        ]
        self._threads.append(threading.Thread(target=self._check, name="loader-check", daemon=True))
        for thread in self._threads:
            thread.start()

    def parts(self) -> Iterator[_Part]:
        """The next windows of each thread's lanes, or what went wrong there."""
        for ready in self._ready:
            yield ready.get()

    def stop(self) -> None:
        # Takes no lock that a thread of ours may hold: the collector may call it in any thread.
        self._stopped = True
        self._upcoming.put(None)
        end = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))

    def _work(self, lanes: list[Lane], ready: queue.Queue[_Part]) -> None:
        announced: set[tuple[int, int]] = set()
        try:
            while not self._stopped:
                part = [(lane.window(self._length), lane.place) for lane in lanes]
                upcoming = {shard for lane in lanes for shard in lane.next_shards}
                for shard in upcoming - announced:
                    self._upcoming.put(shard)
                announced = upcoming
                self._hand_over(part, ready)
        except BaseException as error:
            self._hand_over(error, ready)

    def _hand_over(self, part: _Part, ready: queue.Queue[_Part]) -> None:
        while not self._stopped:
            with contextlib.suppress(queue.Full):
                ready.put(part, timeout=_POLL_SECONDS)
                return

    def _check(self) -> None:
        """Check shards before their lanes open them, so that no window waits for a sha256."""
        while (upcoming := self._upcoming.get()) is not None and not self._stopped:
            source, shard = upcoming
            # The lane that opens the shard meets the error at the place where it belongs.
            with contextlib.suppress(DataError):
                self._mix.datasets[source].check(shard)
