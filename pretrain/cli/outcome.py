"""The exit code of a command, and one message about why it failed."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

from data_prep.dataset import command
from data_prep.dataset.settings import SettingsError
from pretrain.cli import once
from pretrain.jobs import launch

EXIT_CODES = """exit codes, also in exit.json of the run directory:
  0   finished
  1   failed (also 128 + the signal that killed a rank); the same command resumes from the last good
      checkpoint
  2   a mistake in the command, the configuration or the data set; or a newer attempt of the same
      run has taken over
  75  a signal (SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGXCPU, SIGUSR1) stopped it after a checkpoint;
      the same command resumes
  78  train.max_attempts_without_progress attempts in a row committed no checkpoint
"""


def code(name: str, action: Callable[[], int]) -> int:
    """The exit code of the action of command `name`; why it failed is printed on stderr."""
    try:
        return action()
    except Exception as error:
        if command.is_closed_pipe(error):
            return command.EXIT_CLOSED_PIPE
        if isinstance(error, SettingsError):
            once.say(command.cannot_run(name, error.problems))
        else:
            command.say(_message(name, error))
        return launch.exit_code(error)


def _message(name: str, error: Exception) -> str:
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    if isinstance(error, OSError):
        return f"{name}: {rank}{command.explained(error)}"
    # Ours are written for the user; any other is a bug and shows its traceback.
    module = type(error).__module__.partition(".")[0]
    if isinstance(error, ValueError) and module in ("data_prep", "pretrain"):
        return f"{name}: {rank}{error}"
    return "".join(traceback.format_exception(error)).rstrip()
