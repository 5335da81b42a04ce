"""The memory's operations on tokens as Triton kernels: sigma, segment sums, gated retrieval.

Experimental: they have run in the interpreter alone, on no GPU, so `auto` never takes them.

The same results as `infini_grad.py`. Activations are read once in their dtype; sigma exists only in
registers and is recomputed in the backward; sums are float32; only the small states and activations
in the input's dtype are written. Operands of matrix products have the activations' dtype and their
results are float32; M and z are always float32.

Shapes: P segments of all lanes, N tokens per segment, H query heads, K key/value heads, D size of
a head. Query head h reads memory h // (H / K). A program holds the D x D state of one head, so D is
at most `TRITON_MAX_HEAD`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.memories.infini_grad import Products

# Tokens that a program holds at once, and its warps. Compiled for sm_80 and sm_90 with these, a
# program uses at most 83 KiB of shared memory and spills no registers, except the read's backward.
_BLOCK_N = 32
_WARPS = 8
_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def sums(keys: Tensor, values: Tensor, writable: Tensor | None) -> tuple[Tensor, Tensor, None]:
    """`infini_grad.sums`; the features are never written to memory."""
    written = _Write.apply(*_segments(keys, values), _mask(keys, writable))  # type: ignore[no-untyped-call]
    added, key_sum = (torch.unflatten(part, 0, keys.shape[:2]) for part in written)
    return added, key_sum, None


def delta_transition(
    keys: Tensor, features: Tensor | None, divisor: Tensor, writable: Tensor | None
) -> Tensor:
    """`infini_grad.delta_transition`."""
    erased = _Erase.apply(  # type: ignore[no-untyped-call]
        keys.flatten(0, 1), _mask(keys, writable), divisor.flatten(0, 1)
    )
    identity = torch.eye(divisor.shape[-1], device=divisor.device, dtype=divisor.dtype)
    return identity - torch.unflatten(erased, 0, keys.shape[:2])


def gated_read(
    local: Tensor,
    queries: Tensor,
    matrix: Tensor,
    normaliser: Tensor,
    readable: Tensor,
    gate: Tensor,
) -> Tensor:
    """`infini_grad.gated_read`."""
    heads: Tensor = _Read.apply(  # type: ignore[no-untyped-call]
        *_segments(local, queries, matrix, normaliser, readable),
        gate.float().sigmoid(),
    )
    return heads.view(queries.shape)


TRITON = Products(sums, delta_transition, gated_read)


def _segments(*tensors: Tensor) -> list[Tensor]:
    """[B, S, ...] -> [P, ...] each."""
    return [tensor.flatten(0, 1) for tensor in tensors]


def _mask(keys: Tensor, writable: Tensor | None) -> Tensor:
    """[P, N] bool."""
    if writable is None:
        writable = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
    return writable.flatten(0, 1)


class _Write(torch.autograd.Function):
    """sigma(K)^T V and the sum of sigma(K) over the written tokens of each segment."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, writable: Tensor) -> tuple[Tensor, Tensor]:
        """[P, N, K, D], the same, [P, N] -> float32 [P, K, D, D] and [P, K, D]."""
        keys, values, mask = _rows(keys), _rows(values), writable.contiguous().view(torch.uint8)
        segments, _, heads, size = keys.shape
        added = keys.new_empty((segments, heads, size, size), dtype=torch.float32)
        key_sum = keys.new_empty((segments, heads, size), dtype=torch.float32)
        _write_forward[segments, heads](
            *_with_strides(keys, values), mask, added, key_sum, **_constants(keys)
        )
        ctx.save_for_backward(keys, values, mask)
        return added, key_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_added: Tensor, d_key_sum: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of keys and values, in their dtype."""
        keys, values, mask = ctx.saved_tensors
        segments, length, heads, _ = keys.shape
        d_keys, d_values = (torch.empty_like(x, memory_format=_DENSE) for x in (keys, values))
        _write_backward[segments, heads, triton.cdiv(length, _BLOCK_N)](
            *_with_strides(keys, values),
            mask,
            d_added.contiguous(),
            d_key_sum.contiguous(),
            *_with_strides(d_keys, d_values),
            **_constants(keys),
        )
        return d_keys, d_values, None


class _Erase(torch.autograd.Function):
    """sigma(K)^T diag(sigma(K) z)^-1 sigma(K) over the written tokens of each segment."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, writable: Tensor, normaliser: Tensor) -> Tensor:
        """[P, N, K, D], [P, N], float32 [P, K, D] -> float32 [P, K, D, D]."""
        keys, mask = _rows(keys), writable.contiguous().view(torch.uint8)
        normaliser = normaliser.contiguous()
        segments, _, heads, size = keys.shape
        erased = keys.new_empty((segments, heads, size, size), dtype=torch.float32)
        _erase_forward[segments, heads](
            *_with_strides(keys), mask, normaliser, erased, **_constants(keys)
        )
        ctx.save_for_backward(keys, mask, normaliser)
        return erased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_erased: Tensor) -> tuple[Tensor, None, Tensor]:
        """Gradients of the keys, in their dtype, and of the normaliser."""
        keys, mask, normaliser = ctx.saved_tensors
        segments, _, heads, _ = keys.shape
        d_keys = torch.empty_like(keys, memory_format=_DENSE)
        d_normaliser = torch.empty_like(normaliser)
        _erase_backward[segments, heads](
            *_with_strides(keys),
            mask,
            normaliser,
            (d_erased + d_erased.mT).contiguous(),
            *_with_strides(d_keys),
            d_normaliser,
            **_constants(keys),
        )
        return d_keys, None, d_normaliser


class _Read(torch.autograd.Function):
    """(1 - g) local + g sigma(Q) M / (sigma(Q) z)."""

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
        """Activations [P, N, H, D], states [P, K, ...], [P, N], [H] -> [P, N, H, D]."""
        local, queries, mask = _rows(local), _rows(queries), readable.contiguous().view(torch.uint8)
        matrix, normaliser, gate = (x.contiguous() for x in (matrix, normaliser, gate))
        segments, length, heads, _ = queries.shape
        out = torch.empty_like(queries, memory_format=_DENSE)
        group = _scalar(heads // matrix.shape[1])
        _read_forward[segments, heads, triton.cdiv(length, _BLOCK_N)](
            *_with_strides(local, queries),
            matrix,
            normaliser,
            mask,
            gate,
            *_with_strides(out),
            group,
            **_constants(queries),
        )
        ctx.save_for_backward(local, queries, matrix, normaliser, mask, gate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, Tensor]:
        """Gradients of all but the mask, those of activations in their dtype."""
        local, queries, matrix, normaliser, mask, gate = ctx.saved_tensors
        segments, _, heads, _ = queries.shape
        kv_heads = matrix.shape[1]
        d_local, d_queries = (torch.empty_like(x, memory_format=_DENSE) for x in (local, queries))
        d_matrix, d_normaliser = torch.empty_like(matrix), torch.empty_like(normaliser)
        d_gate = gate.new_empty((segments, heads))
        _read_backward[segments, kv_heads](
            *_with_strides(local, queries),
            matrix,
            normaliser,
            mask,
            gate,
            *(d_out.contiguous(), d_local, d_queries),
            d_matrix,
            d_normaliser,
            d_gate,
            _scalar(heads // kv_heads),
            **_constants(queries),
        )
        return d_local, d_queries, d_matrix, d_normaliser, None, d_gate.sum(dim=0)


_DENSE = torch.contiguous_format


def _rows(x: Tensor) -> Tensor:
    """`x` with its last axis contiguous, as it already is in every layout of the model."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _with_strides(*tensors: Tensor) -> list[Any]:
    """Each tensor [P, N, heads, D] followed by its strides of segments, tokens and heads."""
    return [part for x in tensors for part in (x, *x.stride()[:3])]


def _constants(activations: Tensor) -> dict[str, Any]:
    """Sizes and compile-time parameters of a kernel."""
    _, length, _, size = activations.shape
    # tl.dot requires sides of at least 16.
    block_d = max(16, triton.next_power_of_2(size))
    return {
        "N": _scalar(length),
        "D": size,
        "BLOCK_N": _BLOCK_N,
        "BLOCK_D": block_d,
        "OPERAND": _OPERANDS[activations.dtype],
        # The interpreter stores bf16 as raw bits and would multiply those.
        "WIDEN": triton.knobs.runtime.interpret,
        "num_warps": _WARPS,
    }


def _scalar(number: int) -> Any:
    """An argument that a loop's bound depends on.

    Triton 3.6's interpreter cannot make a bound of its own scalars under numpy from 2.5 on.
    """
    return tl.constexpr(number) if triton.knobs.runtime.interpret else number


@triton.jit
def _load(
    base: tl.tensor,
    first: tl.tensor,
    stride: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Tokens first .. of one head as float32 [BLOCK_N, BLOCK_D], 0 beyond the segment's end."""
    rows = first + tl.arange(0, BLOCK_N)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    tile = tl.load(base + rows * stride + columns, mask=(rows < N) & (columns < D), other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _store(
    base: tl.tensor,
    tile: tl.tensor,
    first: tl.tensor,
    stride: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows = first + tl.arange(0, BLOCK_N)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < N) & (columns < D)
    tl.store(base + rows * stride + columns, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _tokens(base: tl.tensor, first: tl.tensor, N: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    """A mask [BLOCK_N] of uint8 as bool."""
    rows = first + tl.arange(0, BLOCK_N)
    return tl.load(base + rows, mask=rows < N, other=0) != 0


@triton.jit
def _state(
    base: tl.tensor,
    row: tl.constexpr,
    column: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
) -> tl.tensor:
    """A float32 matrix with these strides as a product's operand [BLOCK_D, BLOCK_D]."""
    rows = tl.arange(0, BLOCK_D)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < D) & (columns < D)
    return tl.load(base + rows * row + columns * column, mask=inside, other=0.0).to(OPERAND)


@triton.jit
def _store_state(base: tl.tensor, state: tl.tensor, D: tl.constexpr, BLOCK_D: tl.constexpr) -> None:
    rows = tl.arange(0, BLOCK_D)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    tl.store(base + rows * D + columns, state, mask=(rows < D) & (columns < D))


@triton.jit
def _sigma(x: tl.tensor, D: tl.constexpr, BLOCK_D: tl.constexpr) -> tl.tensor:
    """ELU + 1, and 0 in the columns beyond the head; its derivative is min(sigma, 1)."""
    # No result depends on the 0, but without it ptxas spills registers in more kernels.
    features = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    return tl.where(tl.arange(0, BLOCK_D)[None, :] < D, features, 0.0)


@triton.jit
def _reciprocal(x: tl.tensor, allowed: tl.tensor) -> tl.tensor:
    """1 / x, and 0 where x is 0 or masked."""
    some = allowed & (x != 0)
    return tl.where(some, 1 / tl.where(some, x, 1.0), 0.0)


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, OPERAND: tl.constexpr, WIDEN: tl.constexpr) -> tl.tensor:
    """The product of two tiles, rounded to OPERAND before it, in float32."""
    a = a.to(OPERAND)
    b = b.to(OPERAND)
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _write_forward(
    keys: tl.tensor,
    keys_p: tl.tensor,
    keys_n: tl.tensor,
    keys_h: tl.tensor,
    values: tl.tensor,
    values_p: tl.tensor,
    values_n: tl.tensor,
    values_h: tl.tensor,
    writable: tl.tensor,
    added: tl.tensor,
    key_sum: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    segment, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    keys += segment * keys_p + head * keys_h
    values += segment * values_p + head * values_h
    product = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, N, BLOCK_N):
        written = _tokens(writable + segment * N, first, N, BLOCK_N)
        k = _sigma(_load(keys, first, keys_n, N, D, BLOCK_N, BLOCK_D), D, BLOCK_D)
        k = tl.where(written[:, None], k, 0.0)
        v = _load(values, first, values_n, N, D, BLOCK_N, BLOCK_D)
        product += _dot(tl.trans(k), v, OPERAND, WIDEN)
        total += tl.sum(k, axis=0)
    place = segment * tl.num_programs(1) + head
    _store_state(added + place * D * D, product, D, BLOCK_D)
    columns = tl.arange(0, BLOCK_D)
    tl.store(key_sum + place * D + columns, total, mask=columns < D)


@triton.jit
def _write_backward(
    keys: tl.tensor,
    keys_p: tl.tensor,
    keys_n: tl.tensor,
    keys_h: tl.tensor,
    values: tl.tensor,
    values_p: tl.tensor,
    values_n: tl.tensor,
    values_h: tl.tensor,
    writable: tl.tensor,
    d_added: tl.tensor,
    d_key_sum: tl.tensor,
    d_keys: tl.tensor,
    d_keys_p: tl.tensor,
    d_keys_n: tl.tensor,
    d_keys_h: tl.tensor,
    d_values: tl.tensor,
    d_values_p: tl.tensor,
    d_values_n: tl.tensor,
    d_values_h: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    segment, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.program_id(2) * BLOCK_N
    place = segment * tl.num_programs(1) + head
    columns = tl.arange(0, BLOCK_D)
    d_a = _state(d_added + place * D * D, D, 1, D, BLOCK_D, OPERAND)
    # Read once more, transposed: transposing a float32 state takes twice its shared memory.
    d_a_turned = _state(d_added + place * D * D, 1, D, D, BLOCK_D, OPERAND)
    d_total = tl.load(d_key_sum + place * D + columns, mask=columns < D, other=0.0)
    written = _tokens(writable + segment * N, first, N, BLOCK_N)[:, None]
    keys += segment * keys_p + head * keys_h
    k = _sigma(_load(keys, first, keys_n, N, D, BLOCK_N, BLOCK_D), D, BLOCK_D)
    k = tl.where(written, k, 0.0)
    values += segment * values_p + head * values_h
    v = _load(values, first, values_n, N, D, BLOCK_N, BLOCK_D)
    d_v = _dot(k, d_a, OPERAND, WIDEN)
    # sigma is 0 in tokens that are not written, and so is its derivative.
    d_k = (_dot(v, d_a_turned, OPERAND, WIDEN) + d_total[None, :]) * tl.minimum(k, 1.0)
    d_keys += segment * d_keys_p + head * d_keys_h
    _store(d_keys, d_k, first, d_keys_n, N, D, BLOCK_N, BLOCK_D)
    d_values += segment * d_values_p + head * d_values_h
    _store(d_values, d_v, first, d_values_n, N, D, BLOCK_N, BLOCK_D)


@triton.jit
def _erase_forward(
    keys: tl.tensor,
    keys_p: tl.tensor,
    keys_n: tl.tensor,
    keys_h: tl.tensor,
    writable: tl.tensor,
    normaliser: tl.tensor,
    erased: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    segment, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = segment * tl.num_programs(1) + head
    columns = tl.arange(0, BLOCK_D)
    z = tl.load(normaliser + place * D + columns, mask=columns < D, other=0.0)
    keys += segment * keys_p + head * keys_h
    product = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    for first in range(0, N, BLOCK_N):
        written = _tokens(writable + segment * N, first, N, BLOCK_N)
        k = _sigma(_load(keys, first, keys_n, N, D, BLOCK_N, BLOCK_D), D, BLOCK_D)
        weight = _reciprocal(tl.sum(k * z[None, :], axis=1), written)
        # Features and z are positive. The square root of the weight on either side keeps the
        # product symmetric and its eigenvalues non-negative, however the operands are rounded.
        half = k * tl.sqrt(weight)[:, None]
        product += _dot(tl.trans(half), half, OPERAND, WIDEN)
    _store_state(erased + place * D * D, product, D, BLOCK_D)


@triton.jit
def _erase_backward(
    keys: tl.tensor,
    keys_p: tl.tensor,
    keys_n: tl.tensor,
    keys_h: tl.tensor,
    writable: tl.tensor,
    normaliser: tl.tensor,
    d_both: tl.tensor,
    d_keys: tl.tensor,
    d_keys_p: tl.tensor,
    d_keys_n: tl.tensor,
    d_keys_h: tl.tensor,
    d_normaliser: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """d_both is the result's gradient plus its transpose."""
    segment, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = segment * tl.num_programs(1) + head
    columns = tl.arange(0, BLOCK_D)
    z = tl.load(normaliser + place * D + columns, mask=columns < D, other=0.0)
    d_e = _state(d_both + place * D * D, D, 1, D, BLOCK_D, OPERAND)
    keys += segment * keys_p + head * keys_h
    d_keys += segment * d_keys_p + head * d_keys_h
    d_z = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, N, BLOCK_N):
        written = _tokens(writable + segment * N, first, N, BLOCK_N)
        k = _sigma(_load(keys, first, keys_n, N, D, BLOCK_N, BLOCK_D), D, BLOCK_D)
        weight = _reciprocal(tl.sum(k * z[None, :], axis=1), written)
        through = _dot(k, d_e, OPERAND, WIDEN)
        # weight = 1 / (k z), whose own gradient is k^T dE k.
        d_denominator = -weight * weight * 0.5 * tl.sum(k * through, axis=1)
        d_k = through * weight[:, None] + d_denominator[:, None] * z[None, :]
        d_k *= tl.minimum(k, 1.0)
        d_z += tl.sum(k * d_denominator[:, None], axis=0)
        _store(d_keys, d_k, first, d_keys_n, N, D, BLOCK_N, BLOCK_D)
    tl.store(d_normaliser + place * D + columns, d_z, mask=columns < D)


@triton.jit
def _retrieve(
    queries: tl.tensor,
    readable: tl.tensor,
    m: tl.tensor,
    z: tl.tensor,
    first: tl.tensor,
    stride: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """For a head's tokens from `first` on: sigma(Q), 1 / (sigma(Q) z), and the retrieved values."""
    q = _sigma(_load(queries, first, stride, N, D, BLOCK_N, BLOCK_D), D, BLOCK_D)
    seen = _tokens(readable, first, N, BLOCK_N)
    weight = _reciprocal(tl.sum(q * z[None, :], axis=1), seen)[:, None]
    return q, weight, tl.where(weight != 0, _dot(q, m, OPERAND, WIDEN) * weight, 0.0)


@triton.jit
def _read_forward(
    local: tl.tensor,
    local_p: tl.tensor,
    local_n: tl.tensor,
    local_h: tl.tensor,
    queries: tl.tensor,
    queries_p: tl.tensor,
    queries_n: tl.tensor,
    queries_h: tl.tensor,
    matrix: tl.tensor,
    normaliser: tl.tensor,
    readable: tl.tensor,
    gate: tl.tensor,
    out: tl.tensor,
    out_p: tl.tensor,
    out_n: tl.tensor,
    out_h: tl.tensor,
    group: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    segment, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.program_id(2) * BLOCK_N
    place = segment * (tl.num_programs(1) // group) + head // group
    columns = tl.arange(0, BLOCK_D)
    m = _state(matrix + place * D * D, D, 1, D, BLOCK_D, OPERAND)
    z = tl.load(normaliser + place * D + columns, mask=columns < D, other=0.0)
    queries += segment * queries_p + head * queries_h
    seen = readable + segment * N
    _, _, retrieved = _retrieve(
        queries, seen, m, z, first, queries_n, N, D, BLOCK_N, BLOCK_D, OPERAND, WIDEN
    )
    local += segment * local_p + head * local_h
    near = _load(local, first, local_n, N, D, BLOCK_N, BLOCK_D)
    mixed = near + tl.load(gate + head) * (retrieved - near)
    out += segment * out_p + head * out_h
    _store(out, mixed, first, out_n, N, D, BLOCK_N, BLOCK_D)


@triton.jit
def _read_backward(
    local: tl.tensor,
    local_p: tl.tensor,
    local_n: tl.tensor,
    local_h: tl.tensor,
    queries: tl.tensor,
    queries_p: tl.tensor,
    queries_n: tl.tensor,
    queries_h: tl.tensor,
    matrix: tl.tensor,
    normaliser: tl.tensor,
    readable: tl.tensor,
    gate: tl.tensor,
    d_out: tl.tensor,
    d_local: tl.tensor,
    d_queries: tl.tensor,
    d_matrix: tl.tensor,
    d_normaliser: tl.tensor,
    d_gate: tl.tensor,
    group: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    segment, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = segment * tl.num_programs(1) + kv_head
    columns = tl.arange(0, BLOCK_D)
    m = _state(matrix + place * D * D, D, 1, D, BLOCK_D, OPERAND)
    z = tl.load(normaliser + place * D + columns, mask=columns < D, other=0.0)
    d_m, d_z = tl.zeros((BLOCK_D, BLOCK_D), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    heads, seen = tl.num_programs(1) * group, readable + segment * N
    row = heads * D  # between tokens of gradients, which are contiguous
    for member in range(0, group):
        head = kv_head * group + member
        dense = segment * N * row + head * D
        g, d_g = tl.load(gate + head), tl.zeros((BLOCK_N,), tl.float32)
        for first in range(0, N, BLOCK_N):
            base = queries + segment * queries_p + head * queries_h
            q, weight, retrieved = _retrieve(
                base, seen, m, z, first, queries_n, N, D, BLOCK_N, BLOCK_D, OPERAND, WIDEN
            )
            d_o = _load(d_out + dense, first, row, N, D, BLOCK_N, BLOCK_D)
            base = local + segment * local_p + head * local_h
            near = _load(base, first, local_n, N, D, BLOCK_N, BLOCK_D)
            d_g += tl.sum(d_o * (retrieved - near), axis=1)
            _store(d_local + dense, (1 - g) * d_o, first, row, N, D, BLOCK_N, BLOCK_D)
            d_product = g * d_o * weight
            d_denominator = -weight * tl.sum(g * d_o * retrieved, axis=1)[:, None]
            d_q = _dot(d_product, tl.trans(m), OPERAND, WIDEN) + d_denominator * z[None, :]
            d_q = tl.where(weight != 0, d_q * tl.minimum(q, 1.0), 0.0)
            _store(d_queries + dense, d_q, first, row, N, D, BLOCK_N, BLOCK_D)
            d_m += _dot(tl.trans(q), d_product, OPERAND, WIDEN)
            d_z += tl.sum(q * d_denominator, axis=0)
        tl.store(d_gate + segment * heads + head, tl.sum(d_g, axis=0))
    _store_state(d_matrix + place * D * D, d_m, D, BLOCK_D)
    tl.store(d_normaliser + place * D + columns, d_z, mask=columns < D)
