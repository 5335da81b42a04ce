"""The attention, or the recurrence, of each `memory.kind`; no other module compares it.

What is asked of a kind before torch is imported is in `MEMORY_KINDS` of pretrain/config/memory.py.
"""

from __future__ import annotations

from pretrain.config.memory import MemoryConfig
from pretrain.model.memories.autocompressor import Summaries
from pretrain.model.memories.compressive import CompressiveAttention
from pretrain.model.memories.contract import Attention
from pretrain.model.memories.infini import DeltaAttention, LinearAttention
from pretrain.model.memories.memorizing import MemorizingAttention
from pretrain.model.memories.none import LocalAttention
from pretrain.model.memories.recurrence import SegmentRecurrence
from pretrain.model.memories.rmt import RecurrentMemory
from pretrain.model.memories.transformer_xl import CachedAttention

_KINDS: dict[str, type[Attention]] = {
    "none": LocalAttention,
    "full": LocalAttention,
    "transformer_xl": CachedAttention,
    "compressive": CompressiveAttention,
    "memorizing": MemorizingAttention,
    "linear": LinearAttention,
    "delta": DeltaAttention,
    "rmt": LocalAttention,
    "autocompressor": LocalAttention,
}
# Modules of every kind's attention; "" is a name outside of it.
_OF_EVERY_KIND = ("", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_RECURRENCES: dict[str, type[SegmentRecurrence]] = {
    "rmt": RecurrentMemory,
    "autocompressor": Summaries,
}


def attention_of(memory: MemoryConfig) -> type[Attention]:
    """The attention of every layer of a model with this memory."""
    return _KINDS[memory.kind]


def recurrence_of(memory: MemoryConfig) -> type[SegmentRecurrence] | None:
    """The recurrence over the whole stack; None if the layers have the memory, or there is none."""
    return _RECURRENCES.get(memory.kind)


def is_of_memory(name: str) -> bool:
    """Whether a parameter belongs to a memory, so that models with another kind lack it."""
    if name.startswith("recurrence."):
        return True
    _, _, own = name.partition(".attention.")
    return own.partition(".")[0] not in _OF_EVERY_KIND
