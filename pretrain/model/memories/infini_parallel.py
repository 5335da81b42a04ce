"""The memory of a window that is divided into parts computed in parallel.

A part is a run of consecutive whole segments, the same in every lane. Its effect on a state is an
affine map, x -> A x + B, so a part sends (A, B) and never tokens: D (D + 1) numbers per head for
Linear, whose A is 1; for Linear + Delta first the D of z, then D x 2 D. From the maps of all parts
each part computes the state that it begins with, and the state at the window's end.

Shapes: B lanes, S segments of the part, K heads, D size of a head; P parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.model.memories import infini_grad
from pretrain.model.window import Parts, Resets


@dataclass(frozen=True)
class Passing:
    """Passes states from part to part."""

    parts: Parts
    reset: Resets
    """For each part, the lanes in which a document starts in it."""

    def scan(
        self,
        carried: Tensor,
        added: Tensor,
        reset: Resets,
        transition: Tensor | None = None,
        initial: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`infini_grad.scan` over the segments of all parts: x before each segment of this part,
        and the last x of the window.
        """
        if transition is None:
            nothing = torch.zeros_like(carried)
            _, own_sum = infini_grad.scan(nothing, added, reset, initial=initial)
            sums, maps = self._gathered(own_sum), None
        else:
            first = None if initial is None else _as_constant(initial)
            _, own_map = infini_grad.scan(*_as_maps(carried, added), reset, transition, first)
            maps, sums = self._gathered(own_map).chunk(2, dim=-1)
        # The map of a part with a reset already includes `initial`, so resets between parts use 0.
        # Indexed instead of unbound, so that the first part, which begins with `carried`, also has
        # the exchange in its graph and takes part in its backward.
        arriving, last = infini_grad.scan(carried, sums, self.reset, maps)
        before, _ = infini_grad.scan(
            arriving[:, self.parts.index], added, reset, transition, initial
        )
        return before, last

    def _gathered(self, own: Tensor) -> Tensor:
        """[B, ...] of each part -> [B, P, ...]."""
        return self.parts.gather(own).transpose(0, 1)


def _as_maps(carried: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Start and steps of a scan that composes (A, B), side by side in [..., D, 2 D].

    A starts as the identity and is only multiplied; B starts as 0 and is added to.
    """
    identity = torch.eye(carried.shape[-1], device=carried.device, dtype=carried.dtype)
    start = torch.cat((identity.expand_as(carried), torch.zeros_like(carried)), dim=-1)
    return start, torch.cat((torch.zeros_like(added), added), dim=-1)


def _as_constant(x: Tensor) -> Tensor:
    """x [..., D, D] as a map (A, B) = (0, x), which ignores its argument."""
    return torch.cat((torch.zeros_like(x), x), dim=-1)
