"""The nearest keys of a store by exact dot product, and attention to them.

Shapes: n tokens, H query heads, K key/value heads, D size of a head, R rows of a store, k
neighbours. Query head h reads key/value head h // (H / K).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SCORES = {"cpu": 2**21, "cuda": 2**27}
"""Products of queries and keys that are held at once, by device: about what a CPU caches, or what
occupies a GPU."""

_BLOCK = 4
"""Scores of a block, see `_largest`; 8 takes a tenth longer, 16 half as long again."""


class Found(NamedTuple):
    """The neighbours of queries, in no order."""

    scores: Tensor
    """[..., H, k] dot products in float32 or better; -inf where there are fewer than k."""
    rows: Tensor
    """[..., H, k] int64, rows of the store."""


@torch.no_grad()
def nearest(queries: Tensor, keys: Tensor, count: int, visible: Tensor | None = None) -> Found:
    """The `count` nearest of keys [R, K, D] to each of the queries [n, H, D]; exact.

    visible [R] bool: rows that may be found; None: all. Only a bounded number of products is held
    at a time. What is computed depends on shapes alone, so that it can be replayed as a CUDA graph.
    """
    by_head = keys.permute(1, 2, 0)
    if not _multiplies_halves(keys):
        by_head = by_head.to(torch.promote_types(torch.float32, keys.dtype))
    hidden = None if visible is None else ~visible
    at_once = max(1, SCORES.get(keys.device.type, 2**21) // (queries.shape[1] * len(keys)))
    parts = [_nearest(some, by_head, count, hidden) for some in torch.split(queries, at_once)]
    return parts[0] if len(parts) == 1 else Found(*map(torch.cat, zip(*parts, strict=True)))


def _nearest(queries: Tensor, keys: Tensor, count: int, hidden: Tensor | None) -> Found:
    """The neighbours of queries [n, H, D] among keys [K, D, R]."""
    tokens = len(queries)
    grouped = torch.unflatten(queries, 1, (len(keys), -1)).transpose(0, 1)  # [K, n, H / K, D]
    scores = _products(grouped.flatten(1, 2), keys)
    if hidden is not None:
        scores.masked_fill_(hidden, -math.inf)
    values, rows = (
        torch.unflatten(part, 1, (tokens, -1)).transpose(0, 1).flatten(1, 2)
        for part in _largest(scores, min(count, scores.shape[-1]))
    )
    missing = count - rows.shape[-1]
    return Found(F.pad(values, (0, missing), value=-math.inf), F.pad(rows, (0, missing)))


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """queries [K, M, D], keys [K, D, R] -> [K, M, R] in float32 or better.

    In 16 bits many products would be equal, and which of them are the largest would be chance.
    """
    if _multiplies_halves(keys):
        return torch.bmm(queries, keys, out_dtype=torch.float32)
    return torch.bmm(queries.to(keys.dtype), keys)


def _multiplies_halves(keys: Tensor) -> bool:
    """Whether products of 16 bits can be summed and returned in float32."""
    return keys.is_cuda and keys.dtype in (torch.bfloat16, torch.float16)


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest scores of each row of [K, M, R], and their places; exact.

    They lie in the `count` blocks with the largest maxima: any other block has at least `count`
    scores above its own or equal to them. So most scores are read only for their block's maximum,
    twice as fast on a CPU as topk alone.
    """
    size = scores.shape[-1]
    blocks = size // _BLOCK
    if blocks < 4 * count:
        values, places = scores.topk(count, sorted=False)
        return values, places
    # A block is every `blocks`-th score, so that the maxima of neighbours are taken at once.
    in_blocks = torch.unflatten(scores[..., : _BLOCK * blocks], -1, (_BLOCK, blocks))
    _, best = _largest(in_blocks.amax(dim=-2), count)
    offsets = blocks * torch.arange(_BLOCK, device=scores.device)[:, None]
    members = (best[..., None, :] + offsets).flatten(-2)
    rest = torch.arange(_BLOCK * blocks, size, device=scores.device)
    candidates = torch.cat((members, rest.expand(*members.shape[:-1], -1)), dim=-1)
    values, chosen = scores.gather(-1, candidates).topk(count, sorted=False)
    return values, candidates.gather(-1, chosen)


def attend_to_found(
    queries: Tensor, scale: Tensor, found: Found, keys: Tensor, values: Tensor
) -> Tensor:
    """Softmax attention of queries [B, ..., H, D] to their neighbours: the same shape.

    scale [H] multiplies the scores; found: rows of each lane's keys and values [B, R, K, D], which
    are constants. Scores have a gradient for the queries.
    """
    rows = _flat_rows(found.rows, keys)
    missing = found.scores == -math.inf
    scores = _Scores.apply(  # type: ignore[no-untyped-call]
        queries.flatten(0, -2),
        found.scores.masked_fill(missing, 0.0).flatten(0, -2),
        rows,
        keys.flatten(0, 2),
    ).view(found.scores.shape)
    logits = scores * scale.to(scores.dtype)[:, None]
    logits = logits.masked_fill(missing, torch.finfo(logits.dtype).min)
    shares = logits.softmax(dim=-1).to(values.dtype)
    heads = F.embedding_bag(
        rows, values.flatten(0, 2), per_sample_weights=shares.flatten(0, -2), mode="sum"
    )
    return heads.view(queries.shape)


def _flat_rows(rows: Tensor, keys: Tensor) -> Tensor:
    """Rows [B, ..., H, k] of keys [B, R, K, D] as rows of the flattened keys: [B * ... * H, k]."""
    lanes, size, kv_heads = keys.shape[:3]
    heads = rows.shape[-2]
    of_head = torch.arange(heads, device=rows.device) // (heads // kv_heads)
    of_lane = torch.arange(lanes, device=rows.device).view(-1, *[1] * (rows.ndim - 1)) * size
    return ((rows + of_lane) * kv_heads + of_head[:, None]).flatten(0, -2)


class _Scores(torch.autograd.Function):
    """The dot products, known from the search, of queries [Q, D] and their rows [Q, k] of keys."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, scores: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
        ctx.save_for_backward(rows, keys)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor, None, None, None]:
        rows, keys = ctx.saved_tensors
        d_queries = F.embedding_bag(
            rows, keys, per_sample_weights=d_scores.to(keys.dtype), mode="sum"
        )
        return d_queries, None, None, None
