"""The state of a run and its form in a checkpoint: names, places and bits."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.pieces import LaneRecord
from pretrain.data.lanes import LanePlace, SourcePlace
from pretrain.model.memories.infini import MemoryState
from pretrain.model.state import ModelState
from pretrain.training import run_state
from pretrain.training.run_state import Preface, RunState

LANES, LAYERS = 3, 2


def random_memory(seed: int) -> ModelState:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        MemoryState(
            torch.randn(LANES, 2, 4, 4, generator=generator),
            torch.rand(LANES, 2, 4, generator=generator),
        )
        for _ in range(LAYERS)
    )


def places(first: int) -> list[LanePlace]:
    return [
        LanePlace(lane % 2, lane + first, (SourcePlace(0, 1, 2, 3), SourcePlace(lane, 0, 0, 9)))
        for lane in range(LANES)
    ]


EMPTY: ModelState = tuple(
    MemoryState(*(torch.zeros_like(tensor) for tensor in layer)) for layer in random_memory(0)
)


@pytest.fixture(params=[False, True], ids=["plain", "with a preface"])
def run(request: pytest.FixtureRequest) -> RunState:
    preface = Preface(places(50), random_memory(2)) if request.param else None
    origin = {"path": "a", "step": 5, "sha256": "b"}
    histories, recent = ["aa", "bb", "cc"], ((2.5, 0.1), (1 / 3, 1e-30))
    return RunState(
        7, 896, 2, 1, places(0), histories, random_memory(1), preface, origin, 1, recent
    )


def stored(run: RunState) -> list[LaneRecord]:
    """The lanes' records, as they come back from JSON and files."""
    records = [run_state.lane_record(run, row) for row in range(LANES)]
    return [
        LaneRecord(
            json.loads(json.dumps(one.place)), {k: t.clone() for k, t in one.tensors.items()}
        )
        for one in records
    ]


def test_a_state_comes_back_from_its_records_to_the_bit(run: RunState) -> None:
    counters = json.loads(json.dumps(run_state.counters(run)))
    again = run_state.restored(counters, stored(run), EMPTY, run.preface is not None)
    for field in dataclasses.fields(RunState):
        if field.name not in ("memory", "preface"):
            assert getattr(again, field.name) == getattr(run, field.name), field.name
    pairs = [(again.memory, run.memory)]
    assert (again.preface is None) == (run.preface is None)
    if again.preface is not None and run.preface is not None:
        assert again.preface.places == run.preface.places
        assert again.initial is again.preface.memory
        pairs.append((again.preface.memory, run.preface.memory))
    for found, expected in pairs:
        assert len(found) == LAYERS
        for layer, other in zip(found, expected, strict=True):
            assert type(layer) is MemoryState
            assert torch.equal(layer.matrix, other.matrix)
            assert torch.equal(layer.normaliser, other.normaliser)


def test_a_lane_is_stored_under_the_names_that_checkpoints_have(run: RunState) -> None:
    record = stored(run)[1]
    names = {"0.matrix", "0.normaliser", "1.matrix", "1.normaliser"}
    place = {
        "source": 1,
        "token": 1,
        "sources": [
            {"epoch": 0, "shard": 1, "document": 2, "read": 3},
            {"epoch": 1, "shard": 0, "document": 0, "read": 9},
        ],
        "history": "bb",
    }
    if run.preface is not None:
        names |= {f"preface.{name}" for name in names}
        place["preface"] = {**place, "token": 51}
        del place["preface"]["history"]  # type: ignore[attr-defined]
        matrix = run.preface.memory[0].matrix[1]
        assert torch.equal(record.tensors["preface.0.matrix"], matrix)
    assert set(record.tensors) == names
    assert record.place == place
    assert torch.equal(record.tensors["1.normaliser"], run.memory[1].normaliser[1])


def test_the_memory_before_the_first_step_is_as_large_as_every_later_one(run: RunState) -> None:
    start = run_state.at_start(LANES, EMPTY, run.preface is not None, None)
    for row in range(LANES):
        first, later = (run_state.lane_memories(one, row) for one in (start, run))
        assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in later.items()}
        assert not any(tensor.any() for tensor in first.values())
    assert (start.step, start.tokens, start.histories) == (0, 0, [""] * LANES)
    assert start.places is None and (start.initial is None) == (run.initial is None)


def test_lanes_without_a_history_are_refused(run: RunState) -> None:
    records = stored(run)
    old = [
        LaneRecord({k: v for k, v in one.place.items() if k != "history"}, one.tensors)
        for one in records
    ]
    with pytest.raises(CheckpointError, match="without a ledger; resume it with that version"):
        run_state.restored(run_state.counters(run), old, EMPTY, False)


def test_a_checkpoint_that_names_no_origin_had_new_weights_and_no_spikes(run: RunState) -> None:
    later = ("origin", "spikes", "recent")
    counters = {k: v for k, v in run_state.counters(run).items() if k not in later}
    again = run_state.restored(counters, stored(run), EMPTY, False)
    assert (again.origin, again.spikes, again.recent) == (None, 0, ())
