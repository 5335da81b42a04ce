"""The compressive memory of one layer (equations 7 to 9), for all segments of a window at once.

Pure functions of tensors: the state comes in and goes out. Another kind of segment memory would
stand beside this file with the same three steps: `empty`, `advance`, `retrieve`.

Shapes: B lanes, S segments, N tokens of a segment, K key/value heads with a memory each, D size of
a head. Everything here is float32 (float64 in a float64 model): fp16 overflows and bf16 loses mass
after some hundred segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config import MemoryConfig

Resets: TypeAlias = Sequence[Tensor | None]
"""For each segment the lanes, [B] bool, in which a document starts there; None: in no lane."""


class MemoryState(NamedTuple):
    """M and z of one layer. In a window, a segment axis S stands after the lanes."""

    matrix: Tensor
    """[B, K, D, D]: rows are features of keys, columns are values."""
    normaliser: Tensor
    """[B, K, D]: sum of the features of all keys written."""

    def norms(self) -> tuple[Tensor, Tensor]:
        """The Frobenius norm of M and the mean of z, averaged over lanes and heads: scalars."""
        return self.matrix.norm(dim=(-2, -1)).mean(), self.normaliser.mean()


def resets(starting: Tensor) -> Resets:
    """`starting` [B, S] bool: does a document start in the segment?"""
    # Most segments hold no start in any lane: they then cost no pass over the state.
    somewhere = starting.any(dim=0).tolist()
    return [
        lanes if any_ else None for lanes, any_ in zip(starting.unbind(1), somewhere, strict=True)
    ]


def empty(
    lanes: int, kv_heads: int, d_head: int, device: torch.device, dtype: torch.dtype
) -> MemoryState:
    """The memory before a document's first token: it reads as 0."""
    return MemoryState(
        torch.zeros(lanes, kv_heads, d_head, d_head, device=device, dtype=dtype),
        torch.zeros(lanes, kv_heads, d_head, device=device, dtype=dtype),
    )


def sigma(x: Tensor) -> Tensor:
    """The feature map ELU + 1, in the memory's precision."""
    return F.elu(x.to(torch.promote_types(torch.float32, x.dtype))).add_(1)


def retrieve(queries: Tensor, memory: MemoryState, readable: Tensor) -> Tensor:
    """Equation 7: sigma(Q) M / (sigma(Q) z), 0 where the memory is empty or may not be read.

    queries: [B, S, K, R, D], sigma(Q) of the R queries that share a memory; memory: the state
    before each segment; readable: bool, broadcastable to [B, S, K, R]. Returns [B, S, K, R, D].
    """
    mass = torch.linalg.vecdot(queries, memory.normaliser[..., None, :])
    weight = _reciprocal(mass).masked_fill(~readable, 0)
    return (queries @ memory.matrix) * weight[..., None]


def advance(
    keys: Tensor,
    values: Tensor,
    carried: MemoryState,
    reset: Resets,
    config: MemoryConfig,
) -> tuple[MemoryState, MemoryState]:
    """The states before each segment, [B, S, ...], and the state after the last one.

    keys: [B, S, K, N, D], sigma(K), with 0 for tokens that must not be written; values: the same
    shape; carried: the state before the window; reset: where a document starts, so that nothing
    from before the segment is kept after it.

    Linear (8): M_s = M_{s-1} + sigma(K)^T V. Linear + Delta (9), with D_s = diag(sigma(K) z):
    M_s = (I - sigma(K)^T D_s^-1 sigma(K)) M_{s-1} + sigma(K)^T V; the delta term is 0 on an empty
    memory. The paper takes z_{s-1} as z (`normaliser` "paper"). Where a segment adds much more to
    z than z held before, as after a document that started near a segment's end, the update's
    smallest eigenvalue is then near 1 - dz / z_{s-1}, far below -1: what M held is blown up
    instead of replaced. With z_s ("inclusive") every eigenvalue lies within 0 to 1.
    """
    return compose(
        keys.transpose(-2, -1) @ values,
        keys.sum(dim=-2),
        lambda normaliser: _erased(keys, normaliser),
        carried,
        reset,
        config,
    )


def compose(
    added: Tensor,
    mass: Tensor,
    erased: Callable[[Tensor], Tensor],
    carried: MemoryState,
    reset: Resets,
    config: MemoryConfig,
) -> tuple[MemoryState, MemoryState]:
    """`advance` from what each segment writes: the steps over segments, without any token.

    added [B, S, K, D, D] is sigma(K)^T V, mass [B, S, K, D] the sum of sigma(K), and erased gives
    sigma(K)^T diag(sigma(K) z)^-1 sigma(K), [B, S, K, D, D], for the z [B, S, K, D] of Delta.
    """
    normalisers, last_normaliser = _scan(carried.normaliser, mass, reset)
    transition = None
    if config.kind == "delta":
        by_segment = zip(normalisers.unbind(1), reset, strict=True)
        divisor = torch.stack([_forget(z, lanes) for z, lanes in by_segment], dim=1)
        if config.normaliser == "inclusive":
            divisor = divisor + mass
        identity = torch.eye(mass.shape[-1], device=mass.device, dtype=mass.dtype)
        transition = identity - erased(divisor)
    matrices, last_matrix = _scan(carried.matrix, added, reset, transition)
    return MemoryState(matrices, normalisers), MemoryState(last_matrix, last_normaliser)


def _erased(keys: Tensor, normaliser: Tensor) -> Tensor:
    """sigma(K)^T diag(sigma(K) z)^-1 sigma(K) for each segment: [B, S, K, D, D]."""
    weight = _reciprocal(torch.linalg.vecdot(keys, normaliser[..., None, :]))
    return keys.transpose(-2, -1) @ (keys * weight[..., None])


def _scan(
    start: Tensor, added: Tensor, reset: Resets, transition: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x_s = T_s x_{s-1} + added_s, from 0 where reset; all x before a segment, and the last x.

    start: [B, ...]; added: [B, S, ...]; transition: [B, S, K, D, D], None for the identity. The
    steps are small (no token axis), so they run one after another; a running sum minus an earlier
    one would lose a young document's digits beside an old one's.
    """
    before = []
    state = start
    steps = transition.unbind(1) if transition is not None else [None] * added.shape[1]
    for step, new, lanes in zip(steps, added.unbind(1), reset, strict=True):
        before.append(state)
        state = _forget(state, lanes)
        state = new + (state if step is None else step @ state)
    return torch.stack(before, dim=1), state


def _forget(state: Tensor, lanes: Tensor | None) -> Tensor:
    """`state` [B, ...] with 0 in the given lanes.

    Filled, not multiplied by 0: a document that overflowed must not poison the next one.
    """
    if lanes is None:
        return state
    return state.masked_fill(lanes.view(-1, *[1] * (state.dim() - 1)), 0)


def _reciprocal(mass: Tensor) -> Tensor:
    """1 / mass, and 0 with a gradient of 0 where mass is 0."""
    nothing = mass == 0
    return mass.masked_fill(nothing, 1).reciprocal().masked_fill(nothing, 0)
