"""`pretrain train`."""

from __future__ import annotations

import os
from functools import cached_property

from data_prep.dataset.command import Configured
from pretrain.cli import outcome
from pretrain.config import root as configuration
from pretrain.config.root import Config
from pretrain.jobs import launch, origin
from pretrain.jobs.interpreter import python_module
from pretrain.jobs.start_checks import check_start, moved_problems
from pretrain.training import rank


class OnConfig(Configured):
    """A command on a run's configuration."""

    @cached_property
    def wanted(self) -> Config:
        """The configuration. Raises SettingsError."""
        return origin.load(self.config, self.overrides)


class OnRun(OnConfig):
    """A command on the run that a configuration is of."""

    def problems(self) -> list[str]:
        """Every mistake in the configuration; else whether it names another run than its own."""
        if found := super().problems():
            return found
        return moved_problems(self.config, self.overrides, self.wanted)


class Train(OnRun):
    """Train a model, or resume a run.

    Trains with a configuration; a run directory that has checkpoints is resumed.
    """

    @classmethod
    def epilog(cls) -> str:
        keys = "\n  ".join(["settings and their defaults:", *configuration.describe()])
        return f"{keys}\n\n{outcome.EXIT_CODES}"

    def run(self) -> int:
        place = launch.place_in(os.environ)
        if place is not None:
            launch.leave(outcome.code("pretrain train", lambda: rank.run(self.wanted, place)))
        ranks = self.wanted.launch.ranks or launch.default_ranks(self.wanted)
        check_start(self.wanted, ranks)
        command = [*python_module("pretrain.cli"), "train", str(self.config)]
        return launch.start_ranks([*command, *self.overrides], ranks)
