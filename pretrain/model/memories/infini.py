"""The compressive memory of one layer (equations 7 to 9), for all segments of a window at once.

Pure functions of tensors: the state comes in and goes out. Another kind of segment memory would
stand beside this file with the same three steps: `empty`, `advance`, `gated_read`.

Gradients are written by hand: the backward keeps what the projections gave and the small states at
segment starts, and computes the features sigma of queries and keys again. A window's length
then costs no tensor of its own.

Shapes: B lanes, S segments, N tokens of a segment, H query heads, K key/value heads with a memory
each, G = H / K query heads that share one, D size of a head. Features, states and sums are float32
(float64 in a float64 model): fp16 overflows and bf16 loses mass after some hundred segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.config import MemoryConfig
from pretrain.model.compiling import fused

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


def gated_read(
    local: Tensor,
    queries: Tensor,
    before: MemoryState,
    readable: Tensor,
    gate: Tensor,
) -> Tensor:
    """Equations 7 and 10: g A_mem + (1 - g) A_local, with A_mem = sigma(Q) M / (sigma(Q) z).

    local, queries: [B, S, N, H, D], the local attention and the queries without positions; before:
    the state before each segment; readable: [B, S, N] bool; gate: [H], beta, where g is
    sigmoid(beta). A_mem is 0 where the memory is empty or may not be read. Returns [B, S, N, H, D].
    """
    mixed: Tensor = _GatedRead.apply(local, queries, *before, readable, gate)  # type: ignore[no-untyped-call]
    return mixed


def advance(
    keys: Tensor,
    values: Tensor,
    carried: MemoryState,
    writable: Tensor | None,
    reset: Resets,
    config: MemoryConfig,
    products: Products | None = None,
    initial: MemoryState | None = None,
) -> tuple[MemoryState, MemoryState]:
    """The states before each segment, [B, S, ...], and the state after the last one.

    keys, values: [B, S, N, K, D], keys without positions; carried: the state before the window;
    writable: [B, S, N] bool, None for everywhere; reset: where a document starts, so that nothing
    from before the segment is kept after it; products: PyTorch's where not given; initial: what a
    document that starts in the window begins with, a constant, None for the empty memory.

    Linear (8): M_s = M_{s-1} + sigma(K)^T V. Linear + Delta (9), with D_s = diag(sigma(K) z):
    M_s = (I - sigma(K)^T D_s^-1 sigma(K)) M_{s-1} + sigma(K)^T V; the delta term is 0 on an empty
    memory. The paper takes z_{s-1} as z (`normaliser` "paper"). Where a segment adds much more to
    z than z held before, as after a document that started near a segment's end, the update's
    smallest eigenvalue is then near 1 - dz / z_{s-1}, far below -1: what M held is blown up
    instead of replaced. With z_s ("inclusive") every eigenvalue lies within 0 to 1.
    """
    products = products or TORCH
    added, mass, features = products.sums(keys, values, writable)
    first_matrix, first_normaliser = initial or (None, None)
    normalisers, last_normaliser = scan(carried.normaliser, mass, reset, initial=first_normaliser)
    transition = None
    if config.kind == "delta":
        divisor = delta_divisor(normalisers, mass, reset, config, first_normaliser)
        transition = products.delta_transition(keys, features, divisor, writable)
    matrices, last_matrix = scan(carried.matrix, added, reset, transition, first_matrix)
    return MemoryState(matrices, normalisers), MemoryState(last_matrix, last_normaliser)


def sums(keys: Tensor, values: Tensor, writable: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What each segment adds to M [B, S, K, D, D] and z [B, S, K, D], and sigma(K).

    The features [B, S, K, N, D] are for `delta_transition`, which has its own way to the gradient.
    """
    added, mass, features = _Sums.apply(keys, values, writable)  # type: ignore[no-untyped-call]
    return added, mass, features


def delta_divisor(
    normalisers: Tensor,
    mass: Tensor,
    reset: Resets,
    config: MemoryConfig,
    initial: Tensor | None = None,
) -> Tensor:
    """The z [B, S, K, D] that each segment's update divides by; `normalisers` stand before it.

    initial: the z [B, K, D] that documents begin with, None for 0.
    """
    if any(lanes is not None for lanes in reset):
        by_segment = zip(normalisers.unbind(1), reset, strict=True)
        normalisers = torch.stack([_restart(z, lanes, initial) for z, lanes in by_segment], dim=1)
    return normalisers + mass if config.normaliser == "inclusive" else normalisers


def delta_transition(
    keys: Tensor, features: Tensor | None, divisor: Tensor, writable: Tensor | None
) -> Tensor:
    """I - sigma(K)^T diag(sigma(K) z)^-1 sigma(K) for each segment: [B, S, K, D, D].

    features: sigma(keys), as `sums` gave it; divisor: z.
    """
    transition: Tensor = _Transition.apply(keys, features, divisor, writable)  # type: ignore[no-untyped-call]
    return transition


def scan(
    start: Tensor,
    added: Tensor,
    reset: Resets,
    transition: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x_s = T_s x_{s-1} + added_s; all x before a segment, and the last x.

    Where reset, x_{s-1} is `initial`. start: [B, K, ...]; added: [B, S, K, ...]; transition:
    [B, S, K, D, D], None for the identity; initial: as start, None for 0, without a gradient.
    The steps are small (no token axis), so they run one after another; a running sum minus an
    earlier one would lose a young document's digits beside an old one's.
    """
    before, last = _Scan.apply(start, added, transition, reset, initial)  # type: ignore[no-untyped-call]
    return before, last


def sigma(x: Tensor) -> Tensor:
    """The feature map ELU + 1, in the memory's precision, and above 0 wherever exp(x) is.

    Written with exp, which is far faster than ELU's expm1 and keeps what 1 + expm1(x) rounds to 0.
    """
    x = x.to(_precise(x))
    return x.clamp(max=0).exp_().add_(x.clamp(min=0))


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, x.dtype)


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """A copy of x [B, S, N, H, D] as [B, S, K, G * N, D], in the memory's precision."""
    grouped = torch.unflatten(x, 3, (kv_heads, -1)).permute(0, 1, 3, 4, 2, 5)
    copy = torch.empty(grouped.shape, dtype=_precise(x), device=x.device)
    return copy.copy_(grouped).flatten(3, 4)


def _by_token(x: Tensor, tokens: int) -> Tensor:
    """x [B, S, K, G * N, D] as [B, S, N, H, D], a view."""
    return torch.unflatten(x, 3, (-1, tokens)).permute(0, 1, 4, 2, 3, 5).flatten(3, 4)


def _features(x: Tensor, kv_heads: int, writable: Tensor | None = None) -> Tensor:
    """sigma of x [B, S, N, H, D] as [B, S, K, G * N, D]; 0 where not writable [B, S, N]."""
    features = _by_head(sigma(x), kv_heads)
    if writable is not None:
        features.mul_(writable[:, :, None, :, None])
    return features


def _slope(features: Tensor) -> Tensor:
    """The derivative of sigma, from its value and in its place: 1 above 0, sigma below."""
    return features.clamp_(max=1)


def _reciprocal(mass: Tensor) -> Tensor:
    """1 / mass, and 0 where mass is 0."""
    return mass.reciprocal().masked_fill_(mass == 0, 0)


class _GatedRead(torch.autograd.Function):
    """See `gated_read`."""

    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,
        queries: Tensor,
        matrix: Tensor,
        normaliser: Tensor,
        readable: Tensor,
        gate: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(local, queries, matrix, normaliser, readable, gate)
        return _mixed(local, queries, matrix, normaliser, readable, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        to_local, to_queries, to_matrix, to_normaliser, to_gate = _mixed_backward(
            slope, *ctx.saved_tensors
        )
        return to_local, to_queries, to_matrix, to_normaliser, None, to_gate


@fused
def _mixed(
    local: Tensor,
    queries: Tensor,
    matrix: Tensor,
    normaliser: Tensor,
    readable: Tensor,
    gate: Tensor,
) -> Tensor:
    _, _, retrieved = _retrieve(queries, matrix, normaliser, readable)
    share = gate.to(retrieved.dtype).sigmoid()[:, None]
    mixed = torch.empty(queries.shape, dtype=retrieved.dtype, device=queries.device)
    by_token = _by_token(retrieved, queries.shape[2])
    torch.lerp(local.to(retrieved.dtype), by_token, share, out=mixed)
    return mixed.to(local.dtype)


@fused
def _mixed_backward(
    slope: Tensor,
    local: Tensor,
    queries: Tensor,
    matrix: Tensor,
    normaliser: Tensor,
    readable: Tensor,
    gate: Tensor,
) -> tuple[Tensor, ...]:
    """The slopes at local, queries, matrix, normaliser and gate."""
    kv_heads, tokens = matrix.shape[2], queries.shape[2]
    features, weight, retrieved = _retrieve(queries, matrix, normaliser, readable)
    share = gate.to(retrieved.dtype).sigmoid()
    to_read = _by_head(slope, kv_heads)
    along = (to_read * retrieved).sum(dim=-1, keepdim=True)
    by_head = torch.unflatten(along, 3, (-1, tokens)).sum(dim=(0, 1, 4, 5)).flatten()
    slope = slope.to(retrieved.dtype)
    to_share = by_head - (slope * local).sum(dim=(0, 1, 2, 4))
    to_gate = (to_share * share * (1 - share)).to(gate.dtype)
    to_local = (slope * (1 - share)[:, None]).to(local.dtype)
    weight = torch.unflatten(weight, 3, (-1, tokens))
    weight = (weight * share.view(kv_heads, -1, 1, 1)).flatten(3, 4)
    to_read.mul_(weight)
    to_mass = -along * weight
    to_features = (to_read @ matrix.mT).addcmul_(to_mass, normaliser[..., None, :])
    to_matrix = features.mT @ to_read
    to_normaliser = (features.mT @ to_mass).squeeze(-1)
    to_queries = _by_token(to_features.mul_(_slope(features)), tokens).to(queries.dtype)
    return to_local, to_queries, to_matrix, to_normaliser, to_gate


def _retrieve(
    queries: Tensor, matrix: Tensor, normaliser: Tensor, readable: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B, S, K, G * N, D], 1 / (features z) [B, S, K, G * N, 1], and A_mem."""
    features = _features(queries, matrix.shape[2])
    weight = _reciprocal(features @ normaliser[..., None])
    torch.unflatten(weight, 3, (-1, queries.shape[2])).masked_fill_(
        ~readable[:, :, None, None, :, None], 0
    )
    return features, weight, (features @ matrix).mul_(weight)


class _Sums(torch.autograd.Function):
    """What each segment adds: sigma(K)^T V and the sum of sigma(K); and the features themselves.

    The features are handed on to what else needs them in the forward; they carry no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, keys: Tensor, values: Tensor, writable: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(keys, values, writable)
        added, mass, features = _sums(keys, values, writable)
        ctx.mark_non_differentiable(features)
        return added, mass, features

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, to_added: Tensor, to_mass: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        return *_sums_backward(to_added, to_mass, *ctx.saved_tensors), None


@fused
def _sums(keys: Tensor, values: Tensor, writable: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = keys.shape[3]
    features = _features(keys, kv_heads, writable)
    return features.mT @ _by_head(values, kv_heads), features.sum(dim=-2), features


@fused
def _sums_backward(
    to_added: Tensor, to_mass: Tensor, keys: Tensor, values: Tensor, writable: Tensor | None
) -> tuple[Tensor, Tensor]:
    tokens, kv_heads = keys.shape[2:4]
    features = _features(keys, kv_heads, writable)
    to_values = _by_token(features @ to_added, tokens).to(values.dtype)
    to_features = (_by_head(values, kv_heads) @ to_added.mT).add_(to_mass[..., None, :])
    return _by_token(to_features.mul_(_slope(features)), tokens).to(keys.dtype), to_values


class _Transition(torch.autograd.Function):
    """I - sigma(K)^T diag(sigma(K) z)^-1 sigma(K) for each segment: [B, S, K, D, D]."""

    @staticmethod
    def forward(
        ctx: Any, keys: Tensor, features: Tensor, divisor: Tensor, writable: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(keys, divisor, writable)
        return _transition(features, divisor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, Tensor, None]:
        to_keys, to_divisor = _transition_backward(slope, *ctx.saved_tensors)
        return to_keys, None, to_divisor, None


@fused
def _transition(features: Tensor, divisor: Tensor) -> Tensor:
    weight = _reciprocal(features @ divisor[..., None])
    transition = (features.mT @ (features * weight)).neg_()
    transition.diagonal(dim1=-2, dim2=-1).add_(1)
    return transition


@fused
def _transition_backward(
    slope: Tensor, keys: Tensor, divisor: Tensor, writable: Tensor | None
) -> tuple[Tensor, Tensor]:
    features = _features(keys, keys.shape[3], writable)
    weight = _reciprocal(features @ divisor[..., None])
    to_features = features @ (slope + slope.mT)
    # A token's weight stands with its feature on both sides, so its own slope is half of that.
    to_mass = (features * to_features).sum(dim=-1, keepdim=True).mul_(weight.square()).div_(2)
    to_features.mul_(-weight).addcmul_(to_mass, divisor[..., None, :])
    to_divisor = (features.mT @ to_mass).squeeze(-1)
    to_keys = _by_token(to_features.mul_(_slope(features)), keys.shape[2]).to(keys.dtype)
    return to_keys, to_divisor


class _Scan(torch.autograd.Function):
    """See `scan`. Here segments come first: [S, B * K, ...]."""

    @staticmethod
    def forward(
        ctx: Any,
        start: Tensor,
        added: Tensor,
        transition: Tensor | None,
        reset: Resets,
        initial: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        lanes, heads = start.shape[:2]
        added = _by_segment(added)
        steps = [None] * len(added) if transition is None else _by_segment(transition).unbind()
        rows = [None if marked is None else marked.repeat_interleave(heads) for marked in reset]
        before, last = torch.empty_like(added), torch.empty_like(added[0])
        if initial is not None:
            starting = any(marked is not None for marked in rows)
            initial = initial.flatten(0, 1) if starting else None
        before[0] = start.flatten(0, 1)
        states = (*before.unbind(), last)
        for index, (step, new, marked) in enumerate(zip(steps, added.unbind(), rows, strict=True)):
            _take(step, _restart(states[index], marked, initial), new, out=states[index + 1])
        ctx.save_for_backward(before, transition, initial)
        ctx.rows, ctx.lanes = rows, lanes
        return _by_lane(before, lanes), last.view(start.shape)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, to_before: Tensor, to_last: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        before, transition, initial = ctx.saved_tensors
        given, rows, lanes = _by_segment(to_before), ctx.rows, ctx.lanes
        steps = [None] * len(rows) if transition is None else _by_segment(transition).mT.unbind()
        to_added, to_start = torch.empty_like(given), torch.empty_like(given[0])
        to_added[-1] = to_last.flatten(0, 1)
        slopes = (to_start, *to_added.unbind())
        for index in reversed(range(len(rows))):
            step, later, marked = steps[index], slopes[index + 1], rows[index]
            if marked is None:
                _take(step, later, given[index], out=slopes[index])
            else:
                through = later if step is None else step @ later
                torch.add(_restart(through, marked), given[index], out=slopes[index])
        to_transition = None
        if transition is not None:
            pairs = zip(before.unbind(), rows, strict=True)
            kept = torch.stack([_restart(x, marked, initial) for x, marked in pairs])
            to_transition = _by_lane(to_added @ kept.mT, lanes)
        to_start = torch.unflatten(to_start, 0, (lanes, -1))
        return to_start, _by_lane(to_added, lanes), to_transition, None, None


def _by_segment(x: Tensor) -> Tensor:
    """x [B, S, K, ...] as [S, B * K, ...]."""
    return x.transpose(0, 1).flatten(1, 2).contiguous()


def _by_lane(x: Tensor, lanes: int) -> Tensor:
    """x [S, B * K, ...] as [B, S, K, ...], a view."""
    return torch.unflatten(x, 1, (lanes, -1)).transpose(0, 1)


def _restart(state: Tensor, rows: Tensor | None, initial: Tensor | None = None) -> Tensor:
    """`state` [R, ...] with `initial`, or 0, in the rows that are marked [R].

    Filled, not multiplied by 0: a document that overflowed must not poison the next one.
    """
    if rows is None:
        return state
    marked = rows.view(-1, *[1] * (state.dim() - 1))
    return state.masked_fill(marked, 0) if initial is None else torch.where(marked, initial, state)


def _take(step: Tensor | None, x: Tensor, new: Tensor, out: Tensor) -> None:
    """out = step x + new."""
    if step is None:
        torch.add(x, new, out=out)
    else:
        torch.baddbmm(new, step, x, out=out)


class Products(NamedTuple):
    """The memory's work on tokens, as PyTorch does it here or as Triton does it in `kernels`."""

    sums: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]
    delta_transition: Callable[[Tensor, Tensor | None, Tensor, Tensor | None], Tensor]
    gated_read: Callable[[Tensor, Tensor, MemoryState, Tensor, Tensor], Tensor]


TORCH = Products(sums, delta_transition, gated_read)
