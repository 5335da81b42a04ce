"""A run that begins with another one's weights: its shape, and whether it can, checked before a
rank starts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

from data_prep.dataset import settings
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import DataError
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import TokenizerError
from pretrain.checkpoint import manifest
from pretrain.checkpoint.manifest import (
    CHECKPOINTS,
    CheckpointError,
    Manifest,
    step_name,
    steps_in,
)
from pretrain.checkpoint.runs import TrainedError, is_checkpoint, run_directory_of
from pretrain.config.model import ModelConfig
from pretrain.config.root import Config
from pretrain.data.files import manifest_of

# Settings that may differ from the source's: its weights keep their meaning. A memory's parameter
# that the source lacks has its initial value; one that the new model lacks is dropped.
_FREE = {"segment", "memory", "local_attention", "init_std"}
# Settings that are not the source's where they are not given: init_std is, for what is new.
_NOT_INHERITED = _FREE - {"init_std"}


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with `key=value` overrides. Raises SettingsError.

    With `train.start_from` the model's shape, where it is not given, is that of the source.
    """
    return settings.load(Config, path, overrides, _shape)


def _shape(config: Config) -> Mapping[str, Any]:
    """The model's shape as a run has it that begins with other weights: by its own checkpoint, or
    else by its source. {} for other runs, and where it cannot be read, which `problems` reports."""
    if not config.train.start_from:
        return {}
    own = Path(config.run.directory) / CHECKPOINTS
    begun = [own / step_name(step) for step in steps_in(own)]
    for path in [*begun, Path(config.train.start_from)]:
        with suppress(CheckpointError, TrainedError, SettingsError):
            _, found = _newest(path)
            model = settings.from_plain(ModelConfig, found.trainer["configuration"]["model"])
            return {"model": _inheritable(model)}
    return {}


def unknown_shape(config: Config) -> list[str]:
    """Why the model's shape is not known, where nothing gives it; what only computes needs that."""
    if _inheritable(config.model) != _inheritable(ModelConfig()):
        return []
    return problems(config)


def _inheritable(model: ModelConfig) -> dict[str, Any]:
    """The settings that a run takes from its source."""
    return {k: v for k, v in settings.to_plain(model).items() if k not in _NOT_INHERITED}


def problems(config: Config) -> list[str]:
    """Why a run cannot begin with `train.start_from`; empty where it can, or need not.

    A run with a checkpoint of its own resumes from that, whatever has become of the source.
    """
    if not config.train.start_from or steps_in(Path(config.run.directory) / CHECKPOINTS):
        return []
    try:
        run_directory, found = _newest(Path(config.train.start_from))
        model = settings.from_plain(ModelConfig, found.trainer["configuration"]["model"])
        reasons = _other_shape(model, config.model) + _other_tokenizer(run_directory, config)
    except SettingsError as error:
        reasons = [f"its configuration is of another version of pretrain:\n{error}"]
    except (CheckpointError, TokenizerError, TrainedError) as error:
        reasons = [str(error)]
    return [f"train.start_from: {reason}" for reason in reasons]


def _newest(path: Path) -> tuple[Path, Manifest]:
    """The run directory, and the manifest of the checkpoint at `path` or of the newest one."""
    run_directory = run_directory_of(path)
    if is_checkpoint(path):
        return run_directory, _manifest(path.resolve())
    steps = steps_in(path / CHECKPOINTS)
    if not steps:
        raise TrainedError(f"{path}: the run has no checkpoint yet; let it reach its first one")
    return path, _manifest(path / CHECKPOINTS / step_name(steps[0]))


def _manifest(path: Path) -> Manifest:
    try:
        return manifest.read_manifest(path)[0]
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _other_shape(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    keys = [field for field in settings.to_plain(ours) if field not in _FREE]
    if theirs.memory.traits == ours.memory.traits:
        keys += [f"memory.{key}" for key in ours.memory.traits.sizes]
    pairs = [(key, *map(attrgetter(key), (theirs, ours))) for key in keys]
    return [
        f"model.{key} is {there!r} in the source and {here!r} here; set it to {there!r}"
        for key, there, here in pairs
        if there != here
    ]


def _other_tokenizer(run_directory: Path, config: Config) -> list[str]:
    """Why the data's tokens do not mean what the weights learned, if the data set exists yet."""
    own = tokenizer.find(run_directory)
    key, source = next(iter(config.data.sources.items()))
    try:
        used = manifest_of(source.data).tokenizer
    except DataError:
        return []
    if hashlib.sha256(tokenizer.read(own)).hexdigest() == used.sha256:
        return []
    return [f"its tokenizer differs from that of {key}; prepare the data with tokenizer.path={own}"]
