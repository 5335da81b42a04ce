"""What a data set holds, told to a person or as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import shards, tokenizer
from data_prep.shards import DataError, Manifest

REJECTS = "rejects.jsonl"
_PERCENTILES = (0, 10, 50, 90, 99, 100)


@dataclass(frozen=True)
class SourceStats:
    """A source's share of the data set."""

    documents: int
    tokens: int
    bytes: int


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


def stats(directory: Path) -> Stats:
    """Read every shard of a data set and count. Raises DataError where one is damaged."""
    manifest = shards.read_manifest(directory)
    fallback = np.zeros(manifest.tokenizer.vocab_size, dtype=bool)
    fallback[tokenizer.load(directory / manifest.tokenizer.file).byte_tokens] = True
    lengths: list[int] = []
    sources: dict[str, SourceStats] = {}
    in_bytes = 0
    for info in manifest.shards:
        shards.check_shard(directory / info.name, info)
        for document in shards.read_shard(directory / info.name, info):
            lengths.append(len(document.tokens))
            in_bytes += int(fallback[document.tokens].sum())
            before = sources.get(document.source, SourceStats(0, 0, 0))
            sources[document.source] = SourceStats(
                before.documents + 1,
                before.tokens + len(document.tokens),
                before.bytes + document.bytes,
            )
    text_bytes = sum(source.bytes for source in sources.values())
    return Stats(
        documents=len(lengths),
        rejected=manifest.rejected,
        tokens=sum(lengths),
        bytes=text_bytes,
        bytes_per_token=text_bytes / sum(lengths),
        byte_fallback=in_bytes / sum(lengths),
        vocab_size=manifest.tokenizer.vocab_size,
        shards=len(manifest.shards),
        length_percentiles=_percentiles(lengths),
        sources=dict(sorted(sources.items())),
        rejected_by_reason=rejected_by_reason(directory, manifest),
    )


def rejected_by_reason(directory: Path, manifest: Manifest) -> dict[str, int]:
    """Rejected records by reason, the commonest first. Raises DataError where the list is cut."""
    path = directory / REJECTS
    try:
        with path.open(encoding="utf-8") as file:
            counts = Counter(json.loads(line)["reason"] for line in file)
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path}: cannot be read; prepare the data set anew") from None
    if counts.total() != manifest.rejected:
        raise DataError(
            f"{path}: lists {counts.total()} records, the manifest says {manifest.rejected}"
        )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


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
    """What `data-prep run` says at its end: numbers, the path, what to type next."""
    total = manifest.documents + manifest.rejected
    told = [
        f"{total:,} records in: {manifest.documents:,} documents out, "
        f"{manifest.rejected:,} rejected",
        f"{manifest.tokens:,} tokens in {len(manifest.shards):,} shards, "
        f"{manifest.text_bytes / manifest.tokens:.3f} bytes a token, vocabulary "
        f"{manifest.tokenizer.vocab_size:,}",
        f"tokenizer: {manifest.tokenizer.file}, {_marks(manifest)}",
    ]
    if seconds:
        rate = manifest.text_bytes / 1e6 / seconds
        told.append(f"{seconds:,.1f} s, {rate:,.2f} MB/s of text")
    for reason, count in rejected_by_reason(directory, manifest).items():
        told.append(f"rejected: {count:,} x {reason} (each in {directory / REJECTS})")
    told.append(f"data set: {directory}")
    told.append(f"next: data-prep stats {directory}, or pretrain train with data.train={directory}")
    return told


def _marks(manifest: Manifest) -> str:
    """Which tokens stand around a document."""
    named = (("BOS", manifest.tokenizer.bos_id), ("EOS", manifest.tokenizer.eos_id))
    return ", ".join(f"no {name}" if id is None else f"{name} is {id}" for name, id in named)


def _percentiles(lengths: list[int]) -> dict[str, int]:
    values = np.percentile(lengths, _PERCENTILES, method="lower")
    return {str(percent): int(value) for percent, value in zip(_PERCENTILES, values, strict=True)}
