"""Causal softmax attention inside segments and documents (equation 4), by SDPA or flash-attn.

A *kernel* takes the document starts, once per forward, and returns the function that every layer
then calls. Shapes: P segments of all lanes, N tokens per segment, H query heads, K key/value
heads, D size of a head. Query head h reads key/value head h // (H / K).
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

_log = logging.getLogger(__name__)

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries [P, N, H, D], keys [P, N, K, D], values [P, N, K, D]) -> [P, N, H, D]."""

Kernel: TypeAlias = Callable[[Tensor], Attend]
"""starts [P, N] bool, True at the first token of each document -> the attention for this layout."""


class KernelError(ValueError):
    """A requested kernel cannot run here."""


@functools.cache
def choose(
    setting: Literal["auto", "flash", "sdpa"], device_type: str, dtype: torch.dtype
) -> Kernel:
    """The kernel that `model.local_attention` names; `auto` logs its choice once.

    Raises KernelError if flash-attn is requested and cannot run.
    """
    if setting == "sdpa":
        return sdpa
    obstacle = _flash_obstacle(device_type, dtype)
    if setting == "flash" and obstacle:
        raise KernelError(
            f"model.local_attention: flash was requested, but {obstacle}; "
            "set it to sdpa, or to auto, which uses flash-attn if it can run"
        )
    if setting == "auto":
        _log.info("local attention: %s", f"SDPA ({obstacle})" if obstacle else "flash-attn")
    return sdpa if obstacle else flash


def _flash_obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    """Why flash-attn cannot run here; None if it can."""
    if device_type != "cuda":
        return f"flash-attn needs a CUDA GPU and the model is on {device_type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn computes in bf16 or fp16 and the model is in {dtype}"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"flash-attn needs an Ampere GPU or later, found {torch.cuda.get_device_name()}"
    try:
        importlib.import_module("flash_attn")
    except ImportError as error:
        return f"flash_attn cannot be imported ({error}); install the extra `gpu`"
    return None


def sdpa(starts: Tensor) -> Attend:
    """PyTorch's attention: causal in segments of one document, masked in those with a boundary."""
    # A document that starts at a segment's first token does not divide the segment.
    divided = starts[:, 1:].any(dim=1)
    cut = divided.nonzero().squeeze(1)
    if len(cut) == 0:
        return _causal
    mask = same_document_mask(starts[cut])
    if len(cut) == len(starts):
        return functools.partial(_masked, mask=mask)
    whole = (~divided).nonzero().squeeze(1)
    order = torch.cat((whole, cut)).argsort()

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        causal = _causal(queries[whole], keys[whole], values[whole])
        masked = _masked(queries[cut], keys[cut], values[cut], mask)
        return torch.cat((causal, masked))[order]

    return attend


def same_document_mask(starts: Tensor) -> Tensor:
    """[P, N] starts -> [P, 1, N, N]: may query token i (second to last axis) see key token j?"""
    document = starts.cumsum(dim=1)
    same = document[:, :, None] == document[:, None, :]
    return same.tril()[:, None]


def _causal(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return _scaled_dot_product(queries, keys, values, is_causal=True)


def _masked(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return _scaled_dot_product(queries, keys, values, attn_mask=mask)


def _scaled_dot_product(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    attended = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=attn_mask,
        is_causal=is_causal,
        enable_gqa=True,
    )
    return attended.transpose(1, 2)


def attend_to_visible(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Attention of a segment's last n tokens to the segment so far, for streaming.

    queries [B, n, H, D]; keys, values [B, N, K, D]; visible [n, N] bool -> [B, n, H, D].
    """
    return _masked(queries, keys, values, visible)


def sequence_offsets(starts: Tensor) -> Tensor:
    """Boundaries of the runs of tokens that attend only to each other: flash-attn's `cu_seqlens`.

    starts [P, N] -> int32 [runs + 1] offsets into the P * N tokens laid end to end: 0, each
    segment's end and each document's start inside a segment.
    """
    cuts = starts.clone()
    cuts[:, 0] = True
    first = cuts.flatten().nonzero().squeeze(1)
    return F.pad(first, (0, 1), value=cuts.numel()).to(torch.int32)


def flash(starts: Tensor) -> Attend:
    """flash-attn: each document's part of a segment is one sequence of variable length."""
    from flash_attn import flash_attn_varlen_func

    offsets = sequence_offsets(starts)
    longest = starts.shape[1]

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attended: Tensor = flash_attn_varlen_func(
            queries.flatten(0, 1),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            cu_seqlens_q=offsets,
            cu_seqlens_k=offsets,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
        )
        return attended.view(queries.shape)

    return attend
