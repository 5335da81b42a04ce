"""The files that rank 0 writes in addition to checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.dataset import durable, settings
from data_prep.tokenizer import tokenizer
from pretrain.checkpoint.attempts import Attempt
from pretrain.config.root import Config
from pretrain.config.run import CONFIG_FILE
from pretrain.training.data import RunData
from pretrain.training.ledger import Ledger
from pretrain.training.metrics import Recorder


class Records:
    """`metrics.jsonl`, trackers and the ledger, open from `resumed_step` on.

    The constructor also writes the configuration and the tokenizer. Raises TrackingError, and
    SupersededError where a newer attempt writes these files.
    """

    def __init__(
        self, attempt: Attempt, ranks: int, config: Config, data: RunData, resumed_step: int
    ) -> None:
        directory = attempt.directory
        attempt.require_newest()
        durable.write_bytes(directory / CONFIG_FILE, settings.to_yaml(config).encode())
        tokenizer.write(directory, data.tokenizer.file, data.tokenizer_bytes())
        self._ledger = Ledger(attempt, ranks, config, resumed_step)
        self._recorder = Recorder(attempt, config, resumed_step)

    def add(self, kind: str, values: Mapping[str, Any]) -> None:
        """Add a record of `kind` (train, validation, evaluation, checkpoint); `values` has a
        `step`."""
        self._recorder.record(kind, values)

    def commit(self, step: int, histories: Sequence[str]) -> None:
        """Before a commit: make the records so far and the step's line in the ledger durable.

        `histories` has one entry per lane.
        """
        self._recorder.sync()
        self._ledger.add(step, histories)

    def close(self) -> None:
        """Close the files and end the trackers."""
        self._recorder.close()
        self._ledger.close()
