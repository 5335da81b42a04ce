"""What a data set holds, as lines or as JSON."""

from __future__ import annotations

import heapq
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import accounts
from data_prep.accounts import ACCOUNTS, REJECTS
from data_prep.dataset import shards
from data_prep.dataset.shards import Manifest
from data_prep.dataset.wording import counted
from data_prep.tokenizer import marks, tokenizer
from data_prep.tokenizer.contract import NFC_REMEDY

_PERCENTILES = (0, 10, 50, 90, 99, 100)
_LONGEST = 20
# Words are counted in the first tokens of a source's first documents: shards are shuffled by key,
# so these are a random sample, and the same one each time.
_WORD_TOKENS = 400_000
_DOCUMENT_WORD_TOKENS = 20_000


@dataclass
class SourceStats:
    """A source of a data set: `lengths` are tokens of each document, `bytes` of its text in UTF-8.

    `byte_tokens` spell bytes of a character without its own piece: byte-fallback pieces, or pieces
    of a byte-level BPE that are not whole characters. `words`, separated by white space, were
    counted in a sample of `word_tokens` tokens.
    """

    lengths: array[int] = field(default_factory=lambda: array("Q"))
    tokens: int = 0
    bytes: int = 0
    byte_tokens: int = 0
    words: int = 0
    word_tokens: int = 0

    def plain(self) -> dict[str, int | float]:
        """Its sums and rates, JSON-able."""
        return {
            "documents": len(self.lengths),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bytes_per_token": self.bytes / self.tokens,
            "byte_fallback": self.byte_tokens / self.tokens,
        }


@dataclass(frozen=True)
class Stats:
    """A data set counted in one pass. `longest` are (tokens, id, source), the longest first."""

    manifest: Manifest
    sources: dict[str, SourceStats]
    longest: list[tuple[int, str, str]]
    rejected_by_reason: dict[str, int]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every document: uint64 [documents]."""
        return np.concatenate([np.asarray(source.lengths) for source in self.sources.values()])

    def plain(self) -> dict[str, Any]:
        """The sums and rates of the data set and its sources, JSON-able."""
        manifest, sources = self.manifest, self.sources.values()
        text_bytes = sum(source.bytes for source in sources)
        percentiles = np.percentile(self.lengths, _PERCENTILES, method="lower")
        return {
            "documents": manifest.documents,
            "rejected": manifest.rejected,
            "dropped": manifest.dropped,
            "duplicates": manifest.duplicates,
            "tokens": manifest.tokens,
            "bytes": text_bytes,
            "bytes_per_token": text_bytes / manifest.tokens,
            "byte_fallback": sum(source.byte_tokens for source in sources) / manifest.tokens,
            "vocab_size": manifest.tokenizer.vocab_size,
            "shards": len(manifest.shards),
            "length_percentiles": dict(
                zip(map(str, _PERCENTILES), map(int, percentiles), strict=True)
            ),
            "sources": {name: source.plain() for name, source in self.sources.items()},
            "rejected_by_reason": self.rejected_by_reason,
        }


def stats(directory: Path, words: bool = False) -> Stats:
    """Read every shard of a data set and count; `words`: decode a sample too.

    Raises DataError where a shard or the list of rejects is damaged. Memory: 8 bytes per document.
    """
    manifest = shards.read_manifest(directory)
    model = tokenizer.load(directory / manifest.tokenizer.file)
    fallback = np.zeros(manifest.tokenizer.vocab_size, dtype=bool)
    fallback[model.byte_tokens] = True
    sources: dict[str, SourceStats] = {}
    longest: list[tuple[int, int, str, str]] = []
    for number, document in enumerate(shards.read_documents(directory, manifest), 1):
        source, tokens = sources.setdefault(document.source, SourceStats()), document.tokens
        source.lengths.append(len(tokens))
        source.tokens += len(tokens)
        source.bytes += document.bytes
        source.byte_tokens += int(fallback[tokens].sum())
        if words and source.word_tokens < _WORD_TOKENS:
            sample = tokens[:_DOCUMENT_WORD_TOKENS]
            source.words += len(model.decode(sample).split())
            source.word_tokens += len(sample)
        # Of equally long ones the first; the number also decides before ids are compared.
        entry = (len(tokens), -number, document.id, document.source)
        (heapq.heappush if number <= _LONGEST else heapq.heappushpop)(longest, entry)
    listed = [(tokens, id, source) for tokens, _, id, source in sorted(longest, reverse=True)]
    rejected = accounts.rejected_by_reason(directory, manifest.rejected)
    return Stats(manifest, dict(sorted(sources.items())), listed, rejected)


def lines(found: Stats) -> list[str]:
    """The statistics as aligned lines."""
    plain = found.plain()
    rows = [
        ("documents", f"{plain['documents']:,}"),
        ("rejected", f"{plain['rejected']:,}"),
        *((f"  {reason}", f"{count:,}") for reason, count in found.rejected_by_reason.items()),
        ("dropped by cleaning", f"{plain['dropped']:,}"),
        ("duplicates", f"{plain['duplicates']:,}"),
        ("tokens", f"{plain['tokens']:,}"),
        ("bytes of text", f"{plain['bytes']:,}"),
        ("bytes per token", f"{plain['bytes_per_token']:.3f}"),
        ("byte fallback", f"{plain['byte_fallback']:.3%} of tokens"),
        ("vocabulary", f"{plain['vocab_size']:,}"),
        ("shards", f"{plain['shards']:,}"),
    ]
    for percent, length in plain["length_percentiles"].items():
        rows.append((f"length at {percent}%", counted(length, "token")))
    for name, source in found.sources.items():
        counts = f"{counted(len(source.lengths), 'document')}, {counted(source.tokens, 'token')}"
        rows.append((f"source {name}", counts))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def closing(directory: Path, manifest: Manifest, seconds: float) -> list[str]:
    """The last lines of `data-prep run`: numbers, the path, the next command.

    Raises DataError where the list of rejects is cut.
    """
    left_out = {
        "rejected": manifest.rejected,
        "dropped by cleaning": manifest.dropped,
        "duplicate" if manifest.duplicates == 1 else "duplicates": manifest.duplicates,
    }
    total = manifest.documents + sum(left_out.values())
    parts = [f"{count:,} {what}" for what, count in left_out.items() if count or what == "rejected"]
    rejected = accounts.rejected_by_reason(directory, manifest.rejected)
    ids, *more = marks.lines(tokenizer.load(directory / manifest.tokenizer.file))
    shown = [
        f"{counted(total, 'record')} in: {counted(manifest.documents, 'document')} out, "
        f"{', '.join(parts)}",
        f"{counted(manifest.tokens, 'token')} in {counted(len(manifest.shards), 'shard')}, "
        f"{manifest.text_bytes / manifest.tokens:.3f} bytes per token, vocabulary "
        f"{manifest.tokenizer.vocab_size:,}",
        f"tokenizer: {manifest.tokenizer.file}, {ids}",
        *more,
    ]
    if seconds:
        rate = manifest.text_bytes / 1e6 / seconds
        shown.append(f"{seconds:,.1f} s, {rate:,.2f} MB/s of text")
    for reason, count in rejected.items():
        shown.append(f"rejected: {count:,} x {reason} (each in {directory / REJECTS})")
    shown += _hints(directory, manifest)
    if manifest.dropped or manifest.duplicates:
        shown.append(f"why, by source, with samples: {directory / ACCOUNTS}")
    shown.append(f"data set: {directory}")
    shown.append(
        f"next: data-prep report {directory}, or pretrain train with data.train={directory}"
    )
    return shown


def _hints(directory: Path, manifest: Manifest) -> list[str]:
    """What the user may have meant otherwise, and what to set."""
    composed = sum(NFC_REMEDY in reject.text for reject in accounts.rejects(directory))
    hints = [f"{composed:,} of these would be kept with {NFC_REMEDY}"] if composed else []
    read = accounts.load(directory).sources if (directory / ACCOUNTS).exists() else {}
    names = [source["name"] for source in manifest.configuration.get("sources", [])]
    return hints + [
        f"no record was found in the files of source {name}; check its paths and format"
        for name in names
        if read and name not in read
    ]
