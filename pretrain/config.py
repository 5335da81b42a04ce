"""The one configuration of a training run. Free of torch, so that mistakes are reported at once.

Names: a *segment* is what local attention sees, a *window* is `train.window_segments` segments and
is covered by one forward and backward, a *lane* is an endless stream of documents. One optimizer
step consumes one window from each of `data.lanes` lanes, whatever the number of ranks.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from data_prep.dataset import settings
from data_prep.dataset.settings import group, setting
from data_prep.dataset.wording import counted

CONFIG_FILE = "config.yaml"
"""The configuration file in a run directory."""

Checkpointing: TypeAlias = Literal["none", "selective", "full"]

Weights: TypeAlias = Literal["last", "ema"]
"""The weights of a run: those after its last step, or their exponential moving average."""

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
class RunConfig:
    """Where a run lives and what makes it reproducible."""

    directory: str = setting("", "run directory; the same command on it resumes the run", path=True)
    seed: int = setting(
        1, "seed of initial weights and of the order of shards", low=0, high=2**63 - 1
    )


@dataclass(frozen=True)
class SourceConfig:
    """A data set of a mix and its share."""

    data: str = setting("", "data set: the directory that data-prep wrote, or its URL", path=True)
    weight: float = setting(
        1.0, "share of the tokens, relative to the other weights; 0: not read", low=0.0
    )
    name: str = setting("", "name in metrics; empty: the directory's name")
    weights: list[list[float]] = setting(
        [],
        "in place of `weight`, one that changes: a list of [step, weight], each for the documents "
        "that begin after that many steps, e.g. [[0, 3], [40000, 1]]",
    )

    @property
    def schedule(self) -> float | list[list[float]]:
        """The weight, or its values as [step, weight] where it changes."""
        return self.weights or self.weight

    def weight_after(self, step: int) -> float:
        """The weight after `step` steps."""
        phases = self.weights or [[0, self.weight]]
        return [weight for begin, weight in phases if begin <= step][-1]

    def problems(self) -> list[str]:
        """What is missing or no schedule."""
        found = [] if self.data else ["data: not set; give the directory that data-prep wrote"]
        if self.weights and self.weight != 1:
            found.append("weight: has no effect beside weights; remove one of them")
        before = -1.0
        for index, phase in enumerate(self.weights):
            key = f"weights[{index}]"
            if len(phase) != 2:
                found.append(f"{key}: expected [step, weight], found {_shown(phase)}")
                continue
            step, weight = phase
            if step < 0 or step % 1:
                found.append(f"{key}: expected a whole number of steps, found {step:.15g}")
            elif index == 0 and step > 0:
                found.append(f"{key}: the first weight holds from step 0 on, found {step:.15g}")
            elif step <= before:
                found.append(
                    f"{key}: step {step:.15g} is not after {before:.15g}; list the steps in order"
                )
            if weight < 0:
                found.append(f"{key}: expected a weight of at least 0, found {weight:.15g}")
            before = max(before, step)
        return found


@dataclass(frozen=True)
class CacheConfig:
    """The cache of data sets that are under URLs."""

    directory: str = setting(
        "",
        "directory on a disk of the node, which its ranks share; empty: infini-pretrain in the "
        "user's cache directory",
        path=True,
    )
    gigabytes: float = setting(
        50.0,
        "largest size, in 1e9 bytes; it has to hold a shard per lane of the node and source, and "
        "those that are fetched ahead",
        low=1e-6,
    )

    def problems(self) -> list[str]:
        """A place that is no directory of the node."""
        if "://" not in self.directory:
            return []
        return [f"directory: {self.directory} is a URL; give a directory on a disk of the node"]

    @property
    def path(self) -> Path:
        """The directory."""
        if self.directory:
            return Path(self.directory)
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / "infini-pretrain"

    @property
    def bytes(self) -> int:
        """The largest size in bytes."""
        return round(self.gigabytes * 1e9)


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how lanes are fed."""

    train: str = setting(
        "", "data set to train on: the directory that data-prep wrote, or its URL", path=True
    )
    mix: list[SourceConfig] = setting(
        [],
        "in place of `train`, a list of {data, weight or weights, name}: data sets that are read "
        "together",
    )
    validation: str = setting("", "data set to validate on; empty: no validation", path=True)
    prompt_weight: float = setting(
        0.0,
        "weight in the loss of a prompt's tokens, where documents are a prompt and an answer, "
        "whose weight is 1; 0: loss on the answers alone; 1: as plain text",
        low=0.0,
        high=1.0,
    )
    preface: str = setting(
        "",
        "data set that each lane reads beside its documents, as many tokens per step, "
        "forward-only: a document starts with the memory of what was read so far; empty: documents "
        "start with an empty memory",
        path=True,
    )
    lanes: int = setting(8, "lanes G: windows in a step, whatever the number of ranks", low=1)
    workers: int = setting(1, "threads of a rank that read shards ahead", low=1)
    prefetch: int = setting(4, "batches that a rank reads ahead", low=1)
    cache: CacheConfig = group(CacheConfig)

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """What is trained on, each with a name, by the key of its setting."""
        listed = {f"data.mix[{index}]": source for index, source in enumerate(self.mix)}
        return {
            key: replace(source, name=source.name or Path(source.data).name or source.data)
            for key, source in (listed or {"data.train": SourceConfig(self.train)}).items()
        }

    @property
    def phases(self) -> list[int]:
        """The numbers of steps after which any weight changes, in order; the first is 0."""
        return sorted({0, *(int(begin) for source in self.mix for begin, _ in source.weights)})

    def shares(self, steps: int) -> dict[str, float]:
        """The share of each source, by name, in the tokens of a run of `steps` steps, as its
        weights have it."""
        sources = list(self.sources.values())
        total = dict.fromkeys((source.name for source in sources), 0.0)
        for begin, end in itertools.pairwise([*self.phases, steps]):
            weights = [source.weight_after(begin) for source in sources]
            for source, weight in zip(sources, weights, strict=True):
                total[source.name] += (end - begin) / steps * weight / sum(weights)
        return total

    def problems(self) -> list[str]:
        """What is missing or cannot be combined."""
        found = []
        if not self.train and not self.mix:
            found.append("train: not set; give the directory that data-prep wrote, or data.mix")
        if self.train and self.mix:
            found.append("mix: cannot be combined with data.train; give one of them")
        if self.mix and not any(source.problems() for source in self.mix):
            for step in self.phases:
                if not any(source.weight_after(step) for source in self.mix):
                    since = f" after step {step}" if step else ""
                    found.append(f"mix: every weight is 0{since}, so nothing would be read")
        places = [_place(source.data) for source in self.mix if source.data]
        for path in sorted({path for path in places if places.count(path) > 1}):
            found.append(f"mix: {path} is listed twice; list it once, with the sum of the weights")
        names = [source.name for source in self.sources.values() if source.data]
        for name in sorted({name for name in names if names.count(name) > 1}):
            found.append(f"mix: two data sets have the name {name!r}; give each a different `name`")
        return found


def _shown(values: Sequence[float]) -> str:
    """A list of numbers as it is written."""
    return f"[{', '.join(f'{value:.15g}' for value in values)}]"


def _place(data: str) -> str:
    """One text for all ways to write the place of a data set."""
    return data.rstrip("/") if "://" in data else str(Path(data).resolve())


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
        return _without_effect(vars(self), vars(MemoryConfig()), "memory.kind", read_by)

    def problems_of_new(self) -> list[str]:
        """As `problems`, of what begins with these settings: `linear` divides by nothing, but
        checkpoints of runs that began before this was refused can still be read and resumed."""
        if self.kind != "linear":
            return []
        read_by = {"delta": ("normaliser",)}
        return _without_effect(vars(self), vars(MemoryConfig()), "memory.kind", read_by)


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
        found = _without_effect(vars(self), vars(RopeScalingConfig()), "kind", read_by)
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


class EvaluationTraits(NamedTuple):
    """What sets an evaluation in training apart."""

    settings: tuple[str, ...]
    """The settings of `train.evaluate[]` that this kind reads beside those that all of them do."""
    needed: tuple[str, ...]
    """Those of these that have no default."""


Needle: TypeAlias = Literal[
    "single", "multikey", "multivalue", "multiquery", "variables", "words", "qa1", "qa2", "qa3"
]
"""A task of `pretrain eval needles`."""

_QUESTIONS = ("lengths", "samples", "seed")

EVALUATIONS = {
    "passkey": EvaluationTraits((*_QUESTIONS, "depths"), ("lengths",)),
    "needles": EvaluationTraits((*_QUESTIONS, "filler", "tasks"), ("lengths", "filler")),
    "perplexity": EvaluationTraits(("data", "documents", "batch", "window_segments"), ("data",)),
}


@dataclass(frozen=True)
class EvaluationConfig:
    """An evaluation in training; its settings are the options of `pretrain eval`."""

    kind: Literal["passkey", "needles", "perplexity"] = setting(
        "passkey", "as `pretrain eval` names it"
    )
    every: int = setting(1000, "steps between two of them; 0: after the last step alone", low=0)
    name: str = setting("", "name in metrics; empty: the kind")
    lengths: list[int] = setting([], "passkey, needles: tokens of the prompts", low=1)
    samples: int = setting(4, "passkey, needles: prompts per cell", low=1)
    seed: int = setting(0, "passkey, needles: same seed, same prompts", low=0)
    depths: list[float] = setting(
        [0.0, 0.25, 0.5, 0.75, 1.0],
        "passkey: places of the key, 0 the prompt's start, 1 its end",
        low=0.0,
        high=1.0,
    )
    tasks: list[Needle] = setting([], "needles: some of its tasks; empty: all")
    filler: str = setting("", "needles: data set directory of data-prep with books", path=True)
    data: str = setting(
        "", "perplexity: data set, the directory that data-prep wrote, or its URL", path=True
    )
    documents: int | None = setting(None, "perplexity: only the first N; none: all", low=1)
    batch: int | None = setting(
        None, "perplexity: documents per batch; none: as many as a micro-batch has windows", low=1
    )
    window_segments: int | None = setting(
        None, "perplexity: segments per window; none: train.window_segments", low=1
    )

    @property
    def label(self) -> str:
        """Its name in metrics."""
        return self.name or self.kind

    @property
    def tasks_asked(self) -> list[str]:
        """The tasks of recall whose questions are asked."""
        own = {"passkey": ["passkey"], "needles": self.tasks or get_args(Needle)}
        return list(own.get(self.kind, ()))

    @property
    def depths_asked(self) -> Sequence[float | None]:
        """The places of what is asked for; None: drawn."""
        return self.depths if "depths" in EVALUATIONS[self.kind].settings else [None]

    def problems(self) -> list[str]:
        """What is missing or would have no effect."""
        read_by = {kind: traits.settings for kind, traits in EVALUATIONS.items()}
        found = _without_effect(vars(self), vars(EvaluationConfig()), "kind", read_by)
        found += [
            f"{key}: not set, and kind={self.kind} needs it; give what `pretrain eval {self.kind}` "
            f"takes as --{key}"
            for key in EVALUATIONS[self.kind].needed
            if not getattr(self, key)
        ]
        if "depths" in EVALUATIONS[self.kind].settings and not self.depths:
            found.append("depths: none given; list some, e.g. [0, 0.5, 1]")
        for key in ("lengths", "depths", "tasks"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                found.append(f"{key}: {values} names one of them twice; list each once")
        if self.name in ("kind", "step"):
            found.append(f"name: {self.name!r} is a key of every record; choose another")
        return found


@dataclass(frozen=True)
class SpikeConfig:
    """Finite steps that are skipped as those that are not finite are."""

    deviations: float = setting(
        0.0,
        "skip a step whose loss or gradient norm is more than so many standard deviations above "
        "the mean of the last applied steps; 0: skip none",
        low=0.0,
    )
    steps: int = setting(
        128, "applied steps that the mean is of; no step is skipped before there are so many", low=2
    )

    def problems(self) -> list[str]:
        """Settings without effect."""
        if self.deviations or self.steps == SpikeConfig().steps:
            return []
        return ["steps: has no effect with deviations=0; remove it, or set deviations, e.g. to 6"]


@dataclass(frozen=True)
class TrainConfig:
    """Length, precision and intervals of training."""

    steps: int = setting(1000, "optimizer steps", low=1)
    start_from: str = setting(
        "",
        "run directory, checkpoint or imported model whose weights initialize a new run; "
        "optimizer, schedule and data order start fresh",
        path=True,
    )
    window_segments: int = setting(16, "segments W of a window, the back-propagated length", low=1)
    micro_batch: int = setting(0, "lanes of a rank per forward and backward; 0: all of them", low=0)
    precision: Literal["float32", "bf16"] = setting("float32", "dtype of weights and activations")
    activation_checkpointing: Checkpointing = setting(
        "none",
        "what the backward computes again to save memory; selective: the feed-forward's hidden "
        "activations; full: each block, of which only the input is kept",
    )
    compile: bool = setting(
        False,
        "fuse what is not a matrix product with torch.compile; the first launch takes half a "
        "minute more",
    )
    clip_norm: float = setting(1.0, "global gradient norm to clip to; 0: no clipping", low=0.0)
    z_loss: float = setting(
        0.0,
        "coefficient of log(Z)^2 of each target in the loss, Z the sum of its exponentiated "
        "logits; PaLM has 0.0001",
        low=0.0,
    )
    spikes: SpikeConfig = group(SpikeConfig)
    max_skipped: int = setting(5, "skipped steps in a row after which the run stops", low=1)
    log_every: int = setting(10, "steps between log lines", low=1)
    validate_every: int = setting(200, "steps between validations; 0: none but the last", low=0)
    validation_windows: int = setting(
        8, "windows of each validation lane, the same for every run.seed", low=1
    )
    validate_ema: bool = setting(False, "validate the average of optim.ema_decay as well")
    evaluate: list[EvaluationConfig] = setting(
        [],
        "evaluations of the current weights, a list of {kind, every, name, ...}: passkey, needles "
        "or perplexity with the options of `pretrain eval`",
    )
    profile_steps: int = setting(
        0, "steps to profile in each attempt, into the run's profile/; 0: none", low=0
    )
    profile_after: int = setting(
        5,
        "steps of an attempt before the profiled ones; ZeRO-3 learns its order in the first two",
        low=0,
    )
    profile_ranks: Literal["first", "all"] = setting("first", "whose steps: rank 0's, or all")
    max_attempts_without_progress: int = setting(
        5,
        "consecutive attempts without a new checkpoint after which the run is not retried",
        low=1,
    )

    def problems(self) -> list[str]:
        """Evaluations that metrics could not tell apart, and profiles that would not be."""
        names = [one.label for one in self.evaluate]
        found = [
            f"evaluate: two evaluations have the name {name!r}; give each a different `name`"
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
        if not self.profile_steps:
            found += [
                f"{name}: has no effect with profile_steps=0; remove it, or set profile_steps, "
                "e.g. to 3"
                for name in ("profile_after", "profile_ranks")
                if getattr(self, name) != getattr(TrainConfig, name)
            ]
        elif self.profile_after >= self.steps:
            found.append(
                f"profile_after: no step is left to profile after {self.profile_after} of "
                f"steps={self.steps}; lower it"
            )
        return found


class OptimizerTraits(NamedTuple):
    """What sets an optimizer apart before torch is imported."""

    settings: tuple[str, ...]
    """The settings and groups of `optim` that this optimizer alone, or with some others, reads."""
    lr: float
    """Its peak learning rate where none is set."""
    moments: tuple[int, int]
    """Float32 numbers that it keeps of each element of a matrix: in the blocks, and elsewhere."""


_ADAM = ("beta1", "beta2", "eps")

OPTIMIZERS = {
    "adamw": OptimizerTraits(_ADAM, lr=1e-3, moments=(2, 2)),
    "adafactor": OptimizerTraits(("adafactor",), lr=0.01, moments=(0, 0)),
    "muon": OptimizerTraits((*_ADAM, "muon"), lr=1e-3, moments=(1, 2)),
}


@dataclass(frozen=True)
class AdafactorConfig:
    """Adafactor, by its publication's names and values."""

    clip: float = setting(1.0, "d: root mean square that an update is clipped to", low=1e-6)
    decay: float = setting(0.8, "the second moments' decay at step t is 1 - t^-decay", low=0.0)
    # 0 would divide 0 by 0 where a row's gradients are 0; less is not a normal float32.
    eps1: float = setting(1e-30, "added to squared gradients", low=1e-37)
    eps2: float = setting(1e-3, "least size of a parameter, by which its rate is scaled", low=0.0)


@dataclass(frozen=True)
class MuonConfig:
    """Muon, for the blocks' matrices; the rest is AdamW's, by its settings."""

    momentum: float = setting(0.95, "decay of the momentum (Nesterov's)", low=0.0, high=1.0)
    rms: float = setting(
        0.2,
        "root mean square of a matrix's update, in units of the learning rate; 0.2 is about that "
        "of AdamW, so that both take the same rate and decay",
        low=0.0,
    )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule; rates are per optimizer step."""

    name: Literal["adamw", "adafactor", "muon"] = setting(
        "adamw",
        "adamw; adafactor: row and column means in place of second moments; muon: orthogonalised "
        "momentum for the blocks' matrices, AdamW for the rest",
    )
    lr: float | None = setting(
        None, "peak learning rate; none: 0.001, adafactor 0.01 (of a parameter's size)", low=0.0
    )
    gate_lr: float = setting(0.01, "peak learning rate of the gates, which have no decay", low=0.0)
    beta1: float = setting(0.9, "AdamW: decay of the first moment", low=0.0, high=1.0)
    beta2: float = setting(0.95, "AdamW: decay of the second moment", low=0.0, high=1.0)
    eps: float = setting(1e-8, "AdamW: epsilon", low=0.0)
    adafactor: AdafactorConfig = group(AdafactorConfig)
    muon: MuonConfig = group(MuonConfig)
    weight_decay: float = setting(0.1, "decoupled decay of the matrices", low=0.0)
    schedule: Literal["cosine", "wsd"] = setting(
        "cosine", "after warm-up: cosine, or stable and then linear decay (wsd)"
    )
    warmup_steps: int = setting(100, "steps of linear warm-up", low=0)
    decay_steps: int = setting(200, "last steps over which wsd decays", low=0)
    final_fraction: float = setting(0.1, "last rate as a fraction of the peak", low=0.0, high=1.0)
    ema_decay: float = setting(
        0.0,
        "decay a step of an exponential moving average of the weights, kept in float32 beside the "
        "optimizer's states, e.g. 0.999; 0: none",
        low=0.0,
        high=1.0,
    )

    @property
    def peak(self) -> float:
        """The peak learning rate: `lr`, or the optimizer's own."""
        return OPTIMIZERS[self.name].lr if self.lr is None else self.lr

    def problems(self) -> list[str]:
        """Settings of another optimizer, without effect, and values that cannot train."""
        read_by = {name: traits.settings for name, traits in OPTIMIZERS.items()}
        found = _without_effect(vars(self), vars(OptimConfig()), "optim.name", read_by)
        scheduled = {"cosine": (), "wsd": ("decay_steps",)}
        found += _without_effect(vars(self), vars(OptimConfig()), "optim.schedule", scheduled)
        if "beta1" in read_by[self.name]:
            found += [
                f"{name}: 1 never takes a gradient in; lower it, e.g. to {usual}"
                for name, usual in (("beta1", 0.9), ("beta2", 0.95))
                if getattr(self, name) == 1
            ]
            if self.eps == 0:
                found.append("eps: 0 divides 0 by 0 where a gradient is 0; raise it, e.g. to 1e-8")
        if self.name == "muon" and self.muon.momentum == 1:
            found.append("muon.momentum: 1 never takes a gradient in; lower it, e.g. to 0.95")
        if self.ema_decay == 1:
            found.append("ema_decay: 1 averages nothing; lower it, e.g. to 0.999")
        return found


@dataclass(frozen=True)
class ZeroConfig:
    """What DeepSpeed partitions over the ranks."""

    stage: Literal[0, 1, 2, 3] = setting(
        3, "0: nothing, 1: optimizer, 2: and gradients, 3: and weights"
    )
    live_parameters: int = setting(
        1_000_000_000,
        "stage 3: weights that may be gathered at the same time, prefetched or kept for reuse; "
        "fewer take less memory and are gathered more often",
        low=1,
    )

    def problems(self) -> list[str]:
        """Settings of another stage, which would have no effect."""
        read_by = {0: (), 1: (), 2: (), 3: ("live_parameters",)}
        return _without_effect(vars(self), vars(ZeroConfig()), "zero.stage", read_by)


@dataclass(frozen=True)
class ParallelConfig:
    """How a window is shared, beside ZeRO's sharing of lanes and weights."""

    sequence: int = setting(
        1,
        "ranks that share the windows of their lanes, each with the same number of consecutive "
        "segments; layers exchange only memory states",
        low=1,
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = setting(200, "steps between checkpoints", low=1)
    keep_last: int = setting(2, "newest checkpoints to keep", low=2)
    keep_every: int = setting(
        0, "checkpoints at multiples of this are never pruned; 0: none", low=0
    )

    def problems(self) -> list[str]:
        """Multiples at most of which no checkpoint is written."""
        every, kept = self.every, self.keep_every
        if not kept or kept % every == 0 or every % kept == 0:
            return []
        return [
            f"keep_every: a checkpoint is written every {every} steps, so of the multiples of "
            f"{kept} only those of {math.lcm(every, kept)} would be kept; choose a multiple of "
            f"every, e.g. {-(-kept // every) * every}"
        ]


@dataclass(frozen=True)
class LaunchConfig:
    """Ranks that `pretrain train` launches itself; unused under torchrun or srun."""

    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    ranks: int = setting(0, "ranks to start; 0: one per GPU, or one on CPU", low=0)


@dataclass(frozen=True)
class WatchdogConfig:
    """When an unresponsive rank and its peers are killed, after their stacks were written.

    Writing them takes the last 28 s, or 0.475 of a limit below 80 s.
    """

    start: float = setting(1800.0, "seconds until the first step is done", low=10.0)
    step: float = setting(
        600.0, "seconds per step, or per window of a validation or an evaluation", low=10.0
    )
    save: float = setting(1800.0, "seconds per checkpoint", low=10.0)


@dataclass(frozen=True)
class WandbConfig:
    """Tracking with Weights & Biases; the key is read from the environment and never stored."""

    mode: Literal["offline", "online", "disabled"] = setting(
        "offline", "offline: files in the run directory, for `wandb sync`"
    )
    project: str = setting("infini-pretrain", "project")
    entity: str = setting("", "team or user; empty: your default")
    name: str = setting("", "display name; empty: the run directory's name")

    def problems(self) -> list[str]:
        """A project that wandb refuses, which would be known once all ranks have started."""
        wrong = sorted(set(self.project) & set("/\\#?%:"))
        if self.mode != "disabled" and (wrong or len(self.project) > 128):
            return [
                f"project: {self.project!r}: wandb takes names of at most 128 characters without "
                "/ \\ # ? % and :; give such a one"
            ]
        return []


@dataclass(frozen=True)
class TensorBoardConfig:
    """Tracking with TensorBoard, of the same numbers under the same names."""

    enabled: bool = setting(
        False, "event files in the run directory's tensorboard/; needs the extra tensorboard"
    )


@dataclass(frozen=True)
class Config:
    """Everything that `pretrain train` needs to know."""

    run: RunConfig = group(RunConfig)
    data: DataConfig = group(DataConfig)
    model: ModelConfig = group(ModelConfig)
    train: TrainConfig = group(TrainConfig)
    optim: OptimConfig = group(OptimConfig)
    zero: ZeroConfig = group(ZeroConfig)
    parallel: ParallelConfig = group(ParallelConfig)
    checkpoint: CheckpointConfig = group(CheckpointConfig)
    launch: LaunchConfig = group(LaunchConfig)
    watchdog: WatchdogConfig = group(WatchdogConfig)
    wandb: WandbConfig = group(WandbConfig)
    tensorboard: TensorBoardConfig = group(TensorBoardConfig)

    @property
    def window(self) -> int:
        """Tokens of a window."""
        return self.model.segment * self.train.window_segments

    @property
    def part(self) -> int:
        """Tokens of a window that a rank computes: all of them without sequence parallelism."""
        return self.window // self.parallel.sequence

    @property
    def unlearned_writing(self) -> str:
        """Why nothing trains what the model writes to its memory; empty: something does."""
        memory = self.model.memory
        if not memory.traits.learns_to_write:
            return ""
        if self.train.window_segments == 1:
            return (
                "train.window_segments: with 1, no gradient reaches what is written to the memory "
                f"of model.memory.kind={memory.kind}, so that it is not learned; raise it"
            )
        own = "autocompressor" in memory.traits.settings
        if own and memory.autocompressor.backprop_segments == 1:
            return (
                "model.memory.autocompressor.backprop_segments: with 1, no gradient reaches the "
                "summaries, so that they are not learned; raise it, e.g. to 2"
            )
        return ""

    def lanes_a_rank(self, ranks: int) -> int:
        """Lanes that a rank works on; the ranks of a sequence group work on the same ones."""
        return self.data.lanes * self.parallel.sequence // ranks

    def lanes_of_rank(self, rank: int, ranks: int) -> range:
        """The lanes that `rank` works on, a block: consecutive ranks make a sequence group."""
        share, group = self.lanes_a_rank(ranks), rank // self.parallel.sequence
        return range(group * share, (group + 1) * share)

    def tokens_of_rank(self, rank: int) -> slice:
        """The part of each of its lanes' windows that `rank` computes: whole segments."""
        first = rank % self.parallel.sequence * self.part
        return slice(first, first + self.part)

    def problems(self) -> list[str]:
        """Combinations that cannot work, checkable without data and devices."""
        found = []
        if not self.run.directory:
            found.append("run.directory: not set; it says where the run lives, e.g. runs/first")
        if self.train.window_segments % self.parallel.sequence:
            found.append(
                f"parallel.sequence: {self.parallel.sequence} ranks cannot share the "
                f"{counted(self.train.window_segments, 'segment')} of a window "
                "(train.window_segments) evenly; choose a divisor of them"
            )
        kind, traits = self.model.memory.kind, self.model.memory.traits
        if self.parallel.sequence > 1 and not traits.shares_windows:
            found.append(
                "parallel.sequence: ranks cannot share windows with "
                f"model.memory.kind={kind}; set it to 1"
            )
        segments = self.train.window_segments
        laid_out = self.model.span_problems("train.window_segments", segments)
        found += [f"model.{problem}" for problem in laid_out]
        if self.launch.ranks:
            found += self.rank_problems(self.launch.ranks)
        attention = self.model.local_attention
        if attention in FLASH_HEADS and self.train.precision != "bf16":
            found.append(
                f"model.local_attention: {attention} computes in bf16; set "
                "train.precision=bf16, or local_attention=sdpa"
            )
        if attention in FLASH_HEADS and self.launch.device == "cpu":
            found.append(f"model.local_attention: {attention} needs a GPU; set it to sdpa or auto")
        kernel, of_gpu = self.model.memory.kernel, self.model.memory.asks_for_a_gpu
        if of_gpu and self.train.precision != "bf16":
            found.append(
                f"model.memory.kernel: {kernel} computes in bf16; set train.precision=bf16, "
                "or kernel=torch"
            )
        if of_gpu and self.launch.device == "cpu":
            found.append(f"model.memory.kernel: {kernel} needs a GPU; set it to torch or auto")
        if self.data.preface and not traits.remembers:
            found.append(
                "data.preface: documents begin with the memory of a preface, and "
                f"model.memory.kind={kind} has no memory; leave one of them out"
            )
        found += [
            f"{key}.weights[{index}]: never holds, since train.steps={self.train.steps} and it "
            f"begins after step {phase[0]:.15g}; remove it, or raise train.steps"
            for key, source in self.data.sources.items()
            for index, phase in enumerate(source.weights)
            if phase and phase[0] >= self.train.steps
        ]
        if self.zero.stage == 0 and self.train.precision == "bf16":
            found.append(
                "zero.stage: 0 has no float32 master weights, which bf16 needs; choose 1 to 3"
            )
        if self.train.validate_ema and not self.optim.ema_decay:
            found.append(
                "train.validate_ema: there is no average of the weights; set optim.ema_decay, e.g. "
                "to 0.999"
            )
        if not self.data.validation:
            found += self._validation_problems()
        if self.optim.warmup_steps > self.train.steps:
            found.append(
                f"optim.warmup_steps: {self.optim.warmup_steps} is more than "
                f"train.steps={self.train.steps}; set it to at most that, or raise train.steps"
            )
        elif (
            self.optim.schedule == "wsd"
            and self.optim.warmup_steps + self.optim.decay_steps > self.train.steps
        ):
            left = self.train.steps - self.optim.warmup_steps
            found.append(
                "optim.decay_steps: warm-up and decay together are longer than "
                f"train.steps={self.train.steps}; set it to at most {left}, or raise train.steps"
            )
        return found

    def _validation_problems(self) -> list[str]:
        """Settings of validations where there are none; an interval of 0 asks for none."""
        train, default = self.train, TrainConfig()
        asked = {
            "validate_every": train.validate_every not in (0, default.validate_every),
            "validation_windows": train.validation_windows != default.validation_windows,
            "validate_ema": train.validate_ema,
        }
        return [
            f"train.{name}: there is nothing to validate on; set data.validation, or remove it"
            for name, is_asked in asked.items()
            if is_asked
        ]

    def fitting_ranks(self) -> list[int]:
        """The numbers of ranks that can share the lanes evenly, in whole micro-batches.

        They are multiples of `parallel.sequence`, since a sequence group has its lanes to itself.
        """
        units, rest = divmod(self.data.lanes, self.train.micro_batch or 1)
        groups = [] if rest else _divisors(units)
        return [count * self.parallel.sequence for count in groups]

    def rank_problems(self, ranks: int) -> list[str]:
        """Why so many ranks cannot share lanes and windows; empty where they can."""
        fits, sequence = self.fitting_ranks(), self.parallel.sequence
        if ranks in fits:
            return []
        below, above = [n for n in fits if n < ranks][-3:], [n for n in fits if n > ranks][:3]
        choices = [f"{any_of(below + above)} ranks"] if fits else []
        if ranks % sequence:
            segments = self.train.window_segments
            sizes = _divisors(math.gcd(ranks, segments))
            choices.append(f"parallel.sequence={any_of(sizes)}")
            return [
                f"parallel.sequence: {counted(ranks, 'rank is', 'ranks are')} not whole groups of "
                f"{sequence} that share a window; choose {', or '.join(choices)}"
            ]
        lanes, micro, groups = self.data.lanes, self.train.micro_batch or 1, ranks // sequence
        share = groups * micro
        near = [lanes // share * share, (lanes // share + 1) * share]
        if micro > 1 and lanes % groups == 0:
            choices.append(f"a train.micro_batch that divides {lanes // groups}")
        choices.append(f"data.lanes={any_of([count for count in near if count])}")
        parts = f"in micro-batches of {micro} " if micro > 1 else ""
        grouped = f" in groups of {sequence} (parallel.sequence)" if sequence > 1 else ""
        return [
            f"data.lanes: {counted(lanes, 'lane')} cannot be shared evenly {parts}by {ranks} "
            f"ranks{grouped}; choose {', or '.join(choices)}"
        ]


@dataclass(frozen=True)
class ImportConfig:
    """Settings that an imported model lacks, chosen at import."""

    segment: int = setting(2048, "tokens of a segment N, the reach of local attention", low=1)
    window_segments: int = setting(
        16, "segments that evaluation and generation compute at once", low=1
    )
    memory: MemoryConfig = group(MemoryConfig)

    def problems(self) -> list[str]:
        """Combinations that cannot work."""
        model = ModelConfig(segment=self.segment, memory=self.memory)
        return model.span_problems("window_segments", self.window_segments)


def _without_effect(
    chosen: Mapping[str, object],
    defaults: Mapping[str, object],
    key: str,
    read_by: Mapping[Any, Sequence[str]],
) -> list[str]:
    """Settings that are not their default and that only other choices of `key` read.

    `read_by` says which settings a choice reads beside those that all of them do.
    """
    own = chosen[key.rpartition(".")[2]]
    found = []
    for name in dict.fromkeys(name for names in read_by.values() for name in names):
        readers = [choice for choice, names in read_by.items() if name in names]
        if own not in readers and chosen[name] != defaults[name]:
            found.append(
                f"{name}: has no effect with {key}={own}; remove it, or set {key}={any_of(readers)}"
            )
    return found


def _divisors(number: int) -> list[int]:
    """In order; quickly also where a number of tokens was given as one of lanes."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def any_of(choices: Sequence[object]) -> str:
    """`a, b or c`."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with `key=value` overrides. Raises SettingsError."""
    return settings.load(Config, path, overrides)


def describe() -> list[str]:
    """Every key with its default and meaning."""
    return (
        settings.describe(Config)
        + settings.describe(SourceConfig, "data.mix[].")
        + settings.describe(EvaluationConfig, "train.evaluate[].")
    )
