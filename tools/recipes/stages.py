"""Stages of a training on made documents: their settings, and how many documents they need."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

TIMES = 2  # how often a document is read, on average
GATES = 20  # learning rate of the gates, as a multiple of the weights'
# Of Memorizing Transformers. With the defaults the gate of a store closes while all that is asked
# for is near, before the store is of use, and then nothing learns to search it (docs/trials.md).
SEARCHED = ("model.memory.memorizing.initial_scale=10", "optim.gate_lr=0.0003")
_LEAST = 16  # documents in a set, one per shard


class Documents(Protocol):
    """A set of documents."""

    @property
    def name(self) -> str:
        """Of its directory."""

    @property
    def mean(self) -> float:
        """Mean tokens of a document."""


D = TypeVar("D", bound=Documents)


@dataclass(frozen=True)
class Stage(Generic[D]):
    """A run of `pretrain train`, from the weights of the stage before it.

    `shares` are the sets and their shares of the tokens; a step has `lanes` windows of `segments`
    segments.
    """

    name: str
    shares: tuple[tuple[D, float], ...]
    steps: int
    lanes: int
    segments: int
    lr: float
    prompt_weight: float
    decay: float = 0.0
    """The final share of the steps, over which the learning rate falls to a tenth."""
    weight_decay: float = 0.1
    preface: str = ""
    """The set for `data.preface`: documents begin with its memory, at all distances up to the
    lengths of its documents."""
    segment: int = 0
    """Tokens of a segment; 0: the recipe's. In a longer one what is near needs no memory."""

    def settings(self, data: Path) -> list[str]:
        """The stage's settings, as `key=value`; `data` is the directory of the sets."""
        mix = [{"data": str(data / one.name), "weight": share} for one, share in self.shares]
        warmup = min(20, self.steps // 2)
        decay = min(round(self.decay * self.steps), self.steps - warmup)
        return [
            f"data.mix={json.dumps(mix)}",
            f"data.lanes={self.lanes}",
            f"data.prompt_weight={self.prompt_weight}",
            f"train.window_segments={self.segments}",
            f"train.steps={self.steps}",
            f"optim.lr={self.lr}",
            f"optim.gate_lr={GATES * self.lr}",
            f"optim.weight_decay={self.weight_decay}",
            f"optim.warmup_steps={warmup}",
            f"optim.decay_steps={decay}",
            *([f"data.preface={data / self.preface}"] if self.preface else []),
            *([f"model.segment={self.segment}"] if self.segment else []),
        ]


def shortened(plan: Sequence[Stage[D]], share: float) -> list[Stage[D]]:
    """The stages with `share` of their steps each, at least two."""
    return [replace(stage, steps=max(2, round(share * stage.steps))) for stage in plan]


def documents_needed(plan: Sequence[Stage[D]], segment: int) -> dict[D, int]:
    """How many documents each set needs so that each is read `TIMES` times."""
    tokens: dict[D, float] = {}
    for stage in plan:
        read = stage.steps * stage.lanes * stage.segments * (stage.segment or segment)
        whole = sum(share for _, share in stage.shares)
        for one, share in stage.shares:
            tokens[one] = tokens.get(one, 0.0) + read * share / whole
    return {one: max(_LEAST, math.ceil(count / one.mean / TIMES)) for one, count in tokens.items()}
