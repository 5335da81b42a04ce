"""A trained run without training: random weights in the layout that the trainer leaves.

Without a GPU Triton interprets its kernels; it must know when it is first imported, by whom ever.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import nn

from data_prep.dataset import settings
from data_prep.tokenizer import training
from data_prep.tokenizer.tokenizer import load as load_tokenizer
from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.commit import save
from pretrain.checkpoint.pieces import Piece
from pretrain.checkpoint.ranks import SoloRanks
from pretrain.config.data import DataConfig
from pretrain.config.memory import MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.config.root import Config
from pretrain.config.run import RunConfig
from pretrain.config.training import TrainConfig
from pretrain.model.transformer import Transformer

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be "
    "on his first entering a neighbourhood, naïve — or “not”.\n"
) * 3


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 320 pieces, bytes among them, with BOS and EOS."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    training.train([TEXT], path, 320)
    return path


class WriteRun(Protocol):
    """The signature of `write_run`."""

    def __call__(
        self,
        directory: Path,
        *,
        steps: tuple[int, ...] = (7,),
        averaged: bool = False,
        tokenizer: Path | None = None,
        **model: Any,
    ) -> Transformer: ...


@pytest.fixture(scope="session")
def write_run(tokenizer_model: Path) -> WriteRun:
    """Write a run with a checkpoint of each of `steps`; the model that the last one holds.

    With `averaged`, they have an average of the weights too: half of each. `model` are settings of
    the model that differ from a small one with segments of 16 tokens and a window of 4 segments;
    `tokenizer` is a file of either kind, by its suffix.
    """

    def write(
        directory: Path,
        *,
        steps: tuple[int, ...] = (7,),
        averaged: bool = False,
        tokenizer: Path | None = None,
        **model: Any,
    ) -> Transformer:
        directory.mkdir(parents=True, exist_ok=True)
        own = tokenizer or tokenizer_model
        shutil.copyfile(own, directory / f"tokenizer{own.suffix}")
        pieces = load_tokenizer(own).vocab_size
        config = Config(
            run=RunConfig(directory=str(directory)),
            data=DataConfig(train="elsewhere"),
            model=replace(SMALL, **model),
            train=TrainConfig(window_segments=4),
        )
        built = None
        for step in steps:
            torch.manual_seed(step)
            built = _random_model(config.model, pieces)
            _save(directory, step, config, built, averaged)
        assert built is not None
        return built

    return write


SMALL = ModelConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_head=8,
    d_ff=48,
    segment=16,
    init_std=0.15,
    memory=MemoryConfig(kind="delta"),
)


def _random_model(config: ModelConfig, pieces: int) -> Transformer:
    model = Transformer(config, pieces).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            nn.init.normal_(parameter)
    return model


def _save(directory: Path, step: int, config: Config, model: Transformer, averaged: bool) -> None:
    pieces = [
        Piece(f"{name}/{kind}", tuple(parameter.shape), 0, values.detach().reshape(-1))
        for name, parameter in model.named_parameters()
        for kind, values in (
            ("param", parameter),
            ("exp_avg", torch.zeros_like(parameter)),
            ("exp_avg_sq", torch.ones_like(parameter)),
            ("ema", parameter / 2),
        )
        if averaged or kind != "ema"
    ]
    trainer = {
        "step": step,
        "vocab_size": model.embedding.num_embeddings,
        "configuration": settings.to_plain(config),
    }
    root, attempt = directory / "checkpoints", Attempt(directory, 1)
    save(root, step, pieces, {}, trainer, SoloRanks(), 2, 0, attempt)
