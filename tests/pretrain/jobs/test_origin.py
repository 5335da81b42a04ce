"""Runs that begin with another run's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.dataset import settings
from data_prep.tokenizer import training
from pretrain.checkpoint.attempts import claim
from pretrain.checkpoint.load import Checkpoint
from pretrain.checkpoint.manifest import read_manifest
from pretrain.config.memory import MemoryConfig
from pretrain.config.model import ModelConfig, RopeScalingConfig
from pretrain.config.root import Config, load
from pretrain.jobs import origin
from pretrain.trained import configuration_of
from tests import ranks
from tests.pretrain.conftest import TEXT

SHAPE = ("d_model=32", "n_layers=2", "n_heads=4", "n_kv_heads=2", "d_head=8", "d_ff=48")


@pytest.fixture
def data(tmp_path: Path, write_data_set: Any, tokenizer_model: Path) -> Path:
    documents = np.random.default_rng(0).integers(3, 320, size=(8, 90))
    write_data_set(tmp_path / "data", list(documents), 4, 320, tokenizer=tokenizer_model)
    return tmp_path / "data"


def words(tmp_path: Path, *more: str) -> list[str]:
    """Settings of a run on two ranks that takes steps without moving a weight."""
    return [
        *(f"model.{word}" for word in SHAPE), "model.segment=8", "model.memory.kind=linear",
        f"data.train={tmp_path / 'data'}", f"run.directory={tmp_path / 'new'}",
        f"train.start_from={tmp_path / 'old'}", "data.lanes=4", "train.steps=2",
        "train.window_segments=2", "train.log_every=1", "optim.lr=0", "optim.gate_lr=0",
        "optim.warmup_steps=0", "checkpoint.every=1", "launch.device=cpu", "launch.ranks=2",
        "wandb.mode=disabled", *more,
    ]  # fmt: skip


def problems(tmp_path: Path, *more: str) -> list[str]:
    config: Config = load(None, words(tmp_path, *more))
    return origin.problems(config)


def test_two_zero3_ranks_begin_with_the_weights_and_nothing_else_of_another_run(
    tmp_path: Path, write_run: Any, data: Path
) -> None:
    # The source has delta memory and other segments: its weights mean the same under linear.
    old = dict(write_run(tmp_path / "old").named_parameters())
    digest = read_manifest(tmp_path / "old/checkpoints/step-00000007")[1]
    (tmp_path / "empty.yaml").write_text("{}\n")
    ranks.train(2, tmp_path / "empty.yaml", *words(tmp_path))
    with Checkpoint(tmp_path / "new/checkpoints/step-00000002") as new:
        for name, weight in old.items():
            assert torch.equal(new.tensor(f"{name}/param"), weight.detach()), name
            # Moments of two steps, not the ones that write_run leaves.
            assert not torch.equal(new.tensor(f"{name}/exp_avg_sq"), torch.ones_like(weight))
        assert new.trainer["optimizer_steps"] == new.step == 2
        path = str((tmp_path / "old/checkpoints/step-00000007").resolve())
        assert new.trainer["origin"] == {"path": path, "step": 7, "sha256": digest}


def test_another_shape_and_another_tokenizer_are_refused_together(
    tmp_path: Path, write_run: Any, data: Path
) -> None:
    write_run(tmp_path / "old")
    training.train([TEXT + "Other words."], tmp_path / "old/tokenizer.model", 300)
    found = problems(tmp_path, "model.d_ff=64", "model.n_layers=3")
    assert [text.partition(";")[0] for text in found] == [
        "train.start_from: model.n_layers is 2 in the source and 3 here",
        "train.start_from: model.d_ff is 48 in the source and 64 here",
        "train.start_from: its tokenizer differs from that of data.train",
    ]


@pytest.mark.parametrize(
    ("kind", "size", "other"),
    [("rmt", "vectors", 4), ("autocompressor", "vectors", 4), ("compressive", "rate", 4)],
)
def test_another_size_of_the_memorys_weights_is_refused_and_another_kind_is_not(
    kind: str, size: str, other: int
) -> None:
    def model(*words: str) -> ModelConfig:
        return settings.load(ModelConfig, None, ["segment=8", *words])

    theirs = model(f"memory.kind={kind}", f"memory.{kind}.{size}=2")
    ours = model(f"memory.kind={kind}", f"memory.{kind}.{size}={other}")
    assert origin._other_shape(theirs, ours) == [
        f"model.memory.{kind}.{size} is 2 in the source and {other} here; set it to 2"
    ]
    assert origin._other_shape(theirs, theirs) == []
    assert origin._other_shape(theirs, model("memory.kind=linear")) == []


@pytest.mark.parametrize("path", ["", "checkpoints/step-00000007"])
def test_a_run_or_one_of_its_checkpoints_may_be_named(
    tmp_path: Path, write_run: Any, data: Path, path: str
) -> None:
    write_run(tmp_path / "old")
    assert problems(tmp_path, f"train.start_from={tmp_path / 'old' / path}") == []


def test_a_directory_without_a_checkpoint_is_reported(tmp_path: Path, data: Path) -> None:
    (text,) = problems(tmp_path)
    where = f"train.start_from: {tmp_path / 'old'}"
    assert text.startswith(f"{where}: there is no such directory; expected a run directory, or a")
    claim(tmp_path / "old", ranks=1, steps=1, most_without_progress=None)
    assert problems(tmp_path) == [
        f"{where}: the run has no checkpoint yet; let it reach its first one"
    ]


def inherited(tmp_path: Path, *more: str) -> ModelConfig:
    given = [word for word in words(tmp_path, *more) if word.partition("=")[0][6:] not in KEYS]
    return origin.load(None, [*given, *more]).model


KEYS = {word.partition("=")[0] for word in SHAPE}


def test_the_shape_that_is_not_given_is_the_sources(tmp_path: Path, write_run: Any) -> None:
    scaling = RopeScalingConfig(kind="linear", factor=3.0)
    source = {"qk_norm": True, "norm_eps": 9.999999747378752e-06, "rope_scaling": scaling}
    write_run(tmp_path / "old", **source, memory=MemoryConfig(kind="none"))
    found = inherited(tmp_path)
    assert origin.unknown_shape(origin.load(None, words(tmp_path))) == []
    old = trained_model(tmp_path / "old")
    assert replace(old, memory=found.memory, segment=8) == found
    assert (found.memory.kind, found.qk_norm, found.rope_scaling) == ("linear", True, scaling)
    # Of what is given nothing is taken from the source, and a contradiction is still refused.
    found = inherited(tmp_path, "model.d_ff=64", "model.rope_scaling.factor=5")
    assert (found.d_ff, found.n_layers, found.rope_scaling.factor) == (64, 2, 5.0)
    assert (found.rope_scaling.kind, found.segment) == ("linear", 8)
    given = words(tmp_path, "model.d_ff=64")
    (text,) = origin.problems(origin.load(None, [word for word in given if "norm" not in word]))
    assert "model.d_ff is 48 in the source and 64 here" in text


def test_a_run_that_has_begun_keeps_its_shape_without_the_source(
    tmp_path: Path, write_run: Any
) -> None:
    write_run(tmp_path / "new", d_ff=80, steps=(3, 7))
    assert inherited(tmp_path).d_ff == 80


def test_without_a_source_that_can_be_read_nothing_is_inherited(tmp_path: Path) -> None:
    assert inherited(tmp_path).d_ff == ModelConfig().d_ff
    given = [word for word in words(tmp_path) if word.partition("=")[0][6:] not in KEYS]
    # Nothing can be counted of it, unless the shape is given.
    assert origin.unknown_shape(origin.load(None, words(tmp_path))) == []
    (text,) = origin.unknown_shape(origin.load(None, given))
    assert text.startswith(f"train.start_from: {tmp_path / 'old'}: there is no such directory")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("checkpoints/step-00000007/manifest.json", "checkpoints/step-00000007: manifest.json"),
        ("tokenizer.model", "tokenizer.model: the tokenizer"),
    ],
)
def test_a_source_whose_disk_fails_is_reported(
    tmp_path: Path, write_run: Any, data: Path, file: str, said: str
) -> None:
    write_run(tmp_path / "old")
    broken = tmp_path / "old" / file
    broken.unlink()
    broken.symlink_to("/proc/self/mem")  # a file that is there, and cannot be read
    (text,) = problems(tmp_path)
    assert text == f"train.start_from: {tmp_path}/old/{said} cannot be read (Input/output error)"
    shape = 48 if file == "tokenizer.model" else ModelConfig().d_ff
    assert inherited(tmp_path).d_ff == shape


def trained_model(run: Path) -> ModelConfig:
    with Checkpoint(run / "checkpoints/step-00000007") as checkpoint:
        return configuration_of(checkpoint).model


def test_a_run_with_a_checkpoint_asks_for_no_source(tmp_path: Path, write_run: Any) -> None:
    write_run(tmp_path / "new")
    assert problems(tmp_path) == []
