"""Training as one rank of a run: rank 0 numbers the attempt and records how it ends.

Imports torch only after a number is claimed and the watchdog runs, since that import may hang.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

from data_prep.dataset.settings import SettingsError
from pretrain.checkpoint import attempts
from pretrain.checkpoint.attempts import NoProgressError
from pretrain.config.root import Config
from pretrain.jobs import launch
from pretrain.jobs.launch import Place
from pretrain.jobs.start_checks import check_start, directory_problems
from pretrain.jobs.watchdog import Watchdog

# Set by a batch script that counts attempts without progress itself, including attempts that end
# before any rank starts.
_STARTS_COUNTED = "PRETRAIN_STARTS_COUNTED"


def run(config: Config, place: Place) -> int:
    """Train as the rank at `place`; returns the exit code.

    Raises SettingsError, NoProgressError, and what the trainer raises.
    """
    if problems := directory_problems(config):
        raise SettingsError(problems)
    directory = Path(config.run.directory)
    limits = config.watchdog
    watchdog = Watchdog(
        directory, place.rank, {"start": limits.start, "step": limits.step, "save": limits.save}
    )
    if place.rank != 0:
        return _train(config, place, watchdog, 0)
    counted = _STARTS_COUNTED in os.environ
    patience = None if counted else config.train.max_attempts_without_progress
    attempt = attempts.claim(directory, place.size, config.train.steps, patience)
    watchdog.beat("start", attempt=attempt.number)
    with attempts.failures_recorded(attempt, launch.exit_code):
        if attempt.futile:
            raise NoProgressError(attempt.futile)
        code = _train(config, place, watchdog, attempt.number)
    attempt.end(code, "finished" if code == 0 else "stopped by a signal after a checkpoint")
    return code


def _train(config: Config, place: Place, watchdog: Watchdog, attempt: int) -> int:
    check_start(config, place.size)
    # All that this makes stays: to look for garbage among it, again and again as it becomes more,
    # would take a fifth of the time. What is there when DeepSpeed is imported is never looked at.
    gc.disable()
    from pretrain.training import trainer

    gc.enable()
    return trainer.train(config, place, watchdog, attempt)
