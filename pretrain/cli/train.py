"""`pretrain train`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from pretrain import config as configuration
from pretrain.cli import outcome
from pretrain.cli.configured import Configured
from pretrain.jobs import launch
from pretrain.jobs.start_checks import check_start
from pretrain.training import rank


@dataclass(frozen=True, kw_only=True)
class Train(Configured):
    """Train a model, or resume a run.

    Trains from a configuration; a run directory that has checkpoints is resumed.
    """

    @classmethod
    def epilog(cls) -> str:
        keys = "\n  ".join(["settings and their defaults:", *configuration.describe()])
        return f"{keys}\n\n{outcome.EXIT_CODES}"

    def run(self) -> int:
        place = launch.place_in(os.environ)
        if place is not None:
            launch.leave(outcome.code("pretrain train", lambda: rank.run(self.loaded, place)))
        ranks = self.loaded.launch.ranks or launch.default_ranks(self.loaded)
        check_start(self.loaded, ranks)
        command = [sys.executable, "-m", "pretrain.cli", "train", str(self.config)]
        return launch.start_ranks([*command, *self.overrides], ranks)
