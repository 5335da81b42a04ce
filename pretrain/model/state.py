"""The memories of all layers, as a value that batches of lanes are cut out of and put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pretrain.model.memories.infini import MemoryState

ModelState: TypeAlias = tuple[MemoryState, ...]
"""The memory of each layer, its tensors [lanes, ...]; () for a model without."""


def of_lanes(state: ModelState, lanes: slice | list[int]) -> ModelState:
    """The memories of some of the lanes."""
    return tuple(MemoryState(*(tensor[lanes] for tensor in layer)) for layer in state)


def joined(states: Sequence[ModelState]) -> ModelState:
    """The states of several batches as one, lanes in order."""
    return tuple(
        MemoryState(*(torch.cat(parts) for parts in zip(*layers, strict=True)))
        for layers in zip(*states, strict=True)
    )


def detached(state: ModelState) -> ModelState:
    """The state without its history: no gradient flows into the window before."""
    return tuple(MemoryState(*(tensor.detach() for tensor in layer)) for layer in state)


def without_nonfinite(state: ModelState) -> ModelState:
    """The state with the memory of each lane that is not finite emptied, in all layers.

    A lane that kept it would spoil every step until its document ends.
    """
    tensors = [tensor for layer in state for tensor in layer]
    if not tensors:
        return state
    finite = torch.stack([t.flatten(1).isfinite().all(dim=1) for t in tensors]).all(dim=0)
    return tuple(
        MemoryState(*(torch.where(_along(finite, tensor), tensor, 0.0) for tensor in layer))
        for layer in state
    )


def lane_tensors(state: ModelState, row: int, prefix: str = "") -> dict[str, Tensor]:
    """The memories of the lane at `row`, without the lanes' axis, as PREFIX + LAYER.NAME.

    They are views: what writes to the state changes them.
    """
    return {
        f"{prefix}{index}.{name}": tensor[row]
        for index, layer in enumerate(state)
        for name, tensor in zip(layer._fields, layer, strict=True)
    }


def from_lane_tensors(
    lanes: Sequence[Mapping[str, Tensor]], like: ModelState, prefix: str = ""
) -> ModelState:
    """The state whose `lane_tensors` are those of `lanes`, in the form and on the device of `like`.

    Raises KeyError where a lane lacks a tensor that `like` has.
    """
    return tuple(
        type(layer)(
            *(
                torch.stack([lane[f"{prefix}{index}.{name}"] for lane in lanes]).to(tensor.device)
                for name, tensor in zip(layer._fields, layer, strict=True)
            )
        )
        for index, layer in enumerate(like)
    )


def _along(lanes: Tensor, tensor: Tensor) -> Tensor:
    return lanes.view(-1, *[1] * (tensor.ndim - 1))
