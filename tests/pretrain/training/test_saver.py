"""What a save leaves on disk and in the records, while training continues beside it."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import pytest
import torch

from data_prep.dataset import settings
from pretrain.checkpoint.attempts import SupersededError
from pretrain.checkpoint.load import Checkpoint
from pretrain.checkpoint.manifest import CheckpointError, step_name
from pretrain.checkpoint.ranks import SoloRanks
from pretrain.training.metrics import read_records
from pretrain.training.records import Records
from pretrain.training.run import Run
from pretrain.training.saver import Saver, reserved

T = TypeVar("T")
Take = Callable[[Run, int], Any]


class HeldRanks(SoloRanks):
    """A rank whose save waits until it is let go."""

    def __init__(self) -> None:
        self.reached, self.let_go = threading.Event(), threading.Event()

    def gather(self, value: T) -> list[T]:
        self.reached.set()
        assert self.let_go.wait(60)
        return super().gather(value)


class FullDisk(SoloRanks):
    """A rank that cannot write."""

    def sum(self, values: Sequence[float]) -> list[float]:
        raise OSError(28, "No space left on device")


def checkpoint(run: Run, step: int) -> Checkpoint:
    return Checkpoint(run.attempt.directory / "checkpoints" / step_name(step))


def open_records(run: Run) -> Records:
    return Records(run.attempt, 1, run.config, run.data, run.state.step)


def copied(run: Run) -> dict[str, torch.Tensor]:
    """What a checkpoint of this moment must hold, by its names there."""
    tensors = {piece.name: piece.values.clone() for piece in run.engine.pieces()}
    for layer, memory in enumerate(run.state.memory):
        for name, tensor in zip(memory._fields, memory, strict=True):
            tensors |= {f"lane {lane} {layer}.{name}": tensor[lane].clone() for lane in range(4)}
    return tensors


def test_a_checkpoint_holds_the_state_of_its_step_although_training_continued(
    open_run: Any, take_steps: Take, make_saver: Callable[..., Saver]
) -> None:
    run, ranks = open_run(), HeldRanks()
    take_steps(run, 2)
    heard: list[tuple[str, int]] = []
    saver, expected, saved = make_saver(run, ranks=ranks, heard=heard), copied(run), run.state
    saver.save(saved, finish=False)
    assert ranks.reached.wait(60)
    take_steps(run, 1)
    for layer in saved.memory:  # not even in place may the memory that was saved matter now
        for tensor in layer:
            tensor.fill_(7.0)
    assert heard == [("waits", 2), ("saves", 2)] and saver.note() is None
    ranks.let_go.set()
    saver.wait()
    assert heard[-1] == ("saves", 0)
    with checkpoint(run, 2) as found:
        assert set(found.names()) == {name for name in expected if not name.startswith("lane")}
        for name in found.names():
            assert torch.equal(found.tensor(name).reshape(-1), expected[name]), name
        for lane in range(4):
            record = found.lane(lane)
            assert saved.places is not None
            place = {**asdict(saved.places[lane]), "history": saved.histories[lane]}
            assert record.place == json.loads(json.dumps(place))
            for name, tensor in record.tensors.items():
                assert torch.equal(tensor, expected[f"lane {lane} {name}"]), (lane, name)
        assert found.trainer == {
            "step": 2,
            "tokens": 2 * 4 * 32,
            "skipped": 0,
            "skipped_in_a_row": 0,
            "spikes": 0,
            "recent": [],
            "optimizer_steps": 2,
            "sources": [[s.sha256 for s in run.data.mix.datasets[0].manifest.shards]],
            "preface": None,
            "vocab_size": 48,
            "origin": None,
            "configuration": json.loads(json.dumps(settings.to_plain(run.config))),
        }


def test_records_and_the_line_in_the_ledger_come_before_the_commit(
    open_run: Any, take_steps: Take, make_saver: Callable[..., Saver]
) -> None:
    run = open_run()
    records = open_records(run)
    take_steps(run, 1)
    (run.attempt.directory / "attempts").mkdir()
    newer = run.attempt.directory / "attempts" / "000002.json"
    newer.write_text("{}")
    with pytest.raises(SupersededError):
        make_saver(run, records).save(run.state, finish=True)
    (line,) = read_records(run.attempt.directory / "ledger.jsonl")
    assert (line["step"], line["histories"]) == (1, list(run.state.histories))
    newer.unlink()
    records.close()
    # What cannot be recorded is not committed.
    with pytest.raises(CheckpointError, match="closed file"):
        make_saver(run, records).save(run.state, finish=True)
    assert list((run.attempt.directory / "checkpoints").glob("*")) == []


def test_a_save_is_recorded_once_with_its_time_and_its_stall(
    open_run: Any, take_steps: Take, make_saver: Callable[..., Saver]
) -> None:
    run = open_run()
    records, ranks = open_records(run), HeldRanks()
    saver = make_saver(run, records, ranks=ranks)
    path = run.attempt.directory / "metrics.jsonl"
    take_steps(run, 1)
    saver.save(run.state, finish=False)
    assert read_records(path) == []
    take_steps(run, 1)
    threading.Timer(0.1, ranks.let_go.set).start()
    saver.save(run.state, finish=True)  # waits for the one before
    assert saver.note() is None
    first, second = read_records(path)
    assert [(one["kind"], one["step"]) for one in (first, second)] == [
        ("checkpoint", 1), ("checkpoint", 2)
    ]  # fmt: skip
    assert list(first) == ["kind", "step", "seconds", "stall"]
    assert 0 < first["stall"] < first["seconds"]
    # The second one's stall is the wait for the first one and its own whole time.
    assert second["stall"] > second["seconds"] > 0
    assert run.attempt.directory.joinpath("checkpoints", step_name(1)).is_dir()
    records.close()


def test_a_save_that_fails_is_raised_once_and_logged_where_training_has_ended(
    open_run: Any,
    take_steps: Take,
    make_saver: Callable[..., Saver],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = open_run()
    take_steps(run, 1)
    saver = make_saver(run, ranks=FullDisk())
    with pytest.raises(OSError, match="No space left"):
        saver.save(run.state, finish=True)
    saver.save(run.state, finish=False)
    while not saver.failed:
        pass
    assert saver.note() is None
    with pytest.raises(OSError, match="No space left"):
        saver.save(run.state, finish=False)
    assert not saver.failed
    saver.save(run.state, finish=False)
    with caplog.at_level(logging.WARNING, "pretrain.training.saver"):
        saver.end(1, patience=60)
    assert "the checkpoint in flight failed: [Errno 28] No space left on device" in caplog.text


def test_the_end_waits_for_a_save_in_flight_as_long_as_it_may(
    open_run: Any, take_steps: Take, make_saver: Callable[..., Saver]
) -> None:
    run, ranks = open_run(), HeldRanks()
    take_steps(run, 1)
    heard: list[tuple[str, int]] = []
    saver = make_saver(run, ranks=ranks, heard=heard)
    saver.save(run.state, finish=False)
    saver.end(1, patience=0.05)
    assert heard == [("waits", 1), ("saves", 1), ("waits", 1)]
    threading.Timer(0.2, ranks.let_go.set).start()
    saver.end(1, patience=60)
    assert heard[-1] == ("saves", 0)
    with checkpoint(run, 1) as found:
        assert found.lanes() == 4


def test_a_rank_that_owns_no_lanes_stores_none_and_reserves_no_memory_for_them(
    open_run: Any, take_steps: Take
) -> None:
    run = open_run()
    lanes = sum(tensor[0].nbytes for layer in run.state.memory for tensor in layer) * 4
    whole = reserved(run.engine, range(4), run.state)
    copy = reserved(run.engine, range(0), run.state)
    assert whole.bytes - copy.bytes == lanes
    take_steps(run, 1)
    saver = Saver(
        run.engine, range(0), copy, run.attempt, run.config.checkpoint, run.described, SoloRanks(),
        lambda step: None, lambda step: None, None,
    )  # fmt: skip
    saver.save(run.state, finish=True)
    with checkpoint(run, 1) as found:
        assert found.lanes() == 0
    with pytest.raises(CheckpointError, match="lane 0 was asked for"):
        checkpoint(run, 1).lane(0)
