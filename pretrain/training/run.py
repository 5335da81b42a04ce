"""Opens a run on a rank: data, engine and state before the first step of an attempt."""

from __future__ import annotations

import logging
from typing import Any

import torch

from data_prep.dataset import settings
from data_prep.dataset.wording import counted
from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.ranks import GroupRanks
from pretrain.config.root import Config
from pretrain.model import compiling, flops
from pretrain.model.transformer import Transformer
from pretrain.training.data import RunData
from pretrain.training.engine import Engine
from pretrain.training.parallel import Share
from pretrain.training.resume import Resumer
from pretrain.training.step import Stepper

_log = logging.getLogger("pretrain.training.run")


class Run:
    """A run's data, engine and state, from the newest good checkpoint or at step 0.

    `state` is the state after the last step. Every rank must open the run. Raises DataError,
    SettingsError and CheckpointError.
    """

    def __init__(self, config: Config, attempt: Attempt, device: torch.device) -> None:
        self.config = config
        self.attempt = attempt
        self.ranks = GroupRanks()
        self.share = Share.of(config, self.ranks, device)
        self.data = RunData(config)
        compiling.switch(config.train.compile)
        vocabulary = self.data.tokenizer.vocab_size
        parameters = flops.parameters(config.model, vocabulary)
        self.engine = Engine(
            lambda: Transformer(
                config.model,
                vocabulary,
                config.train.activation_checkpointing,
                config.train.z_loss,
            ),
            parameters,
            config,
            device,
        )
        self.stepper = Stepper(self.engine, config, self.share, self.ranks)
        self.resumer = Resumer(config, self.data, self.engine, self.share.lanes, self.ranks)
        self.state = self.resumer.resume_or_start(attempt)
        sequence = config.parallel.sequence
        _log.info(
            "%s parameters, %s on %s, ZeRO stage %d, %s of %d tokens per step%s",
            f"{parameters:,}", counted(self.ranks.size, "rank"), device, config.zero.stage,
            counted(config.data.lanes, "lane"), config.window,
            f", each lane's on {sequence} ranks" if sequence > 1 else "",
        )  # fmt: skip
        for idle in [*filter(None, [config.unlearned_writing]), *self.data.without_effect()]:
            _log.warning("%s", idle)

    @property
    def described(self) -> dict[str, Any]:
        """The part of every checkpoint that steps do not change, as plain JSON."""
        return {
            **self.data.fingerprints(),
            "vocab_size": self.data.tokenizer.vocab_size,
            "configuration": settings.to_plain(self.config),
        }
