"""The state of a model between windows: a value that can be split and joined by lanes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = NamedTuple
"""The memory of one layer: a NamedTuple of tensors [lanes, ...], of any dtype, whose other sizes
are fixed by the configuration. All zeros is the empty memory."""

ModelState: TypeAlias = tuple[State, ...]
"""The memory of each layer, in order; or of the whole model if the layers have no memory
(see memories/contract.py)."""


def mapped(function: Callable[[Tensor], Tensor], state: State) -> State:
    """The state with `function` applied to every tensor."""
    return state._make(map(function, state))


def overwrite(state: State, new: State) -> None:
    """Copy `new` into the tensors of `state`."""
    for tensor, values in zip(state, new, strict=True):
        tensor.copy_(values)


def of_lanes(state: ModelState, lanes: slice | list[int]) -> ModelState:
    """The memories of some of the lanes."""
    return tuple(mapped(lambda tensor: tensor[lanes], layer) for layer in state)


def joined(states: Sequence[ModelState]) -> ModelState:
    """The states of several batches as one, lanes in order."""
    return tuple(
        layers[0]._make(torch.cat(parts) for parts in zip(*layers, strict=True))
        for layers in zip(*states, strict=True)
    )


def detached(state: ModelState) -> ModelState:
    """The state detached from the graph: no gradient flows into the previous window."""
    return tuple(mapped(Tensor.detach, layer) for layer in state)


def without_nonfinite(state: ModelState) -> ModelState:
    """The state with the memory of each non-finite lane emptied, in all layers.

    Otherwise that lane would make every step non-finite until its document ends.
    """
    tensors = [tensor for layer in state for tensor in layer]
    if not tensors:
        return state
    finite = torch.stack([t.flatten(1).isfinite().all(dim=1) for t in tensors]).all(dim=0)

    def emptied(tensor: Tensor) -> Tensor:
        lanes = finite.view(-1, *[1] * (tensor.ndim - 1))
        return torch.where(lanes, tensor, torch.zeros_like(tensor))

    return tuple(mapped(emptied, layer) for layer in state)


def lane_tensors(state: ModelState, row: int, prefix: str = "") -> dict[str, Tensor]:
    """The memories of the lane at `row`, without the lanes' axis, as PREFIX + LAYER.NAME.

    They are views: writing to the state changes them.
    """
    return {
        f"{prefix}{index}.{name}": tensor[row]
        for index, layer in enumerate(state)
        for name, tensor in zip(layer._fields, layer, strict=True)
    }


def from_lane_tensors(
    lanes: Sequence[Mapping[str, Tensor]], like: ModelState, prefix: str = ""
) -> ModelState:
    """The state whose `lane_tensors` are those of `lanes`, in the form of `like`.

    They are moved to its device and dtype, which is that of the activations for some memories.
    Raises KeyError if a lane lacks a tensor that `like` has.
    """
    return tuple(
        layer._make(
            torch.stack([lane[f"{prefix}{index}.{name}"] for lane in lanes]).to(tensor)
            for name, tensor in zip(layer._fields, layer, strict=True)
        )
        for index, layer in enumerate(like)
    )
