"""The memory where a window is cut into parts that are computed side by side.

A part is some whole segments of every lane, one after another. What its segments do to a state is
one affine map, x -> A x + B, so a part hands out (A, B) and never tokens: D (D + 1) numbers a head
for Linear, whose A is 1; for Linear + Delta first the D of z, then D x 2 D. From all parts' maps
each part computes the state that it begins with, and the state at the window's end.

Shapes as in `memory`: B lanes, S segments of the part, K heads, D size of a head; P parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pretrain.config import MemoryConfig
from pretrain.model.memories import infini
from pretrain.model.memories.infini import TORCH, MemoryState, Products, Resets


class Parts(Protocol):
    """The parts of a window, as one of them sees them."""

    index: int
    count: int

    def gather(self, own: Tensor) -> Tensor:
        """Every part's tensor, in order: `own` [...] -> [P, ...], with its gradient.

        All parts call it equally often and in the same order, and so do their backwards.
        """


@dataclass(frozen=True)
class StatePassing:
    """How states pass from part to part; the same for every layer of a window."""

    parts: Parts
    reset: Resets
    """For each part the lanes in which a document starts in it."""

    @classmethod
    def of(cls, starting: Tensor, parts: Parts) -> StatePassing:
        """`starting` [B, S] bool: does a document start in the segment of this part?"""
        everywhere = parts.gather(starting.any(dim=1).to(torch.uint8))
        return cls(parts, infini.resets(everywhere.bool().T))

    def advance(
        self,
        keys: Tensor,
        values: Tensor,
        carried: MemoryState,
        writable: Tensor | None,
        reset: Resets,
        config: MemoryConfig,
        products: Products = TORCH,
        initial: MemoryState | None = None,
    ) -> tuple[MemoryState, MemoryState]:
        """`memory.advance` over the part's segments, in a window of all parts.

        `carried` is the state before the window, the second result the one after it: both are the
        same for all parts.
        """
        added, mass, features = products.sums(keys, values, writable)
        if config.kind == "linear":
            # One exchange for both: z is one more column of M.
            joined = _joined(MemoryState(added, mass))
            first = None if initial is None else _joined(initial)
            states, last = self._scan(_joined(carried), joined, reset, initial=first)
            return _split(states), _split(last)
        first_matrix, first_normaliser = initial or (None, None)
        normalisers, last_normaliser = self._scan(
            carried.normaliser, mass, reset, initial=first_normaliser
        )
        divisor = infini.delta_divisor(normalisers, mass, reset, config, first_normaliser)
        transition = products.delta_transition(keys, features, divisor, writable)
        matrices, last_matrix = self._scan(carried.matrix, added, reset, transition, first_matrix)
        return MemoryState(matrices, normalisers), MemoryState(last_matrix, last_normaliser)

    def _scan(
        self,
        carried: Tensor,
        added: Tensor,
        reset: Resets,
        transition: Tensor | None = None,
        initial: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`memory.scan` over the segments of all parts: all x before a segment of this part, and
        the last x of the window.
        """
        if transition is None:
            nothing = torch.zeros_like(carried)
            _, own_sum = infini.scan(nothing, added, reset, initial=initial)
            sums, maps = self._gathered(own_sum), None
        else:
            first = None if initial is None else _as_constant(initial)
            _, own_map = infini.scan(*_as_maps(carried, added), reset, transition, first)
            maps, sums = self._gathered(own_map).chunk(2, dim=-1)
        # What a part with a reset hands out holds `initial`, so between parts one is from 0.
        # Indexed, not picked out of a list: so the first part, which begins with `carried`, has
        # the exchange in its graph, too, and takes part in its backward.
        arriving, last = infini.scan(carried, sums, self.reset, maps)
        before, _ = infini.scan(arriving[:, self.parts.index], added, reset, transition, initial)
        return before, last

    def _gathered(self, own: Tensor) -> Tensor:
        """[B, ...] of each part -> [B, P, ...]."""
        return self.parts.gather(own).transpose(0, 1)


def _as_maps(carried: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Start and steps of a scan that composes (A, B), side by side in [..., D, 2 D].

    A starts as 1 and is only multiplied, B starts as 0 and is added to.
    """
    identity = torch.eye(carried.shape[-1], device=carried.device, dtype=carried.dtype)
    start = torch.cat((identity.expand_as(carried), torch.zeros_like(carried)), dim=-1)
    return start, torch.cat((torch.zeros_like(added), added), dim=-1)


def _as_constant(x: Tensor) -> Tensor:
    """x [..., D, D] as a map (A, B) = (0, x), which forgets what it is given."""
    return torch.cat((torch.zeros_like(x), x), dim=-1)


def _joined(state: MemoryState) -> Tensor:
    """M and z as one: [..., D, D + 1]."""
    return torch.cat((state.matrix, state.normaliser[..., None]), dim=-1)


def _split(joined: Tensor) -> MemoryState:
    """What `_joined` joined."""
    return MemoryState(joined[..., :-1], joined[..., -1])
