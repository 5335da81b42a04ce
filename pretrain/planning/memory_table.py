"""What every kind of memory keeps and costs at one shape: Table 1 of arXiv 2404.07143, and ours.

The paper counts numbers by a formula for each system; the state that a kind really carries is
counted on the meta device. Where the two differ, `System.difference` says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.dataset import durable, settings
from pretrain.config.model import ModelConfig
from pretrain.config.root import Config
from pretrain.model import flops
from pretrain.model.transformer import on_meta
from pretrain.trained import PRECISIONS

Count = Callable[[ModelConfig], int]


@dataclass(frozen=True)
class System:
    """How a kind is counted. Symbols: N tokens a segment, S segments, l layers, H key/value heads,
    d_k and d_v their sizes, d the width; other names are the kind's settings."""

    formula: str
    """The paper's count of numbers; empty: the paper does not list the system."""
    published: Count | None
    """That formula."""
    held: Count
    """Numbers of the state of one lane, without flags."""
    context: str
    """The paper's count of the tokens that a token can see."""
    slots: Callable[[ModelConfig], Sequence[int]] | None = None
    """How far each layer sees behind its segment's start, from the first layer, in tokens; None
    where the state sums up the whole document."""
    difference: str = ""
    """Why `held` is not `published`; empty where the two are equal."""

    def reach(self, config: ModelConfig, length: int) -> int:
        """The tokens of a document that can influence the prediction after its last one, itself
        included, for a document of `length` tokens in whole segments."""
        if self.slots is None:
            return length
        segment = config.segment
        first, *others = self.slots(config)
        # A slot of a higher layer belongs to a segment, all of which begins with its own slots.
        behind = first + sum(-(-slots // segment) * segment for slots in others)
        return min(length, config.span + behind)


def _per_head(config: ModelConfig) -> int:
    """(d_k + d_v) H."""
    return 2 * config.d_head * config.n_kv_heads


def _cache(config: ModelConfig) -> int:
    return config.memory.transformer_xl.cache or config.segment


def _compressive(config: ModelConfig) -> tuple[int, int]:
    """Uncompressed and compressed slots."""
    own = config.memory.compressive
    return own.cache or config.segment, own.compressed


def _memorizing_cache(config: ModelConfig) -> int:
    return config.memory.memorizing.cache or config.segment


def _memorizing_slots(config: ModelConfig) -> list[int]:
    # Which layer has the store matters to none but the first, whose slots are not rounded up.
    cache = _memorizing_cache(config)
    store = max(cache, config.memory.memorizing.capacity)
    if config.n_layers == 1 or config.memory.memorizing.layer == 1:
        return [store, *[cache] * (config.n_layers - 1)]
    return [*[cache] * (config.n_layers - 1), store]


_NOTHING = System("", None, lambda c: 0, "N", lambda c: [0] * c.n_layers)
_INFINI = System(
    "d_k (d_v + 1) H l",
    lambda c: c.d_head * (c.d_head + 1) * c.n_kv_heads * c.n_layers,
    lambda c: c.d_head * (c.d_head + 1) * c.n_kv_heads * c.n_layers,
    "N S",
)

SYSTEMS: Mapping[str, System] = {
    "none": _NOTHING,
    "full": dataclasses.replace(_NOTHING, context="full.segments N"),
    "transformer_xl": System(
        "(d_k + d_v) H cache l",
        lambda c: _per_head(c) * _cache(c) * c.n_layers,
        lambda c: c.d_model * _cache(c) * c.n_layers,
        "cache l",
        lambda c: [_cache(c)] * c.n_layers,
        "the inputs are kept, d cache l, and keys and values are computed from them; the paper "
        "counts keys and values",
    ),
    "compressive": System(
        "d (compressed + cache) l",
        lambda c: c.d_model * sum(_compressive(c)) * c.n_layers,
        lambda c: c.d_model * sum(_compressive(c)) * c.n_layers,
        "(compressed rate + cache) l",
        lambda c: (
            [_compressive(c)[0] + c.memory.compressive.rate * _compressive(c)[1]] * c.n_layers
        ),
    ),
    "memorizing": System(
        "(d_k + d_v) H (capacity + cache l)",
        lambda c: _per_head(c) * (c.memory.memorizing.capacity + _memorizing_cache(c) * c.n_layers),
        lambda c: (
            _per_head(c) * c.memory.memorizing.capacity
            + c.d_model * _memorizing_cache(c) * c.n_layers
        ),
        "N S",
        _memorizing_slots,
        "the store is as the paper counts it, but the layers' caches hold inputs; Table 1 leaves "
        "these caches out, Table 2 counts them",
    ),
    "rmt": System(
        "2 d vectors l",
        lambda c: 2 * c.d_model * c.memory.rmt.vectors * c.n_layers,
        lambda c: c.d_model * c.memory.rmt.vectors,
        "N S",
        difference="only the top layer's vectors are carried, d vectors; the paper counts the "
        "places that are read and written in every layer",
    ),
    "autocompressor": System(
        "d vectors (capacity + 1) l",
        lambda c: (
            c.d_model
            * c.memory.autocompressor.vectors
            * (c.memory.autocompressor.capacity + 1)
            * c.n_layers
        ),
        lambda c: c.d_model * c.memory.autocompressor.vectors * c.memory.autocompressor.capacity,
        "N S",
        difference="only the top layer's summaries are carried, d vectors capacity; the paper "
        "counts the places that are read and written in every layer",
    ),
    "linear": _INFINI,
    "delta": _INFINI,
}


_LEGEND = (
    "N tokens a segment, S segments, l layers, H key/value heads, d_k and d_v their sizes, d the "
    "width; the other names are the kind's settings. FLOPs are those of a training window, without "
    "the output head. Where the two counts of numbers differ:",
    "",
)


@dataclass(frozen=True)
class Row:
    """A kind at one shape; numbers and bytes are of one lane."""

    kind: str
    settings: Mapping[str, Any]
    """Those that the kind reads."""
    published_numbers: int | None
    """By the paper's formula."""
    numbers: int
    """That the state holds."""
    bytes: int
    """Of these numbers."""
    flag_bytes: int
    """Of the state's flags and counts, which come on top."""
    published_context: str
    reach: int
    """See `System.reach`."""
    forward_flops: float
    """FLOPs of a forward over a training window, per token, without the output head."""


def row(kind: str, config: ModelConfig, window: int, length: int, precision: str) -> Row:
    """A kind's row, for training windows of `window` tokens and a document of `length`."""
    system = SYSTEMS[kind]
    state = on_meta(config, 1).to(PRECISIONS[precision]).initial_state(1, "meta")
    tensors = [tensor for memory in state for tensor in memory]
    numbers = [tensor for tensor in tensors if tensor.is_floating_point()]
    flags = [tensor for tensor in tensors if not tensor.is_floating_point()]
    forward = flops.forward_flops(config, 0, window)
    plain = settings.to_plain(config.memory)
    return Row(
        kind,
        {name: plain[name] for name in config.memory.traits.settings},
        None if system.published is None else system.published(config),
        sum(tensor.numel() for tensor in numbers),
        sum(tensor.nbytes for tensor in numbers),
        sum(tensor.nbytes for tensor in flags),
        system.context,
        system.reach(config, length),
        sum(forward.values()) / window,
    )


def lines(config: Config, rows: Sequence[Row], length: int) -> list[str]:
    """The table in Markdown, with the shape before it and the differences after it."""
    shape = config.model
    (none,) = (one for one in rows if one.kind == "none")
    shown = [
        f"{shape.n_layers} layers of width {shape.d_model}, {shape.n_kv_heads} key/value heads of "
        f"{shape.d_head}, segments of {shape.segment:,} tokens, windows of {config.window:,}, a "
        f"document of {length:,}; {config.train.precision}, one lane.",
        "",
        "| kind | the paper's formula | numbers by it | numbers in the state | size of the state "
        "| the paper's context | tokens reached | forward FLOPs a token, times those of none |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        system = SYSTEMS[one.kind]
        by_paper = "" if one.published_numbers is None else _short(one.published_numbers)
        flags = f" + {_size(one.flag_bytes)} of flags" if one.flag_bytes else ""
        shown.append(
            f"| {one.kind} | {system.formula} | {by_paper} | {_short(one.numbers)} "
            f"| {_size(one.bytes)}{flags} | {system.context} | {one.reach:,} "
            f"| {_short(one.forward_flops)}, {one.forward_flops / none.forward_flops:.2f} |"
        )
    differing = [one.kind for one in rows if SYSTEMS[one.kind].difference]
    notes = [f"- {kind}: {SYSTEMS[kind].difference}." for kind in differing]
    return [*shown, "", *_LEGEND, *notes]


def run(
    config: Config, kinds: Mapping[str, ModelConfig], length: int, directory: Path | None
) -> int:
    """Print the table of the kinds' configurations, write it to `directory`; the exit code."""
    rows = [
        row(kind, model, config.window, length, config.train.precision)
        for kind, model in kinds.items()
    ]
    table = "\n".join(lines(config, rows, length))
    print(table)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(directory / "memories.md", f"{table}\n".encode())
        report = {
            "shape": settings.to_plain(config.model),
            "window": config.window,
            "length": length,
            "precision": config.train.precision,
            "kinds": [dataclasses.asdict(one) for one in rows],
        }
        durable.write_json(directory / "memories.json", report)
    return 0


def _short(count: float, gap: str = "") -> str:
    """Three digits: 50.3M; `gap` is put before the letter."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:  # which is rounded to it
            return f"{count / size:.3g}{gap}{unit}"
    return f"{count:.3g}{gap}"


def _size(count: int) -> str:
    """Bytes, in decimal units."""
    return f"{_short(count, gap=' ')}B"
