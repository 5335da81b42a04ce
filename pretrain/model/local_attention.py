"""Causal softmax attention inside segments and documents (equation 4).

By SDPA, by flash-attn, or by the variable-length flash attention that comes with torch.

A *kernel* takes the document starts, once per forward, and returns the function that every layer
then calls. Some memories put R slots of earlier segments before a segment's own keys and values:
the kernel then also takes which of them are seen. Shapes: P segments of all lanes, N tokens per
segment, H query heads, K key/value heads, D size of a head. Query head h reads key/value head
h // (H / K).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config.model import flash_head_obstacle

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


_Offsets: TypeAlias = tuple[Tensor, Tensor]
"""int32 offsets of the sequences of queries and of keys."""
_Longest: TypeAlias = tuple[int, int]
"""Tokens of the longest of each, at most."""


class KernelError(ValueError):
    """A requested kernel cannot run here."""


@functools.cache
def choose(
    setting: Literal["auto", "flash", "varlen", "sdpa"],
    device_type: str,
    dtype: torch.dtype,
    d_head: int,
) -> Kernel:
    """The kernel that `model.local_attention` names; `auto` logs its choice once.

    Raises KernelError if a kernel is requested by name and cannot run.
    """
    if setting == "sdpa":
        return sdpa
    obstacles: list[str] = []
    for name in ("flash", "varlen") if setting == "auto" else (setting,):
        kernel, title = _FUSED[name]
        obstacle = _obstacle(name, device_type, dtype, d_head)
        if obstacle is None:
            _announce(setting, title, obstacles)
            return kernel
        obstacles.append(f"{title} {obstacle}")
    if setting != "auto":
        raise KernelError(
            f"model.local_attention: {setting} was requested, but {obstacles[0]}; set it to sdpa, "
            "or to auto, which uses the first of flash, varlen and sdpa that can run"
        )
    _announce(setting, "SDPA", obstacles)
    return sdpa


def _announce(setting: str, taken: str, obstacles: list[str]) -> None:
    if setting == "auto":
        why = f" ({'; '.join(obstacles)})" if obstacles else ""
        _log.info("local attention: %s%s", taken, why)


def _obstacle(name: str, device_type: str, dtype: torch.dtype, d_head: int) -> str | None:
    """Why one of the fused kernels cannot run here; None if it can."""
    if device_type != "cuda":
        return f"needs a CUDA GPU and the model is on {device_type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16 or fp16 and the model is in {dtype}"
    if obstacle := flash_head_obstacle(name, d_head):
        return obstacle
    if torch.cuda.get_device_capability() < (8, 0):
        return f"needs an Ampere GPU or later, found {torch.cuda.get_device_name()}"
    return tried(_FUSED[name][0], torch.device(device_type), dtype, d_head)


def tried(kernel: Kernel, device: torch.device, dtype: torch.dtype, d_head: int) -> str | None:
    """Why a kernel fails on one token, forward and backward; None if it does not.

    A package may be missing, or built for other GPUs, another torch or other sizes of heads.
    """
    queries, keys = (
        torch.zeros(1, 1, heads, d_head, device=device, dtype=dtype, requires_grad=True)
        for heads in (2, 1)
    )
    try:
        with torch.enable_grad():
            attend = kernel(torch.zeros(1, 1, dtype=torch.bool, device=device))
            attend(queries, keys, keys).sum().backward()  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except ImportError as error:
        return f"cannot be imported ({error}); see docs/gpu.md"
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        return f"fails on one token with heads of {d_head} ({first}); see docs/gpu.md"
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
    divided_segments: Attend = functools.partial(_masked, mask=mask)
    if len(cut) == len(starts):
        return divided_segments
    whole = (~divided).nonzero().squeeze(1)
    order = torch.cat((whole, cut)).argsort()

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # Not by x[rows], whose backward sorts its rows on a GPU and is slow on a CPU.
        parts = [
            of_kind(*(x.index_select(0, rows) for x in (queries, keys, values)))
            for of_kind, rows in ((whole_segments, whole), (divided_segments, cut))
        ]
        return torch.cat(parts).index_select(0, order)

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
    heads = queries.shape[2]
    if not takes_shared_heads(queries.device.type, queries.dtype, attn_mask is not None):
        keys, values = (for_each_head(x, heads) for x in (keys, values))
    attended = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=attn_mask,
        is_causal=is_causal,
        enable_gqa=True,
    )
    return attended.transpose(1, 2)


def takes_shared_heads(device_type: str, dtype: torch.dtype, masked: bool) -> bool:
    """Whether PyTorch's attention can share key/value heads without all scores in memory.

    On a GPU its flash attention can, which takes 16 bits and no mask. Its memory-efficient kernel,
    which takes float32 and masks, cannot (torch's sdp_utils.cpp): plain products, with [P, H, N, N]
    scores, would take its place.
    """
    return device_type != "cuda" or (dtype in (torch.bfloat16, torch.float16) and not masked)


def for_each_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values [P, N, K, D] as [P, N, H, D], those of a group in each of its heads."""
    shared = heads // x.shape[2]
    # By expanding, whose backward adds up in one order, unlike that of repeat_interleave.
    return x if shared == 1 else x[:, :, :, None].expand(-1, -1, -1, shared, -1).flatten(2, 3)


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
    """flash-attn: each document's part of a segment is one sequence of variable length."""
    from flash_attn import flash_attn_varlen_func

    def attend(
        queries: Tensor, keys: Tensor, values: Tensor, starting: _Offsets, longest: _Longest
    ) -> Tensor:
        attended: Tensor = flash_attn_varlen_func(
            *(queries, keys, values, *starting, *longest), causal=True
        )
        return attended

    return _by_sequence(attend, starts, past)


def varlen(starts: Tensor, past: Past | None = None) -> Attend:
    """The same, by the flash attention that comes with torch."""
    from torch.nn.attention.varlen import varlen_attn

    # Its kernel takes shared key/value heads as they are; 2.11 lacks the argument for it.
    known = varlen_attn.__kwdefaults__ or {}
    shared: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}

    def attend(
        queries: Tensor, keys: Tensor, values: Tensor, starting: _Offsets, longest: _Longest
    ) -> Tensor:
        attended = varlen_attn(
            *(queries, keys, values, *starting, *longest),
            window_size=(-1, 0),  # causal
            **shared,
        )
        assert isinstance(attended, Tensor)  # without an auxiliary output
        return attended

    return _by_sequence(attend, starts, past)


_FUSED: dict[str, tuple[Kernel, str]] = {
    "flash": (flash, "flash-attn"),
    "varlen": (varlen, "torch's varlen_attn"),
}


def _by_sequence(
    run: Callable[[Tensor, Tensor, Tensor, _Offsets, _Longest], Tensor],
    starts: Tensor,
    past: Past | None,
) -> Attend:
    """`run` on sequences laid end to end: queries [sum of n, H, D], keys and values [.., K, D].

    With slots of the past a sequence has more keys than queries; its causal mask then is that of
    the last queries, so that every query sees all slots.
    """
    offsets = key_offsets = sequence_offsets(starts)
    rows: Tensor | None = None
    longest = longest_keys = starts.shape[1]
    if past is not None:
        rows, key_offsets = sequence_offsets_of_past(starts, past)
        longest_keys += past.slots.shape[1]
        if len(rows) == len(starts) * longest_keys:
            rows = None  # all of them, as in long documents

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = (x.flatten(0, 1) for x in (keys, values))
        if rows is not None:
            keys, values = keys.index_select(0, rows), values.index_select(0, rows)
        both = (offsets, key_offsets), (longest, longest_keys)
        return run(queries.flatten(0, 1), keys, values, *both).view(queries.shape)

    return attend
