"""Runs stages on this machine: datatrove's tasks, in worker processes of our own.

datatrove's local pool waits forever for a worker that the system killed, and leaves its workers
running when it is killed itself. Here a lost worker ends the run with a message, and workers end
with their parent. They are forked once, for all stages. datatrove's completion marks by rank are
not used: the steps keep their own.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from types import TracebackType
from typing import Any, Self

from datatrove.executor.local import LocalPipelineExecutor

from data_prep.config import Config
from data_prep.pipeline import progress
from data_prep.pipeline.progress import Progress
from data_prep.pipeline.stages import UnitStep
from data_prep.pipeline.workspace import Work

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2


class WorkerLostError(RuntimeError):
    """A worker process ended without saying why."""


class Workers:
    """At most `count` processes, forked for the first stage that has something to do.

    On the way out they end; at once, if that is by an exception.
    """

    def __init__(self, config: Config, work: Work, count: int) -> None:
        self._config, self._work, self._count = config, work, count
        context = multiprocessing.get_context("fork")
        self._counters = progress.shared_counters(context)
        self._next = context.Value(ctypes.c_int64)
        self._pool = ProcessPoolExecutor(
            count,
            context,
            initializer=_begin_worker,
            initargs=(os.getpid(), config, work, self._counters, self._next),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            # What they were writing has a temporary name: nothing is lost that was finished.
            for worker in multiprocessing.active_children():
                worker.kill()
        self._pool.shutdown(cancel_futures=True)

    def run(self, stage: type[UnitStep]) -> None:
        """Do what the stage has not done yet. What a worker raises is raised here."""
        step = stage(self._config, self._work)
        step.check()
        done = step.done()
        if all(done):
            return
        finished = sum(size for size, is_done in zip(step.sizes, done, strict=True) if is_done)
        shown = Progress(step.label, sum(step.sizes), finished)
        try:
            self._run(stage, min(self._count, len(done)), shown)
        except BrokenProcessPool:
            raise WorkerLostError(
                f"a worker was killed while it was at {step.label!r} (out of memory?); the same "
                "command continues; fewer workers need less memory: workers=1"
            ) from None
        finally:
            shown.close()

    def _run(self, stage: type[UnitStep], tasks: int, shown: Progress) -> None:
        counts = self._counters.get_obj()
        # Between stages no worker is at them.
        counts[:] = [0] * len(counts)
        self._next.get_obj().value = 0
        sys.stdout.flush()
        sys.stderr.flush()
        waiting: Any = {self._pool.submit(_do, stage, tasks, rank) for rank in range(tasks)}
        while waiting:
            done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
            for future in done:
                future.result()
            shown.show(*counts)


class _Tasks(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's bookkeeping around a task: environment, log file, statistics."""

    def do(self, rank: int) -> None:
        self._run_for_rank(rank, rank)


# Of a worker: what it was forked with.
_run: tuple[Config, Work, Any] | None = None


def _do(stage: type[UnitStep], tasks: int, rank: int) -> None:
    """In a worker: do units of the stage as long as there are any."""
    assert _run is not None
    config, work, following = _run
    step = stage(config, work)
    pipeline = [partial(_dealt, following, len(step.sizes)), step]
    logs = str(work.directory / "logs" / step.stage)
    _Tasks(pipeline, tasks=tasks, logging_dir=logs, skip_completed=False).do(rank)


def _dealt(following: Any, units: int, data: Any, rank: int, world_size: int) -> Iterator[int]:
    """Units that no other task has: whoever is free takes the next."""
    while True:
        with following.get_lock():
            unit = following.value
            following.value += 1
        if unit >= units:
            return
        yield unit


def _begin_worker(parent: int, config: Config, work: Work, counters: Any, following: Any) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # An interrupt is the parent's to handle, once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # datatrove's logger asks for sys.stderr, libraries in C write to its descriptor.
    sys.stdout = sys.stderr = (work.directory / "workers.log").open("a", buffering=1)
    os.dup2(sys.stderr.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    progress.watch(counters)
    import_webdataset()
    global _run
    _run = config, work, following


def import_webdataset() -> None:
    """Import webdataset for a process that prepares data and does nothing else.

    It looks for torch, whose import takes longer than many a stage, and does without it.
    """
    if "torch" in sys.modules:
        importlib.import_module("webdataset")
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("webdataset")
    finally:
        del sys.modules["torch"]
