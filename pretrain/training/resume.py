"""Where a run begins: its newest good checkpoint, the weights of another run, or new weights.

A checkpoint's state is only meaningful with some of its settings and with its data sets: changes of
these are refused, and all other changes are logged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.dataset import settings
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.wording import counted
from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.commit import take_over
from pretrain.checkpoint.load import Checkpoint, newest_good
from pretrain.checkpoint.manifest import CHECKPOINTS, CheckpointError
from pretrain.checkpoint.ranks import Ranks, agreed
from pretrain.config import Config
from pretrain.trained import configuration_of, locate
from pretrain.training import run_state
from pretrain.training.data import RunData
from pretrain.training.engine import Engine
from pretrain.training.run_state import RunState

_log = logging.getLogger("pretrain.training.resume")


@dataclass(frozen=True)
class Resumer:
    """Loads the weights of `engine` and the run's state on this rank."""

    config: Config
    data: RunData
    engine: Engine
    lanes: range
    ranks: Ranks

    def resume_or_start(self, attempt: Attempt) -> RunState:
        """The state of the newest good checkpoint of the attempt's run, or of step 0 without any.

        All ranks choose the same one. Raises CheckpointError if there are checkpoints but none is
        good, or if this one cannot be resumed, and SettingsError if fixed settings have changed.
        """
        root = attempt.directory / CHECKPOINTS
        agreed(self.ranks, lambda: take_over(root, attempt) if self.ranks.rank == 0 else None)
        found = newest_good(root, self.ranks)
        for name, reason in found.passed_over:
            _log.warning("passed over checkpoint %s: %s", name, reason)
        return self.start() if found.path is None else self.resume(found.path)

    def start(self) -> RunState:
        """Step 0, with new weights or the weights of `train.start_from`."""
        origin = None
        if self.config.train.start_from:
            _, path = locate(Path(self.config.train.start_from), self.ranks)
            with Checkpoint(path) as checkpoint:
                theirs = configuration_of(checkpoint).model.memory.traits
                same_memory = theirs == self.config.model.memory.traits
                self.engine.take_weights(checkpoint, same_memory, self.data.tokenizer.eos_id)
                step, digest = checkpoint.step, checkpoint.sha256
            origin = {"path": str(path.resolve()), "step": step, "sha256": digest}
            _log.info("weights of %s, step %d, sha256 of its manifest %s", path, step, digest)
        empty = self.engine.empty_memory(len(self.lanes))
        with_preface = self.data.prefaces is not None
        return run_state.at_start(len(self.lanes), empty, with_preface, origin)

    def resume(self, path: Path) -> RunState:
        """The state of a good checkpoint. Raises as `resume_or_start` does."""
        with Checkpoint(path) as checkpoint:
            trainer = checkpoint.trainer
            if "optimizer_steps" not in trainer:
                directory = path.parent.parent
                raise CheckpointError(
                    f"run.directory: {directory} is an imported model and cannot be resumed; set "
                    f"train.start_from={directory} and a new run.directory"
                )
            check_resumable(trainer, self.config, self.data)
            self.engine.restore(checkpoint, trainer["optimizer_steps"])
            records = [checkpoint.lane(lane) for lane in self.lanes]
        empty = self.engine.empty_memory(len(records))
        try:
            with_preface = self.data.prefaces is not None
            run = run_state.restored(trainer, records, empty, with_preface)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        _log.info("resumed from %s, step %d", path, run.step)
        return run


def check_resumable(trainer: Mapping[str, Any], config: Config, data: RunData) -> None:
    """Log which settings have changed since the checkpoint that holds `trainer`.

    Raises SettingsError with all changes that its state does not allow.
    """
    # A version that had no other optimizer did not say which.
    before = {"optim.name": "adamw", **dict(_leaves(trainer["configuration"]))}
    now = dict(_leaves(settings.to_plain(config)))
    changes = {
        key: f"{key}: {before[key]!r} -> {value!r}"
        for key, value in now.items()
        if key in before and before[key] != value
    }
    refused = [text for key, text in changes.items() if _is_fixed(key)]
    refused += _changed_data(trainer, data, list(config.data.sources))
    if refused:
        raise SettingsError(
            [
                f"{text}: the run's checkpoint needs the former; set it back, or start a new run "
                "in another run.directory"
                for text in refused
            ]
        )
    for text in changes.values():
        _log.info("changed since the checkpoint: %s", text)


def _changed_data(trainer: Mapping[str, Any], data: RunData, keys: list[str]) -> list[str]:
    """Which data sets differ from the checkpoint's; `keys` are the sources' settings.

    Their weights may change: new ones apply from the next document of each lane.
    """
    fingerprints = data.fingerprints()
    before, now = trainer.get("sources"), fingerprints["sources"]
    assert now is not None
    if before is None:
        found = ["data: the lanes' places were written by a version without data.mix; resume the "
                 "run with that version"]  # fmt: skip
    elif len(now) != len(before):
        found = [f"data.mix: {counted(len(before), 'data set')} -> {len(now)}"]
    else:
        found = [
            f"{key}: the data set's shards differ from the checkpoint's"
            for key, ours, theirs in zip(keys, now, before, strict=True)
            if ours != theirs
        ]
    if trainer.get("preface") != fingerprints["preface"]:
        found.append("data.preface: its shards differ from the checkpoint's, or it had none")
    return found


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted key."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _leaves(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            for index, each in enumerate(item):
                yield from _leaves(each, f"{prefix}{key}[{index}].")
        else:
            yield f"{prefix}{key}", item


def _is_fixed(key: str) -> bool:
    """Whether a checkpoint cannot be resumed with another value of this setting."""
    kernels = ("model.local_attention", "model.memory.kernel")
    model = key.startswith("model.") and key not in kernels
    return model or key in ("data.lanes", "run.seed", "train.start_from", "optim.name")
