"""Runs stages on this machine, in worker processes.

They are forked once, for all stages. A lost worker ends the run with a message, and workers end
with their parent: datatrove's local pool would wait forever for a worker that the system killed,
and leave its workers running when it is killed itself.
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
from types import TracebackType
from typing import Any, Self

from data_prep.config import Config
from data_prep.dataset import children
from data_prep.pipeline import progress
from data_prep.pipeline.progress import Progress
from data_prep.pipeline.stages import Stage
from data_prep.pipeline.workspace import Work

_POLL_SECONDS = 0.2


class WorkerLostError(RuntimeError):
    """A worker process was killed."""


class Workers:
    """At most `count` processes, forked for the first stage that has units to do.

    They end with the `with` block, at once if it ends by an exception.
    """

    def __init__(self, config: Config, work: Work, count: int) -> None:
        self._config, self._work, self._count = config, work, count
        context = multiprocessing.get_context("fork")
        self._counters = context.Array(ctypes.c_int64, 2)
        self._next_unit = context.Value(ctypes.c_int64)
        self._pool = ProcessPoolExecutor(
            count,
            context,
            initializer=_begin_worker,
            initargs=(os.getpid(), config, work, self._counters, self._next_unit),
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
            # Files they were writing have temporary names: no finished unit is lost.
            for worker in multiprocessing.active_children():
                worker.kill()
        self._pool.shutdown(cancel_futures=True)

    def run(self, stage: type[Stage]) -> None:
        """Do the stage's units that are not done. Raises what a worker raises; WorkerLostError."""
        todo = stage(self._config, self._work)
        todo.check()
        done = todo.done()
        if all(done):
            return
        finished = sum(size for size, is_done in zip(todo.sizes, done, strict=True) if is_done)
        shown = Progress(stage.label, sum(todo.sizes), finished)
        try:
            self._run(stage, min(self._count, len(done)), shown)
        except BrokenProcessPool:
            raise WorkerLostError(
                f"a worker was killed during {stage.label!r} (out of memory?); the same command "
                "continues; fewer workers need less memory: workers=1"
            ) from None
        finally:
            shown.close()

    def _run(self, stage: type[Stage], tasks: int, shown: Progress) -> None:
        counts = self._counters.get_obj()
        # No worker uses them between stages.
        counts[:] = [0] * len(counts)
        self._next_unit.get_obj().value = 0
        sys.stdout.flush()
        sys.stderr.flush()
        waiting: Any = {self._pool.submit(_do, stage) for _ in range(tasks)}
        while waiting:
            done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
            for future in done:
                future.result()
            shown.show(*counts)


# In a worker: its arguments, and the number of the next unit, shared by all workers.
_run: tuple[Config, Work, Any] | None = None


def _do(stage: type[Stage]) -> None:
    """In a worker: do units of the stage until none are left."""
    assert _run is not None
    config, work, next_unit = _run
    todo = stage(config, work)
    todo.run(_taken(next_unit, len(todo.sizes)))


def _taken(next_unit: Any, units: int) -> Iterator[int]:
    """Units that no other worker has taken, one at a time."""
    while True:
        with next_unit.get_lock():
            unit = next_unit.value
            next_unit.value += 1
        if unit >= units:
            return
        yield unit


def _begin_worker(parent: int, config: Config, work: Work, counters: Any, next_unit: Any) -> None:
    children.end_with(parent)
    # The parent alone handles what a terminal sends to all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # datatrove's logger writes to sys.stderr, libraries in C to its descriptor.
    sys.stdout = sys.stderr = (work.directory / "workers.log").open("a", buffering=1)
    os.dup2(sys.stderr.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    progress.watch(counters)
    import_webdataset()
    global _run
    _run = config, work, next_unit


def import_webdataset() -> None:
    """Import webdataset in a process that only prepares data, without torch.

    webdataset imports torch if it can, which takes longer than many stages, and works without.
    """
    has_torch = "torch" in sys.modules
    if not has_torch:
        sys.modules["torch"] = None  # type: ignore[assignment]
    importlib.import_module("webdataset")
    if not has_torch:
        del sys.modules["torch"]
