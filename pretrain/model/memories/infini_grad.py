"""The memory's products over segments (equations 7 to 9), with gradients written by hand.

The forward saves only the outputs of the projections and the small states at segment starts; the
backward recomputes the features sigma of queries and keys. So no further tensor grows with the
window.

Shapes: B lanes, S segments, N tokens per segment, H query heads, K key/value heads, each with a
memory, G = H / K query heads that share it, D size of a head. Features, states and sums are
float32 (float64 in a float64 model): fp16 overflows, and sums in bf16 stop growing after some
hundred segments. `d_x` is the gradient of the loss with respect to x. With `operand`, a dtype of
less precision, the operands of the large products are rounded to it; their sums stay float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.compiling import fused
from pretrain.model.window import Resets


def gated_read(
    local: Tensor,
    queries: Tensor,
    matrix: Tensor,
    normaliser: Tensor,
    readable: Tensor,
    gate: Tensor,
    operand: torch.dtype | None = None,
) -> Tensor:
    """Equations 7 and 10: g A_mem + (1 - g) A_local, with A_mem = sigma(Q) M / (sigma(Q) z).

    local, queries: [B, S, N, H, D], the local attention and the queries without positions; matrix,
    normaliser: M [B, S, K, D, D] and z [B, S, K, D] before each segment; readable: [B, S, N] bool;
    gate: [H], beta, where g is sigmoid(beta). A_mem is 0 where the memory is empty or may not be
    read. Returns [B, S, N, H, D].
    """
    mixed: Tensor = _GatedRead.apply(  # type: ignore[no-untyped-call]
        local, queries, matrix, normaliser, readable, gate, operand
    )
    return mixed


def sums(
    keys: Tensor, values: Tensor, writable: Tensor | None, operand: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What each segment adds to M [B, S, K, D, D] and z [B, S, K, D], and sigma(K).

    The features [B, S, K, N, D] are for `delta_transition`, which computes its own gradient.
    """
    added, key_sum, features = _Sums.apply(keys, values, writable, operand)  # type: ignore[no-untyped-call]
    return added, key_sum, features


def delta_transition(
    keys: Tensor,
    features: Tensor | None,
    divisor: Tensor,
    writable: Tensor | None,
    operand: torch.dtype | None = None,
) -> Tensor:
    """I - sigma(K)^T diag(sigma(K) z)^-1 sigma(K) for each segment: [B, S, K, D, D].

    features: sigma(keys), as returned by `sums`; divisor: z.
    """
    transition: Tensor = _Transition.apply(  # type: ignore[no-untyped-call]
        keys, features, divisor, writable, operand
    )
    return transition


def scan(
    start: Tensor,
    added: Tensor,
    reset: Resets,
    transition: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x_s = T_s x_{s-1} + added_s; returns x before each segment, and the last x.

    At a reset, x_{s-1} is replaced by `initial`. start: [B, K, ...]; added: [B, S, K, ...];
    transition: [B, S, K, D, D], None for the identity; initial: shape of start, None for 0,
    without a gradient. The steps are small (no token axis), so they run sequentially; differences
    of prefix sums would lose the digits of a new document next to an old one's.
    """
    before, last = _Scan.apply(start, added, transition, reset, initial)  # type: ignore[no-untyped-call]
    return before, last


def sigma(x: Tensor) -> Tensor:
    """The feature map ELU + 1, in the memory's precision, positive wherever exp(x) is.

    Written with exp, which is far faster than ELU's expm1 and keeps values that 1 + expm1(x) would
    round to 0.
    """
    x = x.to(_precise(x))
    return x.clamp(max=0).exp_().add_(x.clamp(min=0))


def _product(a: Tensor, b: Tensor, operand: torch.dtype | None) -> Tensor:
    """a b, [..., n, k] times [..., k, m], in their dtype, with operands rounded to `operand`."""
    if operand is None:
        return a @ b
    a, b, batch = a.to(operand), b.to(operand), a.shape[:-2]
    if not a.is_cuda:  # such a product on a CPU has sums of the operands' dtype
        return a.float() @ b.float()
    product = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return torch.unflatten(product, 0, batch)


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


def _derivative(features: Tensor) -> Tensor:
    """The derivative of sigma from its value, in place: 1 for x > 0, sigma below."""
    return features.clamp_(max=1)


def _reciprocal(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0."""
    return x.reciprocal().masked_fill_(x == 0, 0)


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
        operand: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(local, queries, matrix, normaliser, readable, gate)
        ctx.operand = operand
        return _mixed(local, queries, matrix, normaliser, readable, gate, operand)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mixed: Tensor) -> tuple[Tensor | None, ...]:
        d_local, d_queries, d_matrix, d_normaliser, d_gate = _mixed_backward(
            *(d_mixed, *ctx.saved_tensors, ctx.operand)
        )
        return d_local, d_queries, d_matrix, d_normaliser, None, d_gate, None


@fused
def _mixed(
    local: Tensor,
    queries: Tensor,
    matrix: Tensor,
    normaliser: Tensor,
    readable: Tensor,
    gate: Tensor,
    operand: torch.dtype | None,
) -> Tensor:
    _, _, retrieved = _retrieve(queries, matrix, normaliser, readable, operand)
    share = gate.to(retrieved.dtype).sigmoid()[:, None]
    mixed = torch.empty(queries.shape, dtype=retrieved.dtype, device=queries.device)
    by_token = _by_token(retrieved, queries.shape[2])
    torch.lerp(local.to(retrieved.dtype), by_token, share, out=mixed)
    return mixed.to(local.dtype)


@fused
def _mixed_backward(
    d_mixed: Tensor,
    local: Tensor,
    queries: Tensor,
    matrix: Tensor,
    normaliser: Tensor,
    readable: Tensor,
    gate: Tensor,
    operand: torch.dtype | None,
) -> tuple[Tensor, ...]:
    """The gradients of local, queries, matrix, normaliser and gate."""
    kv_heads, tokens = matrix.shape[2], queries.shape[2]
    features, weight, retrieved = _retrieve(queries, matrix, normaliser, readable, operand)
    share = gate.to(retrieved.dtype).sigmoid()
    d_read = _by_head(d_mixed, kv_heads)
    along = (d_read * retrieved).sum(dim=-1, keepdim=True)
    by_head = torch.unflatten(along, 3, (-1, tokens)).sum(dim=(0, 1, 4, 5)).flatten()
    d_mixed = d_mixed.to(retrieved.dtype)
    d_share = by_head - (d_mixed * local).sum(dim=(0, 1, 2, 4))
    d_gate = (d_share * share * (1 - share)).to(gate.dtype)
    d_local = (d_mixed * (1 - share)[:, None]).to(local.dtype)
    weight = torch.unflatten(weight, 3, (-1, tokens))
    weight = (weight * share.view(kv_heads, -1, 1, 1)).flatten(3, 4)
    d_read.mul_(weight)
    d_denominator = -along * weight
    d_features = _product(d_read, matrix.mT, operand)
    d_features.addcmul_(d_denominator, normaliser[..., None, :])
    d_matrix = _product(features.mT, d_read, operand)
    d_normaliser = (features.mT @ d_denominator).squeeze(-1)
    d_queries = _by_token(d_features.mul_(_derivative(features)), tokens).to(queries.dtype)
    return d_local, d_queries, d_matrix, d_normaliser, d_gate


def _retrieve(
    queries: Tensor,
    matrix: Tensor,
    normaliser: Tensor,
    readable: Tensor,
    operand: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B, S, K, G * N, D], 1 / (features z) [B, S, K, G * N, 1], and A_mem."""
    features = _features(queries, matrix.shape[2])
    weight = _reciprocal(features @ normaliser[..., None])
    torch.unflatten(weight, 3, (-1, queries.shape[2])).masked_fill_(
        ~readable[:, :, None, None, :, None], 0
    )
    return features, weight, _product(features, matrix, operand).mul_(weight)


class _Sums(torch.autograd.Function):
    """What each segment adds: sigma(K)^T V and the sum of sigma(K); and the features themselves.

    The features are returned for other uses in the forward; they have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        keys: Tensor,
        values: Tensor,
        writable: Tensor | None,
        operand: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(keys, values, writable)
        ctx.operand = operand
        added, key_sum, features = _sums(keys, values, writable, operand)
        ctx.mark_non_differentiable(features)
        return added, key_sum, features

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_added: Tensor, d_key_sum: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        d_keys, d_values = _sums_backward(*(d_added, d_key_sum, *ctx.saved_tensors, ctx.operand))
        return d_keys, d_values, None, None


@fused
def _sums(
    keys: Tensor, values: Tensor, writable: Tensor | None, operand: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = keys.shape[3]
    features = _features(keys, kv_heads, writable)
    added = _product(features.mT, _by_head(values, kv_heads), operand)
    return added, features.sum(dim=-2), features


@fused
def _sums_backward(
    d_added: Tensor,
    d_key_sum: Tensor,
    keys: Tensor,
    values: Tensor,
    writable: Tensor | None,
    operand: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    tokens, kv_heads = keys.shape[2:4]
    features = _features(keys, kv_heads, writable)
    d_values = _by_token(_product(features, d_added, operand), tokens).to(values.dtype)
    d_features = _product(_by_head(values, kv_heads), d_added.mT, operand)
    d_features.add_(d_key_sum[..., None, :])
    return _by_token(d_features.mul_(_derivative(features)), tokens).to(keys.dtype), d_values


class _Transition(torch.autograd.Function):
    """I - sigma(K)^T diag(sigma(K) z)^-1 sigma(K) for each segment: [B, S, K, D, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        keys: Tensor,
        features: Tensor,
        divisor: Tensor,
        writable: Tensor | None,
        operand: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(keys, divisor, writable)
        ctx.operand = operand
        return _transition(features, divisor, operand)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_transition: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        d_keys, d_divisor = _transition_backward(*(d_transition, *ctx.saved_tensors, ctx.operand))
        return d_keys, None, d_divisor, None, None


@fused
def _transition(features: Tensor, divisor: Tensor, operand: torch.dtype | None) -> Tensor:
    weight = _reciprocal(features @ divisor[..., None])
    transition = _product(features.mT, features * weight, operand).neg_()
    transition.diagonal(dim1=-2, dim2=-1).add_(1)
    return transition


@fused
def _transition_backward(
    d_transition: Tensor,
    keys: Tensor,
    divisor: Tensor,
    writable: Tensor | None,
    operand: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    features = _features(keys, keys.shape[3], writable)
    weight = _reciprocal(features @ divisor[..., None])
    d_features = _product(features, d_transition + d_transition.mT, operand)
    # f (G + G^T) f is twice the gradient of a token's weight, f G f.
    d_denominator = (features * d_features).sum(dim=-1, keepdim=True).mul_(weight.square()).div_(2)
    d_features.mul_(-weight).addcmul_(d_denominator, divisor[..., None, :])
    d_divisor = (features.mT @ d_denominator).squeeze(-1)
    d_keys = _by_token(d_features.mul_(_derivative(features)), keys.shape[2]).to(keys.dtype)
    return d_keys, d_divisor


class _Scan(torch.autograd.Function):
    """See `scan`. Here the segment axis is first: [S, B * K, ...]."""

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
            _take(step, restarted(states[index], marked, initial), new, out=states[index + 1])
        ctx.save_for_backward(before, transition, initial)
        ctx.rows, ctx.lanes = rows, lanes
        return _by_lane(before, lanes), last.view(start.shape)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_before: Tensor, d_last: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        before, transition, initial = ctx.saved_tensors
        given, rows, lanes = _by_segment(d_before), ctx.rows, ctx.lanes
        steps = [None] * len(rows) if transition is None else _by_segment(transition).mT.unbind()
        d_added, d_start = torch.empty_like(given), torch.empty_like(given[0])
        d_added[-1] = d_last.flatten(0, 1)
        gradients = (d_start, *d_added.unbind())
        for index in reversed(range(len(rows))):
            step, later, marked = steps[index], gradients[index + 1], rows[index]
            if marked is None:
                _take(step, later, given[index], out=gradients[index])
            else:
                through = later if step is None else step @ later
                torch.add(restarted(through, marked), given[index], out=gradients[index])
        d_transition = None
        if transition is not None:
            pairs = zip(before.unbind(), rows, strict=True)
            kept = torch.stack([restarted(x, marked, initial) for x, marked in pairs])
            d_transition = _by_lane(d_added @ kept.mT, lanes)
        d_start = torch.unflatten(d_start, 0, (lanes, -1))
        return d_start, _by_lane(d_added, lanes), d_transition, None, None


def _by_segment(x: Tensor) -> Tensor:
    """x [B, S, K, ...] as [S, B * K, ...]."""
    return x.transpose(0, 1).flatten(1, 2).contiguous()


def _by_lane(x: Tensor, lanes: int) -> Tensor:
    """x [S, B * K, ...] as [B, S, K, ...], a view."""
    return torch.unflatten(x, 1, (lanes, -1)).transpose(0, 1)


def restarted(state: Tensor, rows: Tensor | None, initial: Tensor | None = None) -> Tensor:
    """`state` [R, ...] with `initial`, or 0, in the rows marked by `rows` [R] bool.

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
    """The memory's operations on tokens: PyTorch's, here, or Triton's, in `infini_triton`."""

    sums: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]
    delta_transition: Callable[[Tensor, Tensor | None, Tensor, Tensor | None], Tensor]
    gated_read: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


TORCH = Products(sums, delta_transition, gated_read)
MIXED = Products(
    functools.partial(sums, operand=torch.bfloat16),
    functools.partial(delta_transition, operand=torch.bfloat16),
    functools.partial(gated_read, operand=torch.bfloat16),
)
"""The same with bf16 operands."""
