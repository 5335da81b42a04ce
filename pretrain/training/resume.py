"""Where a run begins: its newest good checkpoint, the weights of another run, or new weights.

A checkpoint's state is only meaningful with some of its settings and with its data sets: changes of
these are refused, and all other changes are logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.dataset import durable
from data_prep.dataset.settings import SettingsError
from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.commit import count_again, take_over
from pretrain.checkpoint.load import Checkpoint, Found, newest_good
from pretrain.checkpoint.manifest import CHECKPOINTS, PASSED_OVER, CheckpointError
from pretrain.checkpoint.ranks import Ranks, of_first
from pretrain.checkpoint.runs import files_beside, write_beside
from pretrain.config.root import Config
from pretrain.jobs import resumable
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
        of_first(self.ranks, partial(take_over, root, attempt))
        found = newest_good(root, self.ranks)
        for name, reason in found.passed_over:
            _log.warning("passed over checkpoint %s: %s", name, reason)
        of_first(self.ranks, partial(_mark, found, root, attempt))
        return self.start(attempt.directory) if found.path is None else self.resume(found.path)

    def start(self, directory: Path) -> RunState:
        """Step 0, with new weights or the weights of `train.start_from`.

        Files beside these, such as a chat template, are copied into the run's `directory`.
        """
        origin = None
        if self.config.train.start_from:
            source, path = locate(Path(self.config.train.start_from), self.ranks)
            with Checkpoint(path) as checkpoint:
                theirs = configuration_of(checkpoint).model.memory.traits
                same_memory = theirs == self.config.model.memory.traits
                self.engine.take_weights(checkpoint, same_memory, self.data.tokenizer.eos_id)
                step, digest = checkpoint.step, checkpoint.sha256
                changes = resumable.changes(checkpoint.trainer, self.config)
            origin = {"path": str(path.resolve()), "step": step, "sha256": digest}
            of_first(self.ranks, lambda: write_beside(directory, files_beside(source)))
            _log.info("weights of %s, step %d, sha256 of its manifest %s", path, step, digest)
            for text in (text for key, text in changes.items() if key.startswith("model.")):
                _log.info("other than there: %s", text)
        empty = self.engine.empty_memory(len(self.lanes))
        with_preface = self.data.prefaces is not None
        return run_state.at_start(len(self.lanes), empty, with_preface, origin)

    def resume(self, path: Path) -> RunState:
        """The state of a good checkpoint. Raises as `resume_or_start` does."""
        with Checkpoint(path) as checkpoint:
            trainer = checkpoint.trainer
            if reason := resumable.imported(trainer, path.parent.parent):
                raise CheckpointError(reason)
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


def _mark(found: Found, root: Path, attempt: Attempt) -> None:
    """Say in each checkpoint that was passed over why, so that it does not count as progress.

    One that is good after all, whose disk was away for a while, counts again. A superseded attempt
    writes nothing; its first save says so.
    """
    if attempt.superseded():
        return
    for name, reason in found.passed_over:
        with suppress(OSError):  # the damage may be that nothing can be written there
            durable.write_bytes(root / name / PASSED_OVER, f"{reason}\n".encode())
    if found.path is not None:
        count_again(found.path)


def check_resumable(trainer: Mapping[str, Any], config: Config, data: RunData) -> None:
    """Log which settings have changed since the checkpoint that holds `trainer`.

    Raises SettingsError with all changes that its state does not allow.
    """
    if refused := resumable.refused(trainer, config, data.fingerprints()):
        raise SettingsError(refused)
    for text in resumable.changes(trainer, config).values():
        _log.info("changed since the checkpoint: %s", text)
