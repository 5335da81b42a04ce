"""`pretrain memories`: the kinds of memory side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from data_prep.dataset import durable, settings
from data_prep.dataset.command import TOKENS, Configured, option, path_kind
from data_prep.dataset.settings import SettingsError
from pretrain.config.memory import MEMORY_KINDS, MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.config.root import Config
from pretrain.jobs import origin

_PREFIX = "model.memory."


class Compared(NamedTuple):
    """A run's configuration, and its model with each kind of memory."""

    config: Config
    kinds: dict[str, ModelConfig]


class Memories(Configured):
    """Compare what the kinds of memory keep and cost.

    For every model.memory.kind at the configuration's shape: the numbers kept by the formula of the
    paper's Table 1, the numbers and bytes of the state, the tokens reached, FLOPs. The command
    line may give settings of all kinds, e.g. model.memory.rmt.vectors=100.
    """

    length: int = option(32 * 1024, "tokens of a document", kind=TOKENS, low=1)
    out: Path | None = option(
        None,
        "directory to write memories.md and memories.json to",
        kind=path_kind(partial(durable.obstacle, directory=True)),
    )

    @cached_property
    def wanted(self) -> Compared:
        """The configurations. Raises SettingsError."""
        own = [word for word in self.overrides if _setting(word) in _all_settings()]
        config = origin.load(self.config, [w for w in self.overrides if w not in own])
        kinds, problems = {}, []
        for kind in MEMORY_KINDS:
            try:
                kinds[kind] = _with_kind(config, kind, own)
            except SettingsError as error:
                problems += [one for one in error.problems if one not in problems]
        if problems:
            raise SettingsError(problems)
        return Compared(config, kinds)

    def run(self) -> int:
        from pretrain.planning import memory_table

        return memory_table.run(*self.wanted, self.length, self.out)


def _all_settings() -> set[str]:
    """The settings and groups of every kind."""
    return {name for traits in MEMORY_KINDS.values() for name in traits.settings}


def _setting(word: str) -> str:
    """The setting or group of model.memory that an override is of; empty for another."""
    key = word.partition("=")[0]
    return key.removeprefix(_PREFIX).partition(".")[0] if key.startswith(_PREFIX) else ""


def _with_kind(config: Config, kind: str, overrides: Sequence[str]) -> ModelConfig:
    """The model with another kind of memory: the file's settings of it, then the overrides."""
    traits = MEMORY_KINDS[kind]
    words = [f"kind={kind}", *_words(config, kind)]
    words += [word.removeprefix(_PREFIX) for word in overrides if _setting(word) in traits.settings]
    try:
        memory = settings.load(MemoryConfig, None, words)
    except SettingsError as error:
        raise SettingsError([f"{_PREFIX}{problem}" for problem in error.problems]) from None
    model = replace(config.model, memory=memory)
    if problems := model.problems():
        raise SettingsError([f"model.{problem}" for problem in problems])
    return model


def _words(config: Config, kind: str) -> Iterator[str]:
    """The file's settings of a kind, as overrides; `full` spans the run's window."""
    traits, file = MEMORY_KINDS[kind], config.model.memory
    plain = settings.to_plain(file)
    for name in traits.settings:
        values = plain[name] if isinstance(plain[name], dict) else {"": plain[name]}
        yield from (f"{name}.{key}".rstrip(".") + f"={value}" for key, value in values.items())
    if traits.whole_window and not file.traits.whole_window:
        yield f"full.segments={config.train.window_segments}"
