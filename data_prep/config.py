"""The one configuration of a data set. Free of datatrove, so that a mistake is told at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep import settings
from data_prep.settings import group, setting

# Where things lie and how fast they are made decides no byte of the data set.
_WHERE_AND_SPEED = ("root", "output", "workers")


@dataclass(frozen=True)
class SourceConfig:
    """Files of one kind and the name under which their documents are known."""

    name: str = setting("", "name that each of its documents carries")
    paths: list[str] = setting(
        [], "globs below `root` (** crosses directories); {stdlib} is Python's own library"
    )
    exclude: list[str] = setting([], "globs, as in `paths`, of files that are left out")
    format: Literal["auto", "text", "jsonl"] = setting(
        "auto", "jsonl: a document a line; text: a document a file; auto: by suffix"
    )
    text_field: str = setting("text", "key of a jsonl record's text")
    id_field: str = setting("id", "key of its id; where it is missing the id is path:line")

    def problems(self) -> list[str]:
        """What is missing."""
        found = []
        if not self.name:
            found.append("name: not set; documents carry it, e.g. name: novels")
        if not self.paths:
            found.append("paths: not set; give globs of files, e.g. paths: ['*.jsonl.gz']")
        return found


@dataclass(frozen=True)
class TokenizerConfig:
    """An existing tokenizer, or how a SentencePiece model is trained on a sample of documents."""

    path: str = setting("", "SentencePiece model or tokenizer.json to use; empty: train one")
    vocab_size: int = setting(8192, "pieces of a trained model", low=300, high=1 << 20)
    sample_bytes: int = setting(
        20_000_000, "UTF-8 bytes of text to train on, drawn over all documents", low=1
    )
    character_coverage: float = setting(
        0.9995, "share of characters that get a piece; others are spelled in bytes", low=0.9, high=1
    )


@dataclass(frozen=True)
class ShardsConfig:
    """How documents are cut into shards; training needs at least as many shards as lanes."""

    count: int = setting(0, "number of shards; 0: as many as `tokens` makes", low=0)
    tokens: int = setting(32_000_000, "tokens that a shard aims at, where count is 0", low=1)


@dataclass(frozen=True)
class Config:
    """Everything that `data-prep run` needs to know."""

    output: str = setting("", "directory of the data set; the same command on it continues")
    root: str = setting("", "directory below which sources lie; empty: the current one")
    seed: int = setting(1, "seed of the order of documents and of the sample", low=0)
    workers: int = setting(0, "processes; 0: one a core (changes the speed alone)", low=0)
    sources: list[SourceConfig] = setting([], "list of sources, see below")
    tokenizer: TokenizerConfig = group(TokenizerConfig)
    shards: ShardsConfig = group(ShardsConfig)

    def problems(self) -> list[str]:
        """What is missing or cannot be together."""
        found = []
        if not self.output:
            found.append("output: not set; give the data set's directory, e.g. output=data/novels")
        if not self.sources:
            found.append("sources: none; give a list of {name, paths}")
        names = [source.name for source in self.sources]
        for name in sorted({name for name in names if names.count(name) > 1}):
            found.append(f"sources: the name {name!r} is given twice; names tell sources apart")
        return found

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the data set, beside its inputs: kept in the manifest."""
        plain = settings.to_plain(self)
        return {key: value for key, value in plain.items() if key not in _WHERE_AND_SPEED}


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file and `key=value` words. Raises SettingsError with all."""
    return settings.load(Config, path, overrides)


def describe() -> list[str]:
    """Every key with its default and meaning."""
    return settings.describe(Config) + settings.describe(SourceConfig, "sources[].")


def differences(ours: Any, theirs: Any, key: str = "") -> list[str]:
    """Keys that differ between two plain configurations, with both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found = []
        for name in sorted(ours.keys() | theirs.keys()):
            place = f"{key}.{name}" if key else name
            found += differences(ours.get(name), theirs.get(name), place)
        return found
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        found = []
        for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            found += differences(our, their, f"{key}[{index}]")
        return found
    return [] if ours == theirs else [f"{key}: {theirs!r} there, {ours!r} now"]
