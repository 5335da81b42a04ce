"""The attention class of each `memory.kind`; no other module compares it.

Properties of a kind that are needed before torch is imported are in `config.MEMORY_KINDS`.
"""

from __future__ import annotations

from pretrain.config import MemoryConfig
from pretrain.model.memories.contract import Attention
from pretrain.model.memories.infini import DeltaAttention, LinearAttention
from pretrain.model.memories.memorizing import MemorizingAttention
from pretrain.model.memories.none import LocalAttention
from pretrain.model.memories.transformer_xl import CachedAttention

_KINDS: dict[str, type[Attention]] = {
    "none": LocalAttention,
    "full": LocalAttention,
    "transformer_xl": CachedAttention,
    "memorizing": MemorizingAttention,
    "linear": LinearAttention,
    "delta": DeltaAttention,
}


def attention_of(memory: MemoryConfig) -> type[Attention]:
    """The attention of every layer of a model with this memory."""
    return _KINDS[memory.kind]


def is_gate(name: str) -> bool:
    """Whether a parameter of the model is a gate of a memory of any kind; see `Attention.gates`.

    For the tensors of a checkpoint whose model may have another kind of memory.
    """
    module, _, own = name.rpartition(".")
    return module.endswith(".attention") and any(own in kind.gates for kind in _KINDS.values())
