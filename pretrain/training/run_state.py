"""The state of a run between two steps, and its form in a checkpoint.

Together with the engine's pieces this is everything in a checkpoint. A step takes a state and
returns the next one. Each lane's record has its place and history as JSON and its memories as
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.pieces import LaneRecord
from pretrain.data.lanes import LanePlace
from pretrain.model import state
from pretrain.model.state import ModelState
from pretrain.training.spikes import Recent

# Prefix, in a checkpoint, of the names of a lane's preface tensors.
_PREFACE = "preface."


class TrainingError(ValueError):
    """A run that cannot continue; the message says why and what to do."""


@dataclass(frozen=True)
class Preface:
    """The lanes' places in `data.preface`, and the memory that their next documents begin with."""

    places: Sequence[LanePlace] | None
    memory: ModelState


@dataclass(frozen=True)
class RunState:
    """Where the run is after `step` steps.

    `places` (None at the start of the data), `histories` (see the ledger) and `memory` belong to
    this rank's lanes and are the same on all ranks of a sequence group; `memory` is the state
    before the next window. `preface` is None without `data.preface`. `tokens` counts the tokens of
    all lanes, `skipped` the steps that were not applied, `spikes` those of them that were finite;
    `recent` is what tells a spike. `origin` says where the initial weights came from; None: they
    were initialised randomly.
    """

    step: int
    tokens: int
    skipped: int
    skipped_in_a_row: int
    places: Sequence[LanePlace] | None
    histories: Sequence[str]
    memory: ModelState
    preface: Preface | None
    origin: Mapping[str, Any] | None = None
    spikes: int = 0
    recent: Recent = ()

    @property
    def initial(self) -> ModelState | None:
        """The memory with which documents in the next window begin; None for the empty memory."""
        return None if self.preface is None else self.preface.memory


def at_start(
    lanes: int, empty: ModelState, with_preface: bool, origin: Mapping[str, Any] | None
) -> RunState:
    """The state before the first step; `empty` is the empty memory of the rank's `lanes` lanes."""
    preface = Preface(None, empty) if with_preface else None
    return RunState(0, 0, 0, 0, None, [""] * lanes, empty, preface, origin)


def place_record(place: LanePlace, history: str, preface: LanePlace | None) -> dict[str, Any]:
    """Where a lane continues, as stored in a checkpoint."""
    record = {**asdict(place), "history": history}
    return record if preface is None else {**record, "preface": asdict(preface)}


def lane_memories(run: RunState, row: int) -> dict[str, Tensor]:
    """The tensors of the lane at `row`, by their names in a checkpoint; views of the state's."""
    tensors = state.lane_tensors(run.memory, row)
    if run.preface is not None:
        tensors |= state.lane_tensors(run.preface.memory, row, _PREFACE)
    return tensors


def lane_record(run: RunState, row: int) -> LaneRecord:
    """The checkpoint's record of the lane at `row`, after a step."""
    assert run.places is not None
    preface = None
    if run.preface is not None:
        assert run.preface.places is not None
        preface = run.preface.places[row]
    place = place_record(run.places[row], run.histories[row], preface)
    return LaneRecord(place, lane_memories(run, row))


def counters(run: RunState) -> dict[str, Any]:
    """The checkpoint's record of the run as a whole."""
    return {
        "step": run.step,
        "tokens": run.tokens,
        "skipped": run.skipped,
        "skipped_in_a_row": run.skipped_in_a_row,
        "origin": run.origin,
        "spikes": run.spikes,
        "recent": [list(step) for step in run.recent],
    }


def restored(
    trainer: Mapping[str, Any],
    lanes: Sequence[LaneRecord],
    empty: ModelState,
    with_preface: bool,
) -> RunState:
    """The state that `counters` and `lane_record` stored; the memory has the form of `empty`.

    Raises CheckpointError if the lanes have no history.
    """
    if "history" not in lanes[0].place:
        raise CheckpointError(
            "it was written by a version without a ledger; resume it with that version"
        )
    tensors = [lane.tensors for lane in lanes]
    preface = None
    if with_preface:
        places = [LanePlace.of(lane.place["preface"]) for lane in lanes]
        preface = Preface(places, state.from_lane_tensors(tensors, empty, _PREFACE))
    return RunState(
        trainer["step"],
        trainer["tokens"],
        trainer["skipped"],
        trainer["skipped_in_a_row"],
        [LanePlace.of(lane.place) for lane in lanes],
        [lane.place["history"] for lane in lanes],
        state.from_lane_tensors(tensors, empty),
        preface,
        trainer.get("origin"),
        trainer.get("spikes", 0),
        tuple((loss, norm) for loss, norm in trainer.get("recent", ())),
    )
