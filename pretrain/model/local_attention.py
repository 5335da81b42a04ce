"""Causal softmax attention inside segments and documents (equation 4), by SDPA or flash-attn.

A *kernel* takes the document starts, once per forward, and returns the function that every layer
then calls. Some memories put R slots of earlier segments before a segment's own keys and values:
the kernel then also takes which of them are seen. Shapes: P segments of all lanes, N tokens per
segment, H query heads, K key/value heads, D size of a head. Query head h reads key/value head
h // (H / K).
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

_log = logging.getLogger(__name__)

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries [P, N, H, D], keys [P, R + N, K, D], values [P, R + N, K, D]) -> [P, N, H, D]; R is 0
without slots of the past."""


class Past(NamedTuple):
    """Slots of earlier segments, before a segment's own tokens."""

    slots: Tensor
    """[P, R] bool: those that hold something of the document that is open before the segment."""
    readers: Tensor
    """[P, N] bool: the tokens that see them."""


class Kernel(Protocol):
    """The attention for a layout."""

    def __call__(self, starts: Tensor, past: Past | None = None) -> Attend:
        """starts [P, N] bool, True at the first token of each document."""


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


def sdpa(starts: Tensor, past: Past | None = None) -> Attend:
    """PyTorch's attention: causal in segments of one document, masked in those with a boundary.

    Slots of the past always need a mask, one for all segments where every token sees all of them.
    """
    # A document that starts at a segment's first token does not divide the segment.
    divided = starts[:, 1:].any(dim=1)
    whole_segments: Attend = _causal
    if past is not None:
        divided = divided | ~past.slots.all(dim=1) | ~past.readers.all(dim=1)
        seen = F.pad(_causal_mask(starts), (past.slots.shape[1], 0), value=True)
        whole_segments = functools.partial(_masked, mask=seen)
    cut = divided.nonzero().squeeze(1)
    if len(cut) == 0:
        return whole_segments
    mask = same_document_mask(starts[cut])
    if past is not None:
        seen = past.readers[cut, :, None] & past.slots[cut, None, :]
        mask = torch.cat((seen[:, None], mask), dim=-1)
    if len(cut) == len(starts):
        return functools.partial(_masked, mask=mask)
    whole = (~divided).nonzero().squeeze(1)
    order = torch.cat((whole, cut)).argsort()

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        plain = whole_segments(queries[whole], keys[whole], values[whole])
        masked = _masked(queries[cut], keys[cut], values[cut], mask)
        return torch.cat((plain, masked))[order]

    return attend


def _causal_mask(starts: Tensor) -> Tensor:
    """[1, 1, N, N] bool."""
    length = starts.shape[1]
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=starts.device).tril()


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


def attend_to_visible(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None
) -> Tensor:
    """Attention of n queries to keys that a mask shows, without a causal order of its own.

    queries [B, n, H, D]; keys, values [B, N, K, D]; visible [n, N] or [B, 1, n, N] bool, None for
    all -> [B, n, H, D].
    """
    return _scaled_dot_product(queries, keys, values, attn_mask=visible)


def sequence_offsets(starts: Tensor) -> Tensor:
    """Boundaries of the runs of tokens that attend only to each other: flash-attn's `cu_seqlens`.

    starts [P, N] -> int32 [runs + 1] offsets into the P * N tokens laid end to end: 0, each
    segment's end and each document's start inside a segment.
    """
    cuts = starts.clone()
    cuts[:, 0] = True
    first = cuts.flatten().nonzero().squeeze(1)
    return F.pad(first, (0, 1), value=cuts.numel()).to(torch.int32)


def sequence_offsets_of_past(starts: Tensor, past: Past) -> tuple[Tensor, Tensor]:
    """What `sequence_offsets` is to queries, for keys that follow slots of the past.

    Returns the rows of the flattened P * (R + N) keys that some token sees, int64, and the int32
    offsets into these rows. A segment's slots belong to the run of its first token.
    """
    seen = past.slots & past.readers[:, :1]
    rows = torch.cat((seen, torch.ones_like(starts)), dim=1).flatten().nonzero().squeeze(1)
    before = F.pad(seen.sum(dim=1).cumsum(0), (1, 0))  # slots of the segments before each
    offsets = sequence_offsets(starts).long()
    inside = offsets % starts.shape[1] > 0
    slots = before[offsets // starts.shape[1] + inside]
    return rows, (offsets + slots).to(torch.int32)


def flash(starts: Tensor, past: Past | None = None) -> Attend:
    """flash-attn: each document's part of a segment is one sequence of variable length.

    With slots of the past a sequence has more keys than queries; its causal mask then is that of
    the last queries, so that every query sees all slots.
    """
    from flash_attn import flash_attn_varlen_func

    offsets = key_offsets = sequence_offsets(starts)
    rows: Tensor | None = None
    longest = longest_keys = starts.shape[1]
    if past is not None:
        rows, key_offsets = sequence_offsets_of_past(starts, past)
        longest_keys += past.slots.shape[1]

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = (
            x.flatten(0, 1) if rows is None else x.flatten(0, 1)[rows] for x in (keys, values)
        )
        attended: Tensor = flash_attn_varlen_func(
            queries.flatten(0, 1),
            keys,
            values,
            cu_seqlens_q=offsets,
            cu_seqlens_k=key_offsets,
            max_seqlen_q=longest,
            max_seqlen_k=longest_keys,
            causal=True,
        )
        return attended.view(queries.shape)

    return attend
