"""Settings of `model`: the shape of the Infini-Transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_prep.dataset.settings import group, setting
from data_prep.dataset.wording import counted
from pretrain.config.choices import without_effect
from pretrain.config.memory import MemoryConfig

TRITON_MAX_HEAD = 128
"""The largest head of which Triton's kernels hold a memory state."""

FLASH_HEADS = {"flash": 1, "varlen": 8}
"""What a head's size must be a multiple of, by kernel of flash attention; flash-attn pads it."""
_LARGEST_FLASH_HEAD = 256


def flash_head_obstacle(kernel: str, d_head: int) -> str | None:
    """Why a kernel of the local attention cannot take heads of this size; None if it can."""
    step = FLASH_HEADS.get(kernel, 0)
    if not step or (d_head % step == 0 and d_head <= _LARGEST_FLASH_HEAD):
        return None
    multiples = f"in multiples of {step}, " if step > 1 else ""
    return f"takes heads of at most {_LARGEST_FLASH_HEAD}, {multiples}found d_head={d_head}"


@dataclass(frozen=True)
class RopeScalingConfig:
    """How the rotary embedding's frequencies were lowered to pre-train on longer contexts."""

    kind: Literal["none", "linear", "llama3", "yarn"] = setting(
        "none",
        "linear: all of them divided by the factor; llama3 and yarn: those of few turns within the "
        "original length, as in Llama 3.1 and arXiv 2309.00071",
    )
    factor: float = setting(1.0, "what frequencies are divided by", low=1.0)
    low_turns: float = setting(
        1.0,
        "llama3, yarn: frequencies of fewer turns within the original length are divided",
        low=0.0,
    )
    high_turns: float = setting(
        4.0,
        "llama3, yarn (whose paper has 32): frequencies of more turns are kept; between the two "
        "it is blended",
        low=0.0,
    )
    original_length: int = setting(8192, "llama3, yarn: tokens of the original context", low=1)
    attention_factor: float = setting(
        0.0,
        "yarn: what rotated queries and keys are multiplied by; 0: 0.1 ln(factor) + 1",
        low=0.0,
    )
    truncate: bool = setting(True, "yarn: blend between whole pairs of components")

    def problems(self) -> list[str]:
        """Settings of another kind, without effect, and combinations that cannot work."""
        blended = ("factor", "low_turns", "high_turns", "original_length")
        read_by = {
            "none": (),
            "linear": ("factor",),
            "llama3": blended,
            "yarn": (*blended, "attention_factor", "truncate"),
        }
        found = without_effect(vars(self), vars(RopeScalingConfig()), "kind", read_by)
        if self.kind == "yarn" and not self.low_turns:
            found.append("low_turns: yarn's blend has no end at 0 turns; raise it, e.g. to 1")
        if self.kind in ("llama3", "yarn") and self.low_turns >= self.high_turns:
            found.append(
                f"low_turns: {self.low_turns} is not below high_turns, {self.high_turns}; lower it"
            )
        return found


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the Llama-like Infini-Transformer; its vocabulary is the data set's."""

    d_model: int = setting(256, "width of the residual stream", low=1)
    n_layers: int = setting(4, "blocks", low=1)
    n_heads: int = setting(4, "query heads", low=1)
    n_kv_heads: int = setting(4, "key/value heads; Infini-attention has a memory for each", low=1)
    d_head: int = setting(64, "size of a head", low=2)
    d_ff: int = setting(688, "hidden size of the SwiGLU feed-forward", low=1)
    segment: int = setting(256, "tokens of a segment N, the reach of local attention", low=1)
    rope_theta: float = setting(10000.0, "base of the rotary embedding", low=1.0)
    rope_scaling: RopeScalingConfig = group(RopeScalingConfig)
    norm_eps: float = setting(1e-5, "epsilon of RMSNorm", low=0.0)
    qkv_bias: bool = setting(False, "biases of queries, keys and values, as in Qwen2")
    qk_norm: bool = setting(
        False,
        "RMSNorm of each head's queries and keys, before positions and the memory, as in Qwen3",
    )
    tied_embeddings: bool = setting(True, "the output projection is the embedding's weight")
    init_std: float = setting(0.02, "standard deviation of the initial weights", low=0.0)
    memory: MemoryConfig = group(MemoryConfig)
    local_attention: Literal["auto", "flash", "varlen", "sdpa"] = setting(
        "auto",
        "kernel of the local attention; flash: flash-attn; varlen: torch's own flash attention; "
        "auto: the first of flash, varlen and sdpa that can run",
    )

    @property
    def span(self) -> int:
        """Tokens that local attention spans: a segment, or with memory.kind=full several."""
        memory = self.memory
        return self.segment * (memory.full.segments if memory.traits.whole_window else 1)

    def whole_spans(self, segments: int) -> int:
        """Tokens of the fewest spans that hold `segments` segments."""
        return -(-segments * self.segment // self.span) * self.span

    def span_problems(self, key: str, segments: int) -> list[str]:
        """Why a window of `segments` segments, the setting `key`, cannot be laid out."""
        if segments * self.segment % self.span == 0:
            return []
        return [
            f"memory.full.segments: {self.memory.full.segments} does not divide {key}={segments}; "
            "choose a divisor of it"
        ]

    def problems(self) -> list[str]:
        """Combinations that cannot work."""
        found = []
        if self.n_heads % self.n_kv_heads:
            found.append(
                f"n_heads: {counted(self.n_heads, 'query head')} cannot share {self.n_kv_heads} "
                "key/value heads; choose a multiple of n_kv_heads"
            )
        if self.rope_scaling.kind == "yarn" and self.rope_theta == 1:
            found.append("rope_theta: yarn needs frequencies that differ; raise it above 1")
        if self.d_head % 2:
            found.append(
                f"d_head: rotary embedding needs an even number, found {self.d_head}; choose one"
            )
        if obstacle := flash_head_obstacle(self.local_attention, self.d_head):
            found.append(
                f"local_attention: {self.local_attention} {obstacle}; set it to sdpa or auto"
            )
        if self.memory.asks_for_triton and self.d_head > TRITON_MAX_HEAD:
            found.append(
                f"memory.kernel: triton holds heads of at most {TRITON_MAX_HEAD}, found "
                f"d_head={self.d_head}; set it to torch or auto"
            )
        return found + self._memory_problems()

    def _memory_problems(self) -> list[str]:
        """Settings of the memory's kind that do not fit the segment or the layers."""
        found, segment, settings = [], self.segment, self.memory.traits.settings
        compressive, memorizing = self.memory.compressive, self.memory.memorizing
        if "compressive" in settings and compressive.cache % segment:
            found.append(
                f"memory.compressive.cache: {compressive.cache} is not a multiple of "
                f"segment={segment}; choose one, or 0 for one segment"
            )
        if "compressive" in settings and segment % compressive.rate:
            found.append(
                f"memory.compressive.rate: {compressive.rate} does not divide segment={segment}; "
                "choose a divisor of it"
            )
        if "memorizing" in settings and memorizing.layer > self.n_layers:
            found.append(
                f"memory.memorizing.layer: {memorizing.layer} is more than "
                f"n_layers={self.n_layers}; choose one of the layers, or 0"
            )
        if "memorizing" in settings and memorizing.capacity % segment:
            found.append(
                f"memory.memorizing.capacity: {memorizing.capacity} is not a multiple of "
                f"segment={segment}; choose one"
            )
        return found
