"""A trained model, read from a run's checkpoint for evaluation and generation.

One process, no engine: the float32 masters are read whatever number of ranks wrote them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from data_prep.dataset import settings
from data_prep.dataset.settings import SettingsError
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import Tokenizer
from pretrain.checkpoint.load import Checkpoint, deleted, newest_good
from pretrain.checkpoint.manifest import CHECKPOINTS, CheckpointError
from pretrain.checkpoint.ranks import Ranks, SoloRanks, of_first
from pretrain.checkpoint.runs import TrainedError, ends, is_checkpoint, run_directory_of
from pretrain.checkpoint.verify import verify
from pretrain.config.model import ModelConfig
from pretrain.config.root import Config
from pretrain.config.run import Weights
from pretrain.model.transformer import Transformer, on_meta

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
"""What `train.precision` names."""
WEIGHTS: Mapping[Weights, str] = {"last": "param", "ema": "ema"}
"""The tensors of a checkpoint, NAME/KIND, that hold weights: the masters, and their average."""

_log = logging.getLogger("pretrain.trained")


@dataclass(frozen=True)
class Learned:
    """A model in evaluation mode after `step` optimizer steps, with what it is trained with."""

    config: Config
    model: Transformer
    step: int
    tokenizer: Tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embedding.weight.device


@dataclass(frozen=True)
class Trained(Learned):
    """One that was read from a checkpoint.

    `checkpoint_sha256` is that of the checkpoint's manifest, which has those of its files.
    """

    run_directory: Path
    checkpoint_path: Path
    checkpoint_sha256: str
    weights: Weights = "last"

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text: EOS, and those of an imported model (of a chat, say)."""
        own = self.tokenizer.eos_id
        return frozenset([*ends(self.run_directory), *([] if own is None else [own])])


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(path: Path, device: torch.device, weights: Weights = "last") -> Trained:
    """The model of a run directory's newest good checkpoint, or of one checkpoint directory.

    `weights` are those of its last step, or their moving average. The checkpoint is verified before
    it is read; newer ones that are not good are logged. The weights are cast to `train.precision`
    on a GPU and stay float32 on a CPU, and beside the model only one tensor at a time is in memory.
    Raises TrainedError, CheckpointError or TokenizerError.
    """
    run_directory, checkpoint_path = locate(path, SoloRanks())
    with Checkpoint(checkpoint_path) as checkpoint:
        config = configuration_of(checkpoint)
        own = tokenizer_of(run_directory, checkpoint)
        dtype = PRECISIONS[config.train.precision] if device.type == "cuda" else torch.float32
        kind = kind_of(checkpoint, weights)
        model = _model(config.model, own.vocab_size, checkpoint, kind, device, dtype)
    return Trained(
        config, model, checkpoint.step, own, run_directory, checkpoint_path, checkpoint.sha256,
        weights,
    )  # fmt: skip


def kind_of(checkpoint: Checkpoint, weights: Weights) -> str:
    """The kind of the tensors that hold these weights. Raises TrainedError where there are none."""
    kind = WEIGHTS[weights]
    if f"embedding.weight/{kind}" not in checkpoint.names():
        reason = (
            "the run has no optim.ema_decay; leave out --weights ema, or resume the run with one"
        )
        if "imported" in checkpoint.trainer:
            reason = (
                "it is an imported model, with the weights of its source; leave out --weights ema"
            )
        raise TrainedError(f"{checkpoint.path}: has no average of the weights, since {reason}")
    return kind


def tokenizer_of(run_directory: Path, checkpoint: Checkpoint) -> Tokenizer:
    """The run's tokenizer. Raises TokenizerError, or TrainedError where it is another model's."""
    own = tokenizer.load(tokenizer.find(run_directory))
    vocab_size = checkpoint.trainer["vocab_size"]
    if own.vocab_size != vocab_size:
        raise TrainedError(
            f"{own.path}: has {own.vocab_size} pieces, the model of {checkpoint.path} has "
            f"{vocab_size}: it belongs to another run; restore the {own.path.name} of the data set "
            "that the run was trained on"
        )
    return own


def locate(path: Path, ranks: Ranks) -> tuple[Path, Path]:
    """The run directory and its newest good checkpoint, or the one that `path` is, verified.

    The same on every rank. Raises TrainedError or CheckpointError.
    """
    run_directory = run_directory_of(path)
    if is_checkpoint(path):
        checkpoint = path.resolve()
        if (reason := verify(checkpoint, ranks)) is not None:
            if not of_first(ranks, checkpoint.exists):
                raise CheckpointError(deleted(checkpoint))
            raise CheckpointError(f"{checkpoint}: is not a good checkpoint: {reason}")
        return run_directory, checkpoint
    found = newest_good(path / CHECKPOINTS, ranks)
    for name, reason in found.passed_over:
        _log.warning("passed over checkpoint %s: %s", name, reason)
    if found.path is None:
        raise TrainedError(
            f"{path}: the run has no checkpoint yet; let `pretrain train` reach its first one "
            "(every checkpoint.every steps, and at its end)"
        )
    return run_directory, found.path


def configuration_of(checkpoint: Checkpoint) -> Config:
    """What it was trained with. Raises TrainedError."""
    try:
        return settings.from_plain(Config, checkpoint.trainer["configuration"])
    except SettingsError as error:
        raise TrainedError(
            f"{checkpoint.path}: its configuration does not fit this version of pretrain:\n{error}"
        ) from None


def _model(
    config: ModelConfig,
    vocab_size: int,
    checkpoint: Checkpoint,
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Transformer:
    if device.type != "cuda":
        # Weights do not depend on kernels: a run that used flash-attn can be read here.
        memory = replace(config.memory, kernel="auto")
        config = replace(config, local_attention="auto", memory=memory)
    model = on_meta(config, vocab_size)
    loaded = {}
    for name, parameter in model.named_parameters():
        weight = checkpoint.tensor(f"{name}/{kind}")
        if weight.shape != parameter.shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} has shape {list(weight.shape)}, its configuration "
                f"makes {list(parameter.shape)}"
            )
        loaded[parameter] = nn.Parameter(weight.to(device, dtype))
    # Tied embeddings have two names for one parameter.
    named = model.named_parameters(remove_duplicate=False)
    model.load_state_dict({name: loaded[parameter] for name, parameter in named}, assign=True)
    return model.eval().requires_grad_(False)
