"""What commands on a run's configuration, and those on a trained model, have in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_prep.dataset.command import Command, word
from data_prep.dataset.settings import SettingsError
from pretrain import config as configuration
from pretrain.config import Config


@dataclass(frozen=True, kw_only=True)
class Configured(Command):
    """A command that takes a configuration; torch is imported once that was checked."""

    config: Path = word("YAML file with what differs from the defaults")
    overrides: list[str] = word("overrides of the file's values", [], metavar="key=value")

    @cached_property
    def loaded(self) -> Config:
        """The configuration. Raises SettingsError."""
        return configuration.load(self.config, self.overrides)

    def problems(self) -> list[str]:
        """Every mistake in the configuration."""
        try:
            _ = self.loaded
        except SettingsError as error:
            return error.problems
        return []


@dataclass(frozen=True, kw_only=True)
class OnModel(Command):
    """A command that takes a trained model."""

    path: Path = word("run directory, or one checkpoint of it")
