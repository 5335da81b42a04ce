"""What a data set holds, as lines or as JSON."""

from __future__ import annotations

import heapq
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep import accounts
from data_prep.accounts import ACCOUNTS, REJECTS
from data_prep.dataset import shards
from data_prep.dataset.shards import Document, Manifest
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import Tokenizer

_PERCENTILES = (0, 10, 50, 90, 99, 100)
_LONGEST = 20
# Words are counted in the first tokens of a source's first documents: shards are shuffled by key,
# so these are a random sample, and the same one each time.
_WORD_TOKENS = 400_000
_WORD_TOKENS_A_DOCUMENT = 20_000


@dataclass(frozen=True)
class SourceStats:
    """A source's share of the data set; its rates are those of `Stats`."""

    documents: int
    tokens: int
    bytes: int
    bytes_per_token: float
    byte_fallback: float


@dataclass(frozen=True)
class Stats:
    """Counted from the shards. Lengths are tokens of a document; `bytes` are UTF-8 bytes of text.

    `byte_fallback` is the share of tokens that spell bytes of a character without a piece of its
    own: byte-fallback pieces, or pieces of a byte-level BPE that are not whole characters.
    """

    documents: int
    rejected: int
    tokens: int
    bytes: int
    bytes_per_token: float
    byte_fallback: float
    vocab_size: int
    shards: int
    length_percentiles: dict[str, int]
    sources: dict[str, SourceStats]
    rejected_by_reason: dict[str, int]


@dataclass
class SourceCount:
    """What is counted of a source: tokens of each document, bytes of text, byte-fallback tokens.

    `words` are counted in `word_tokens` tokens, a sample; they are separated by white space.
    """

    lengths: array[int] = field(default_factory=lambda: array("Q"))
    bytes: int = 0
    in_bytes: int = 0
    words: int = 0
    word_tokens: int = 0


@dataclass(frozen=True)
class Count:
    """A data set counted in one pass. `longest` are (tokens, id, source), the longest first."""

    manifest: Manifest
    sources: dict[str, SourceCount]
    longest: list[tuple[int, str, str]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every document: uint64 [documents]."""
        return np.concatenate([np.asarray(source.lengths) for source in self.sources.values()])


def stats(directory: Path) -> Stats:
    """Read every shard of a data set and count. Raises DataError where one is damaged."""
    return summary(directory, count(directory))


def count(directory: Path, words: bool = False) -> Count:
    """Read every shard; `words`: decode a sample too. Raises DataError where one is damaged.

    Memory: eight bytes a document.
    """
    manifest = shards.read_manifest(directory)
    model = tokenizer.load(directory / manifest.tokenizer.file)
    fallback = np.zeros(manifest.tokenizer.vocab_size, dtype=bool)
    fallback[model.byte_tokens] = True
    sources: dict[str, SourceCount] = {}
    longest: list[tuple[int, int, str, str]] = []
    number = 0
    for info in manifest.shards:
        shards.check_shard(directory / info.name, info)
        for document in shards.read_shard(directory / info.name, info):
            source = sources.setdefault(document.source, SourceCount())
            source.lengths.append(len(document.tokens))
            source.bytes += document.bytes
            source.in_bytes += int(fallback[document.tokens].sum())
            if words and source.word_tokens < _WORD_TOKENS:
                _count_words(source, model, document)
            # Of equally long ones the first; the number also decides before ids are compared.
            number += 1
            entry = (len(document.tokens), -number, document.id, document.source)
            (heapq.heappush if number <= _LONGEST else heapq.heappushpop)(longest, entry)
    longest.sort(reverse=True)
    listed = [(tokens, id, source) for tokens, _, id, source in longest]
    return Count(manifest, dict(sorted(sources.items())), listed)


def _count_words(source: SourceCount, model: Tokenizer, document: Document) -> None:
    ids = document.tokens[:_WORD_TOKENS_A_DOCUMENT]
    source.words += len(model.decode(ids).split())
    source.word_tokens += len(ids)


def summary(directory: Path, found: Count) -> Stats:
    """The statistics of a data set that was counted. Raises DataError where its rejects are cut."""
    manifest, sources = found.manifest, found.sources
    tokens = manifest.tokens
    text_bytes = sum(source.bytes for source in sources.values())
    return Stats(
        documents=manifest.documents,
        rejected=manifest.rejected,
        tokens=tokens,
        bytes=text_bytes,
        bytes_per_token=text_bytes / tokens,
        byte_fallback=sum(source.in_bytes for source in sources.values()) / tokens,
        vocab_size=manifest.tokenizer.vocab_size,
        shards=len(manifest.shards),
        length_percentiles=_percentiles(found.lengths),
        sources={name: _of_source(source) for name, source in sources.items()},
        rejected_by_reason=accounts.rejected_by_reason(directory, manifest.rejected),
    )


def _of_source(source: SourceCount) -> SourceStats:
    tokens = sum(source.lengths)
    return SourceStats(
        documents=len(source.lengths),
        tokens=tokens,
        bytes=source.bytes,
        bytes_per_token=source.bytes / tokens,
        byte_fallback=source.in_bytes / tokens,
    )


def lines(found: Stats) -> list[str]:
    """The statistics as aligned lines."""
    rows = [
        ("documents", f"{found.documents:,}"),
        ("rejected", f"{found.rejected:,}"),
        *((f"  {reason}", f"{count:,}") for reason, count in found.rejected_by_reason.items()),
        ("tokens", f"{found.tokens:,}"),
        ("bytes of text", f"{found.bytes:,}"),
        ("bytes a token", f"{found.bytes_per_token:.3f}"),
        ("byte fallback", f"{found.byte_fallback:.3%} of tokens"),
        ("vocabulary", f"{found.vocab_size:,}"),
        ("shards", f"{found.shards:,}"),
    ]
    for percent, length in found.length_percentiles.items():
        rows.append((f"length at {percent}%", f"{length:,} tokens"))
    for name, source in found.sources.items():
        rows.append((f"source {name}", f"{source.documents:,} documents, {source.tokens:,} tokens"))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def closing(directory: Path, manifest: Manifest, seconds: float) -> list[str]:
    """The last lines of `data-prep run`: numbers, the path, the next command.

    Raises DataError where the list of rejects is cut.
    """
    left_out = {
        "rejected": manifest.rejected,
        "dropped by cleaning": manifest.dropped,
        "duplicates": manifest.duplicates,
    }
    total = manifest.documents + sum(left_out.values())
    parts = [f"{count:,} {what}" for what, count in left_out.items() if count or what == "rejected"]
    rejected = accounts.rejected_by_reason(directory, manifest.rejected)
    shown = [
        f"{total:,} records in: {manifest.documents:,} documents out, {', '.join(parts)}",
        f"{manifest.tokens:,} tokens in {len(manifest.shards):,} shards, "
        f"{manifest.text_bytes / manifest.tokens:.3f} bytes a token, vocabulary "
        f"{manifest.tokenizer.vocab_size:,}",
        f"tokenizer: {manifest.tokenizer.file}, {_marks(manifest)}",
    ]
    if seconds:
        rate = manifest.text_bytes / 1e6 / seconds
        shown.append(f"{seconds:,.1f} s, {rate:,.2f} MB/s of text")
    for reason, count in rejected.items():
        shown.append(f"rejected: {count:,} x {reason} (each in {directory / REJECTS})")
    if manifest.dropped or manifest.duplicates:
        shown.append(f"why, by source, with samples: {directory / ACCOUNTS}")
    shown.append(f"data set: {directory}")
    shown.append(
        f"next: data-prep report {directory}, or pretrain train with data.train={directory}"
    )
    return shown


def _marks(manifest: Manifest) -> str:
    """Which tokens enclose a document."""
    named = (("BOS", manifest.tokenizer.bos_id), ("EOS", manifest.tokenizer.eos_id))
    return ", ".join(f"no {name}" if id is None else f"{name} is {id}" for name, id in named)


def _percentiles(lengths: np.ndarray) -> dict[str, int]:
    values = np.percentile(lengths, _PERCENTILES, method="lower")
    return {str(percent): int(value) for percent, value in zip(_PERCENTILES, values, strict=True)}
