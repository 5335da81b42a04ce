"""The training loop.

Everything that a step depends on is a function of the configuration and the last checkpoint: the
learning rate and the random seed are computed from the step's number, batches from the lanes'
places. So a run that is killed and resumed has the same losses, to the bit, as one that is not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from data_prep.dataset.wording import counted
from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.commit import refuse_superseded
from pretrain.checkpoint.ranks import GroupRanks, agreed
from pretrain.config.root import Config
from pretrain.config.training import EvaluationConfig
from pretrain.data.loader import Batch, Loader
from pretrain.jobs.launch import EXIT_STOPPED, Place, StopFlag
from pretrain.jobs.watchdog import Watchdog
from pretrain.training.evaluator import EvaluationStoppedError, Evaluator
from pretrain.training.metrics import configure_logging
from pretrain.training.parallel import ranks_joined
from pretrain.training.profiling import StepProfiler
from pretrain.training.records import Records
from pretrain.training.reporter import Reporter
from pretrain.training.run import Run
from pretrain.training.run_state import TrainingError
from pretrain.training.saver import Saver, reserved
from pretrain.training.step import StepResult
from pretrain.training.validator import Validator

_log = logging.getLogger("pretrain.training.trainer")

# Time that the watchdog needs, after its limit, to dump stacks and kill the rank.
_WATCHDOG_SECONDS = 120.0


def train(config: Config, place: Place, watchdog: Watchdog, attempt: int) -> int:
    """Train as one of `place.size` ranks, from the run's newest good checkpoint or from scratch.

    `attempt` is the number that rank 0 claimed; other ranks learn it here.
    Returns the exit code: 0 if finished, EXIT_STOPPED after a signal. Raises TrainingError,
    DataError, SettingsError and CheckpointError with a message for the user.
    """
    stop = StopFlag()
    with ranks_joined(config.launch, place) as device:
        directory = Path(config.run.directory)
        directory.mkdir(parents=True, exist_ok=True)
        configure_logging(place.rank, directory)
        (attempt, *_) = GroupRanks().gather(attempt)
        watchdog.beat("start", attempt=attempt)
        run = Run(config, Attempt(directory, attempt), device)
        step, steps = run.state.step, config.train.steps
        evaluator = Evaluator(config, run.engine, run.ranks, directory)
        missed = Due(Validator(run).missed(step), evaluator.missed(step))
        if step >= steps and not any(missed):
            _log.info("finished already: the checkpoint is of step %d of %d", step, steps)
            return 0
        return Trainer(run, watchdog, evaluator).train(stop, missed)


class Due(NamedTuple):
    """What is to be measured of the current weights."""

    validation: bool = False
    evaluations: Sequence[EvaluationConfig] = ()


NOTHING = Due()


class Trainer:
    """Trains a run from its current state; rank 0 records it. Every rank must create one.

    Raises TrainingError if records cannot be opened or host memory is too small, and
    SupersededError if a newer attempt of the run has begun.
    """

    def __init__(self, run: Run, watchdog: Watchdog, evaluator: Evaluator) -> None:
        config, ranks = run.config, run.ranks
        self.run = run
        self.watchdog = watchdog
        self.evaluator = evaluator
        self.profiler = StepProfiler(
            run.attempt.directory, ranks.rank, run.share.device, config.train
        )
        owned = run.share.owned
        host_copy = agreed(ranks, lambda: reserved(run.engine, owned, run.state), TrainingError)
        self.records = self._opened_records()
        # A separate group, because a save's collectives run concurrently with those of steps.
        patience = timedelta(seconds=config.watchdog.save + _WATCHDOG_SECONDS)
        self.saver = Saver(
            run.engine,
            owned,
            host_copy,
            run.attempt,
            config.checkpoint,
            run.described,
            GroupRanks(dist.new_group(backend="gloo", timeout=patience)),
            lambda step: watchdog.beat("save", step),
            watchdog.saving,
            self.records,
        )
        self.validator = Validator(run)
        self.reporter = Reporter(
            config, run.data, run.engine, run.share, ranks, self.records, run.state.step
        )

    def train(self, stop: StopFlag, missed: Due = NOTHING) -> int:
        """Train to the last step; after a signal, finish the current step, save and stop.

        What the attempt before has `missed` comes first. Returns the exit code, as the function
        `train` does.
        """
        run, lanes = self.run, self.run.share.lanes
        try:
            with (
                run.data.loader(lanes, run.state) as loader,
                run.data.preface_loader(lanes, run.state) as prefaces,
            ):
                return self._loop(loader, prefaces, stop, missed)
        finally:
            self.saver.end(run.state.step, run.config.watchdog.save)
            if self.records is not None:
                self.records.close()

    def _loop(
        self,
        loader: Loader,
        prefaces: Loader | None,
        stop: StopFlag,
        missed: Due,
    ) -> int:
        run, steps = self.run, self.run.config.train.steps
        if not self._measured(missed, stop):
            return self._stopped()
        if any(missed):
            self.watchdog.beat("start", run.state.step)
        self.reporter.meter.restart()
        while run.state.step < steps:
            with self.profiler.step(run.state.step + 1):
                batch = self._next(loader)
                preface = None if prefaces is None else self._next(prefaces)
                stopping, result = self._step(batch, preface, stop)
            last = run.state.step == steps
            self._report(result, last, stopping)
            self._check_skipped()
            self._save(last, stopping)
            step = run.state.step
            due = Due(self.validator.due(step), self.evaluator.due(step))
            if stopping and (any(due) or not last):
                return self._stopped()
            # After the save, which is written meanwhile: a run that ends here measures as it is
            # resumed.
            if not self._measured(due, stop):
                self._finish_save(last)
                return self._stopped()
        done = counted(run.state.step, "step"), counted(run.state.tokens, "token")
        _log.info("finished: %s, %s", *done)
        return 0

    def _stopped(self) -> int:
        _log.info(
            "stopped after step %d with a checkpoint; the same command resumes the run",
            self.run.state.step,
        )
        return EXIT_STOPPED

    def _measured(self, due: Due, stop: StopFlag) -> bool:
        """Measure what is due of the current state; False: a signal came before the end of it."""
        with self.reporter.meter.paused():
            if due.validation and not self._validated(stop):
                return False
            return all(self._evaluated(one, stop) for one in due.evaluations)

    def _validated(self, stop: StopFlag) -> bool:
        run, averaged = self.run, None
        measure = self._beat, lambda: stop.signal is not None
        found = self.validator.validate(*measure)
        if found and run.config.train.validate_ema:
            with run.engine.averaged():
                averaged = self.validator.validate(*measure)
        if found is None or (averaged is None and run.config.train.validate_ema):
            return self._left("validation")
        self.reporter.report_validation(run.state.step, found, averaged)
        return True

    def _evaluated(self, one: EvaluationConfig, stop: StopFlag) -> bool:
        step = self.run.state.step
        try:
            found = self.evaluator.run(one, step, self._beat, lambda: stop.signal is not None)
        except EvaluationStoppedError:
            return self._left(one.label)
        self.reporter.report_evaluation(step, one.label, found)
        return True

    def _beat(self) -> None:
        self.watchdog.beat("step", self.run.state.step)

    def _left(self, what: str) -> bool:
        _log.info("step %d | %s: left for when the run is resumed", self.run.state.step, what)
        return False

    def _next(self, loader: Loader) -> Batch:
        """The next batch; returns when every rank has its own. Raises TrainingError."""
        meter, began = self.reporter.meter, time.perf_counter()

        def own() -> Batch:
            batch = next(loader)
            meter.own_wait += time.perf_counter() - began
            return batch

        batch = agreed(self.run.ranks, own, TrainingError)
        meter.data_wait += time.perf_counter() - began
        return batch

    def _step(self, batch: Batch, preface: Batch | None, stop: StopFlag) -> tuple[bool, StepResult]:
        """Run one step; returns whether any rank is to stop, and the result of the step.

        Raises, on all ranks, the error of a failed background save.
        """
        run = self.run
        own = [float(stop.signal is not None), float(self.saver.failed)]
        own += [run.stepper.own_weight(batch), run.stepper.own_scored(batch)]
        stopping, failed, weight, scored = run.ranks.sum(own)
        if failed:
            self.saver.wait()
        run.state, result = run.stepper.step(run.state, batch, weight, preface)
        self.watchdog.beat("step", run.state.step)
        self.saver.note()
        read = run.config.data.lanes * run.config.window
        self.reporter.meter.add(
            read, result.forward_only, 0 if preface is None else read, int(scored)
        )
        return stopping > 0, result

    def _report(self, result: StepResult, last: bool, stopping: bool) -> None:
        with self.reporter.meter.paused():
            self.profiler.write_if_done(last or stopping)
        if result.spike:
            self.reporter.report_spike(self.run.state.step, result.spike)
        if self._is_due(self.run.config.train.log_every, last):
            self.reporter.report(self.run.state, result)

    def _check_skipped(self) -> None:
        """Raise TrainingError after too many skipped steps in a row."""
        state = self.run.state
        if state.skipped_in_a_row >= self.run.config.train.max_skipped:
            watched = self.run.config.train.spikes.deviations
            spike, instead = "", ""
            if watched:
                spike = f", or lay more than {watched:g} standard deviations above those before,"
                instead = " or a larger train.spikes.deviations"
            raise TrainingError(
                f"the loss or a gradient was not finite{spike} in "
                f"{counted(state.skipped_in_a_row, 'step')} in a row, up to step {state.step}; "
                "none of them changed the weights. The last checkpoint is from before; resume "
                f"with a lower optim.lr{instead}, or look at the data of these steps"
            )

    def _save(self, last: bool, stopping: bool) -> None:
        run, finish = self.run, last or stopping
        if not self._is_due(run.config.checkpoint.every, finish):
            return
        with self.reporter.meter.paused():
            self.saver.save(run.state, finish)
        if not finish:
            self.watchdog.beat("step", run.state.step)

    def _finish_save(self, last: bool) -> None:
        """Have the current state in a checkpoint, after `_save` of a step with no signal."""
        if self._is_due(self.run.config.checkpoint.every, last):
            self.saver.wait()
            self.saver.note()
        else:
            self._save(last, stopping=True)

    def _is_due(self, every: int, last: bool) -> bool:
        return last or (every > 0 and self.run.state.step % every == 0)

    def _opened_records(self) -> Records | None:
        """Raises SupersededError, on all ranks, if a newer attempt has begun."""
        run = self.run
        try:
            return agreed(run.ranks, self._open_records, TrainingError)
        except TrainingError:
            refuse_superseded(run.attempt, run.ranks)
            raise

    def _open_records(self) -> Records | None:
        run = self.run
        if run.ranks.rank != 0:
            return None
        return Records(run.attempt, run.ranks.size, run.config, run.data, run.state.step)
