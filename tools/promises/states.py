"""What a checkpoint or a run holds, by name, and what two of them do not hold alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.load import Checkpoint


def stored(path: Path) -> dict[str, Any]:
    """All that a checkpoint holds but its configuration, gathered from all ranks' files."""
    with Checkpoint(path) as checkpoint:
        state: dict[str, Any] = {name: checkpoint.tensor(name) for name in checkpoint.names()}
        for lane in range(checkpoint.lanes()):
            record = checkpoint.lane(lane)
            state[f"lane {lane} place"] = dict(record.place)
            state |= {f"lane {lane} {name}": tensor for name, tensor in record.tensors.items()}
        kept = {key: value for key, value in checkpoint.trainer.items() if key != "configuration"}
        return state | {f"trainer {key}": value for key, value in kept.items()}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names under which two states are not equal to the bit, or that only one of them has."""
    names = sorted(one.keys() | other.keys())
    return [
        name
        for name in names
        if name not in one or name not in other or not _same(one[name], other[name])
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)
