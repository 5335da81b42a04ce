"""Settings of `model.memory`: the kinds of memory, and what sets them apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from data_prep.dataset.settings import group, setting
from pretrain.config.choices import without_effect


class MemoryTraits(NamedTuple):
    """What the rest of the program asks of a kind of memory before torch is imported."""

    settings: tuple[str, ...]
    """The settings and groups of `model.memory` that this kind reads, apart from `kind`."""
    remembers: bool = True
    """Whether a state is carried from segment to segment."""
    recurrent: bool = False
    """Whether the whole stack of layers runs once per segment, in order."""
    whole_window: bool = False
    """Whether local attention spans `full.segments` segments instead of one."""
    learns_to_write: bool = False
    """Whether what a segment writes is learned from the later ones of its window that read it."""
    shares_windows: bool = False
    """Whether ranks can share a window (`parallel.sequence`)."""
    sizes: tuple[str, ...] = ()
    """Those of these settings that the shape of a weight depends on."""
    exported_as: str = ""
    """The model type of Hugging Face's that `export` writes; empty: there is none."""


_INFINI = MemoryTraits(
    settings=("normaliser", "initial_gate", "when_empty", "kernel"),
    learns_to_write=True,
    shares_windows=True,
    exported_as="infini_llama",
)

MEMORY_KINDS = {
    "linear": _INFINI,
    "delta": _INFINI,
    "none": MemoryTraits((), remembers=False, shares_windows=True, exported_as="llama"),
    "full": MemoryTraits(("full",), remembers=False, whole_window=True, exported_as="llama"),
    "transformer_xl": MemoryTraits(("transformer_xl",)),
    "compressive": MemoryTraits(("compressive",), sizes=("compressive.rate",)),
    "memorizing": MemoryTraits(("memorizing",)),
    "rmt": MemoryTraits(("rmt",), recurrent=True, learns_to_write=True, sizes=("rmt.vectors",)),
    "autocompressor": MemoryTraits(
        ("autocompressor",),
        recurrent=True,
        learns_to_write=True,
        sizes=("autocompressor.vectors",),
    ),
}


@dataclass(frozen=True)
class FullConfig:
    """Attention over a whole window."""

    segments: int = setting(
        16, "segments that attention spans, cut at documents; a divisor of a window's", low=1
    )


@dataclass(frozen=True)
class TransformerXLConfig:
    """Transformer-XL."""

    cache: int = setting(0, "cached inputs m of each layer; 0: as many as a segment", low=0)


@dataclass(frozen=True)
class CompressiveConfig:
    """The Compressive Transformer."""

    cache: int = setting(
        0, "uncompressed inputs of each layer, in whole segments; 0: one segment", low=0
    )
    compressed: int = setting(512, "compressed slots of each layer", low=1)
    rate: int = setting(2, "inputs that are compressed into a slot; divides a segment", low=1)
    reconstruction_weight: float = setting(
        1e-4,
        "weight of the loss that trains the compression, and nothing else; small, so that it does "
        "not fill train.clip_norm",
        low=0.0,
    )


@dataclass(frozen=True)
class MemorizingConfig:
    """Memorizing Transformers."""

    layer: int = setting(
        0, "layer with the store of keys and values, from 1; 0: at three quarters", low=0
    )
    capacity: int = setting(8192, "tokens in the store, in whole segments", low=1)
    neighbours: int = setting(32, "nearest keys that each query and head attends to", low=1)
    cache: int = setting(
        0, "cached inputs of each layer, as in Transformer-XL; 0: as many as a segment", low=0
    )
    initial_scale: float = setting(
        1.0,
        "scale of the products of queries and stored keys at the start, learned per head; above 1, "
        "a read is of few keys from the first step on",
        low=0.0,
    )


@dataclass(frozen=True)
class RMTConfig:
    """The Recurrent Memory Transformer."""

    vectors: int = setting(10, "memory vectors p, read before and written after a segment", low=1)


@dataclass(frozen=True)
class AutoCompressorConfig:
    """AutoCompressors."""

    vectors: int = setting(50, "summary vectors of a segment", low=1)
    capacity: int = setting(16, "segments whose summaries are kept, the newest", low=1)
    backprop_segments: int = setting(
        2, "segments of a group; no gradient flows into summaries of an earlier group", low=1
    )


@dataclass(frozen=True)
class MemoryConfig:
    """The memory of earlier segments."""

    kind: Literal[
        "linear",
        "delta",
        "none",
        "full",
        "transformer_xl",
        "compressive",
        "memorizing",
        "rmt",
        "autocompressor",
    ] = setting(
        "delta",
        "Infini-attention by equation 8 (linear) or 9 (delta); none: local attention alone; full: "
        "attention over the window; or the memory of another paper (see docs/memories.md)",
    )
    normaliser: Literal["paper", "inclusive"] = setting(
        "inclusive",
        "delta: what it divides by, z before the segment (paper) or after it (inclusive)",
    )
    initial_gate: float = setting(0.0, "linear, delta: initial beta of the gates (equation 10)")
    when_empty: Literal["zero", "local"] = setting(
        "zero",
        "linear, delta: what is read from a memory that holds nothing of a token's document: 0, "
        "which scales the local attention by 1 - g; or the local attention, which is then left as "
        "it is",
    )
    kernel: Literal["auto", "torch", "mixed", "triton"] = setting(
        "auto",
        "linear, delta: what computes the memory's part: PyTorch in float32, with bf16 operands "
        "and float32 sums (mixed; GPU, bf16), or our Triton kernels (GPU, bf16; experimental); "
        "auto: PyTorch in float32, until a measurement on a GPU shows others to be faster",
    )
    full: FullConfig = group(FullConfig)
    transformer_xl: TransformerXLConfig = group(TransformerXLConfig)
    compressive: CompressiveConfig = group(CompressiveConfig)
    memorizing: MemorizingConfig = group(MemorizingConfig)
    rmt: RMTConfig = group(RMTConfig)
    autocompressor: AutoCompressorConfig = group(AutoCompressorConfig)

    @property
    def traits(self) -> MemoryTraits:
        """Those of this kind."""
        return MEMORY_KINDS[self.kind]

    @property
    def asks_for_triton(self) -> bool:
        """Whether the kind computes with a kernel and is to take Triton's."""
        return self.kernel == "triton" and "kernel" in self.traits.settings

    @property
    def asks_for_a_gpu(self) -> bool:
        """Whether the kind computes with a kernel and is to take one that a GPU alone has."""
        return self.kernel in ("mixed", "triton") and "kernel" in self.traits.settings

    def problems(self) -> list[str]:
        """Settings of another kind, which would have no effect."""
        read_by = {kind: traits.settings for kind, traits in MEMORY_KINDS.items()}
        return without_effect(vars(self), vars(MemoryConfig()), "memory.kind", read_by)

    def problems_of_new(self) -> list[str]:
        """As `problems`, of what begins with these settings: `linear` divides by nothing, but
        checkpoints of runs that began before this was refused can still be read and resumed."""
        if self.kind != "linear":
            return []
        read_by = {"delta": ("normaliser",)}
        return without_effect(vars(self), vars(MemoryConfig()), "memory.kind", read_by)
