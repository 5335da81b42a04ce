"""Every kind of memory, as small as tests need it: a new one joins by a line in KINDS."""

from __future__ import annotations

import pytest

from data_prep.dataset import settings
from pretrain.config.memory import MEMORY_KINDS, MemoryConfig

KINDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "full": ("full.segments=2",),
    "linear": (),
    "delta": (),
    "transformer_xl": ("transformer_xl.cache=11",),
    "compressive": ("compressive.compressed=6",),
    "memorizing": ("memorizing.layer=1", "memorizing.capacity=64", "memorizing.neighbours=4"),
    "rmt": ("rmt.vectors=3",),
    "autocompressor": ("autocompressor.vectors=2", "autocompressor.capacity=3"),
}
"""Settings of `memory` beside the kind, for segments of 8 to 64 tokens, windows of 4 segments."""
REMEMBERING = [kind for kind in KINDS if MEMORY_KINDS[kind].remembers]
LAYER_LOCAL = [kind for kind in KINDS if not MEMORY_KINDS[kind].recurrent]
EXPORTED = [kind for kind in KINDS if MEMORY_KINDS[kind].exported_as]

of_every_kind = pytest.mark.parametrize("kind", KINDS)
of_every_kind_with_a_state = pytest.mark.parametrize("kind", REMEMBERING)


def words(kind: str, prefix: str = "model.memory") -> list[str]:
    """The overrides that choose it."""
    return [f"{prefix}.kind={kind}", *(f"{prefix}.{word}" for word in KINDS[kind])]


def memory(kind: str) -> MemoryConfig:
    """Its settings."""
    found: MemoryConfig = settings.load(MemoryConfig, None, [f"kind={kind}", *KINDS[kind]])
    return found
