"""Checkpoints of a run: copied to host memory, and committed while training continues."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.background import BackgroundSave, Saved
from pretrain.checkpoint.commit import save
from pretrain.checkpoint.copies import HostCopy
from pretrain.checkpoint.manifest import CHECKPOINTS
from pretrain.checkpoint.pieces import LaneRecord, Piece
from pretrain.checkpoint.ranks import Ranks, agreed
from pretrain.config.run import CheckpointConfig
from pretrain.training.engine import Engine
from pretrain.training.records import Records
from pretrain.training.run_state import RunState, counters, lane_memories, lane_record

_log = logging.getLogger("pretrain.training.saver")


def reserved(engine: Engine, owned: range, run: RunState) -> HostCopy:
    """Host memory for this rank's part of a checkpoint; every state has the size of `run`.

    Raises CheckpointError if there is too little memory.
    """
    memories = [tensor for row in range(len(owned)) for tensor in lane_memories(run, row).values()]
    return HostCopy([*(piece.values for piece in engine.pieces()), *memories])


class Saver:
    """Saves the states of a run on this rank, at most one at a time in the background.

    `owned` are the lanes that this rank stores; `host_copy` is what `reserved` returned for them.
    `ranks` is a separate process group, because a save's collectives run concurrently with those of
    steps. `described` is the part of every checkpoint that steps do not change, plain JSON. `beat`
    is called with the step when training begins to wait for a save, `announce` with the step when
    one begins in the background and with 0 when it ends.
    """

    def __init__(
        self,
        engine: Engine,
        owned: range,
        host_copy: HostCopy,
        attempt: Attempt,
        config: CheckpointConfig,
        described: Mapping[str, Any],
        ranks: Ranks,
        beat: Callable[[int], None],
        announce: Callable[[int], None],
        records: Records | None,
    ) -> None:
        self._engine = engine
        self._owned = owned
        self._host_copy = host_copy
        self._attempt = attempt
        self._config = config
        self._described = dict(described)
        self._ranks = ranks
        self._beat = beat
        self._records = records
        self._save = BackgroundSave(announce)
        self.stall = 0.0
        """Seconds that training waited for the most recent save."""

    @property
    def failed(self) -> bool:
        """Whether a save has failed whose error `wait` has not yet raised."""
        return self._save.failed

    def save(self, run: RunState, finish: bool) -> None:
        """Copy the state and begin to commit it; with `finish`, wait until that is done.

        It first waits for the previous save. Raises CheckpointError, on all ranks, if this or the
        previous save fails.
        """
        began = time.perf_counter()
        self._beat(run.step)
        self.wait()
        self.note()
        lanes = {lane: lane_record(run, row) for row, lane in enumerate(self._owned)}
        pieces, lanes = self._host_copy.take(self._engine.pieces(), lanes)
        trainer = {
            **counters(run),
            "optimizer_steps": self._engine.optimizer_steps,
            **self._described,
        }
        self._save.begin(run.step, partial(self._commit, run.step, pieces, lanes, trainer))
        if finish:
            self.wait()
        self.stall = time.perf_counter() - began
        if finish:
            self.note()

    def wait(self) -> None:
        """Wait until no save is in flight; raises the error of one that failed."""
        self._save.wait()

    def note(self) -> Saved | None:
        """Record and return the save that has ended since the last call, if any."""
        saved = self._save.ended()
        if saved is None:
            return None
        if self._records is not None:
            times = {"seconds": saved.seconds, "stall": self.stall}
            self._records.add("checkpoint", {"step": saved.step, **times})
        _log.info(
            "checkpoint %s in %.1f s, training stalled for %.2f s",
            saved.path, saved.seconds, self.stall,
        )  # fmt: skip
        return saved

    def end(self, step: int, patience: float) -> None:
        """Give a save in flight up to `patience` seconds, as training ends or fails after `step`.

        An error of the save is only logged, since it is not why the run ends.
        """
        try:
            self._beat(step)
            self._save.wait(patience)
        except Exception as error:
            _log.warning("the checkpoint in flight failed: %s", error)

    def _commit(
        self,
        step: int,
        pieces: Sequence[Piece],
        lanes: Mapping[int, LaneRecord],
        trainer: Mapping[str, Any],
    ) -> Path:
        """Commit the copied checkpoint, in a background thread; returns its directory.

        The records up to the step and its line in the ledger are made durable first.
        """
        # Each rank has a block of consecutive lanes, so these are in the order of the lanes.
        own = [record.place["history"] for record in lanes.values()]
        histories = [one for rank in self._ranks.gather(own) for one in rank]

        def account() -> None:
            if self._records is not None:
                self._records.commit(step, histories)

        agreed(self._ranks, account)
        return save(
            self._attempt.directory / CHECKPOINTS,
            step,
            pieces,
            lanes,
            trainer,
            self._ranks,
            self._config.keep_last,
            self._config.keep_every,
            self._attempt,
        )
