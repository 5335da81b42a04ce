"""Runs a stage on this machine: datatrove's tasks, in worker processes of our own.

datatrove's local pool waits forever for a worker that the system killed, and leaves its workers
running when it is killed itself. Here a lost worker ends the run with a message, and workers end
with their parent. datatrove's completion marks by rank are not used: the steps keep their own.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor

from data_prep import progress
from data_prep.progress import Progress
from data_prep.stages import UnitStep

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2
# Units are dealt to tasks in turn; a few tasks a worker even out units of different weight.
_TASKS_A_WORKER = 8


class WorkerLostError(RuntimeError):
    """A worker process ended without saying why."""


def run_stage(step: UnitStep, workers: int) -> None:
    """Do what the step has not done yet. What a worker raises is raised here."""
    step.check()
    done = step.done()
    if all(done):
        return
    work = step.work
    tasks = min(len(done), workers * _TASKS_A_WORKER)
    executor = _Tasks(
        [step],
        tasks=tasks,
        logging_dir=str(work.directory / "logs" / step.stage),
        skip_completed=False,
    )
    finished = sum(size for size, is_done in zip(step.sizes, done, strict=True) if is_done)
    shown = Progress(step.label, sum(step.sizes), finished)
    try:
        _run_tasks(executor, min(workers, tasks), work.directory / "workers.log", shown)
    except BrokenProcessPool:
        raise WorkerLostError(
            f"a worker was killed while it was at {step.label!r} (out of memory?); the same "
            "command continues; fewer workers need less memory: workers=1"
        ) from None
    finally:
        shown.close()


class _Tasks(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's bookkeeping around a task: environment, log file, statistics."""

    def do(self, rank: int) -> None:
        self._run_for_rank(rank, rank)


def _run_tasks(executor: _Tasks, workers: int, log: Path, shown: Progress) -> None:
    context = multiprocessing.get_context("fork")
    counters = progress.shared_counters(context)
    sys.stdout.flush()
    sys.stderr.flush()
    with ProcessPoolExecutor(
        workers, context, initializer=_begin_worker, initargs=(os.getpid(), log, counters)
    ) as pool:
        try:
            waiting: Any = {pool.submit(executor.do, rank) for rank in range(executor.tasks)}
            while waiting:
                done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    future.result()
                shown.show(*counters.get_obj())
        except BaseException:
            # What they were writing has a temporary name: nothing is lost that was finished.
            for worker in multiprocessing.active_children():
                worker.kill()
            pool.shutdown(cancel_futures=True)
            raise


def _begin_worker(parent: int, log: Path, counters: Any) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # An interrupt is the parent's to handle, once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # datatrove's logger asks for sys.stderr, libraries in C write to its descriptor.
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    os.dup2(sys.stderr.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    progress.watch(counters)
