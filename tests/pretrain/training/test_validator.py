"""The validation loss against plain torch; a real engine in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.data.lanes import Dataset, Lane, Mix
from pretrain.data.packing import IGNORE
from pretrain.jobs.launch import EXIT_STOPPED
from pretrain.model.transformer import Transformer
from pretrain.training.metrics import read_records
from pretrain.training.run import Run
from pretrain.training.run_state import TrainingError
from pretrain.training.validator import Validation, Validator
from tests.pretrain.training.stopped import Stopping, attempted

WINDOWS = 3
SET = f"train.validation_windows={WINDOWS}"


def validated(run: Run, beat: Callable[[], None] = lambda: None) -> Validation:
    found = Validator(run).validate(beat, lambda: False)
    assert found is not None
    return found


def plain_loss(
    run: Run, data: Path, prompt_weight: float, weights_of: str = "param"
) -> tuple[float, float]:
    """The weighted mean over the lanes' first windows, one model with their memory carried."""
    model = Transformer(run.config.model, 48)
    for piece in run.engine.pieces():
        name, _, kind = piece.name.partition("/")
        if kind == weights_of:
            weights = dict(model.named_parameters())[name]
            weights.data.copy_(piece.values.view(piece.shape))
    total = weight = 0.0
    for index in range(4):
        lane = Lane(Mix([Dataset(data)], (1.0,), prompt_weight), index, 4, seed=0)
        memory = model.initial_state(1, "cpu")
        for _ in range(WINDOWS):
            tokens, targets, starts, weights_ = lane.window(32)
            counted = np.where(targets == IGNORE, 0.0, 1.0 if weights_ is None else weights_)
            with torch.no_grad():
                output = model(torch.tensor(tokens)[None], torch.tensor(starts)[None], memory)
            memory = output.state
            losses = F.cross_entropy(output.logits[0], torch.tensor(targets), reduction="none")
            total += float((losses.double() * torch.tensor(counted)).sum())
            weight += float(counted.sum())
    return total / weight, weight


@pytest.mark.parametrize("words", [(), ("train.micro_batch=1",)])
@pytest.mark.parametrize("name", ["validation", "pairs"])
def test_the_loss_is_the_weighted_mean_over_the_first_windows_with_memory_carried(
    open_run: Any, take_steps: Any, data_sets: dict[str, Path], words: tuple[str, ...], name: str
) -> None:
    # Whatever the seed of the run, the text is the same.
    words = ("data.prompt_weight=0.5", "run.seed=7", SET, *words)
    run = open_run(f"data.validation={data_sets[name]}", *words)
    take_steps(run, 1)
    beats: list[None] = []
    found = validated(run, lambda: beats.append(None))
    loss, weight = plain_loss(run, data_sets[name], 0.5)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.weight == pytest.approx(weight, rel=1e-9)
    assert len(beats) == WINDOWS and found.seconds > 0


def test_every_validation_starts_over_and_leaves_the_run_unchanged(
    open_run: Any,
    take_steps: Any,
    data_sets: dict[str, Path],
    engine_state: Callable[[Run], dict[str, torch.Tensor]],
) -> None:
    data = f"data.validation={data_sets['validation']}"
    run = open_run(data, SET)
    take_steps(run, 1)
    before, state = engine_state(run), run.state
    memory = [tensor.clone() for layer in state.memory for tensor in layer]
    first, second = (validated(run) for _ in range(2))
    assert (first.loss, first.weight) == (second.loss, second.weight)
    assert (
        validated(open_run(data, "train.validation_windows=1", name="short")).weight < first.weight
    )
    assert run.state is state and run.engine.module.training
    assert all(torch.equal(values, before[name]) for name, values in engine_state(run).items())
    found = [tensor for layer in state.memory for tensor in layer]
    assert all(map(torch.equal, found, memory))


def test_the_loss_of_a_validation_has_no_z_loss(open_run: Any, data_sets: dict[str, Path]) -> None:
    data = f"data.validation={data_sets['validation']}"
    losses = [
        validated(open_run(data, SET, f"train.z_loss={z_loss}")).loss for z_loss in (0.0, 1.0)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("stage", range(4))
def test_an_average_is_validated_as_a_model_with_its_weights(
    open_run: Any,
    take_steps: Any,
    data_sets: dict[str, Path],
    engine_state: Callable[[Run], dict[str, torch.Tensor]],
    stage: int,
) -> None:
    words = (f"data.validation={data_sets['validation']}", SET, f"zero.stage={stage}")
    run = open_run(*words, "optim.ema_decay=0.9")
    take_steps(run, 4)
    before = engine_state(run)
    with run.engine.averaged():
        found = validated(run)
    loss, weight = plain_loss(run, data_sets["validation"], 0.0, "ema")
    last, _ = plain_loss(run, data_sets["validation"], 0.0)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.weight == weight and abs(loss - last) > 1e-4
    after = engine_state(run)
    assert all(torch.equal(values, before[name]) for name, values in after.items())
    assert validated(run).loss == pytest.approx(last, rel=1e-6)


def test_a_damaged_shard_ends_the_validation_with_its_name(
    open_run: Any, data_sets: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(data_sets["validation"], tmp_path / "damaged")
    shard = sorted((tmp_path / "damaged").glob("*.tar"))[3]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    run = open_run(f"data.validation={tmp_path / 'damaged'}", "train.validation_windows=200")
    with pytest.raises(TrainingError, match="sha256 differs") as caught:
        validated(run)
    assert str(shard) in str(caught.value)
    assert run.engine.module.training


def test_a_signal_ends_a_validation_at_its_next_window(
    open_run: Any, data_sets: dict[str, Path]
) -> None:
    run = open_run(f"data.validation={data_sets['validation']}", "train.validation_windows=200")
    beats: list[None] = []
    assert Validator(run).validate(lambda: beats.append(None), lambda: len(beats) == 2) is None
    assert len(beats) == 2 and run.engine.module.training


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("every", [2, 3])
def test_a_validation_that_a_signal_ends_is_made_by_the_resumed_run(
    open_run: Any,
    take_steps: Any,
    engine_state: Callable[[Run], dict[str, torch.Tensor]],
    data_sets: dict[str, Path],
    every: int,
    stage: int,
) -> None:
    words = (
        f"data.validation={data_sets['validation']}", SET, "train.validate_every=2",
        "train.validate_ema=true", "optim.ema_decay=0.9", "optim.warmup_steps=1", "train.steps=4",
        "train.log_every=1", f"checkpoint.every={every}", f"zero.stage={stage}",
    )  # fmt: skip

    def attempt(number: int, rank: Stopping) -> tuple[int, Run]:
        run = open_run(*words, name="stopped", attempt=number)
        return attempted(run, rank), run

    # At step 2 its own beat comes first, and one of a save that is written meanwhile; then those
    # of the weights' windows, and of their average's, which is what the forward reads.
    assert attempt(1, Stopping(2, 1 + (every == 2) + WINDOWS + 1))[0] == EXIT_STOPPED
    assert attempt(2, Stopping(4, 2))[0] == EXIT_STOPPED
    code, run = attempt(3, Stopping())
    records = read_records(run.attempt.directory / "metrics.jsonl")
    assert (code, [r["step"] for r in records if r["kind"] == "validation"]) == (0, [2, 4])
    assert not Validator(run).missed(4) and not Validator(run).missed(3)
    plain = open_run(*words, name="plain")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses == [result.loss for result in take_steps(plain, 4)]
    expected, found = engine_state(plain), engine_state(run)
    assert all(torch.equal(values, found[name]) for name, values in expected.items())
