"""Settings of `data`: what is read, in which mix, and where it is cached."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from data_prep.dataset.settings import group, setting

Weight: TypeAlias = float | Sequence[Sequence[float]]
"""A source's weight; where it changes, [step, weight] for each of its values, in order from step 0:
the weight holds for the documents that begin after so many steps."""


def weight_phases(weight: Weight) -> list[tuple[int, float]]:
    """(step, weight) for each value of a weight, in order; the first step is 0."""
    if isinstance(weight, int | float):
        return [(0, weight)]
    return [(int(begin), value) for begin, value in weight]


def weight_after(step: int, phases: Sequence[tuple[int, float]]) -> float:
    """The weight after `step` steps, of `weight_phases`."""
    return [weight for begin, weight in phases if begin <= step][-1]


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
    def schedule(self) -> Weight:
        """The weight, or its values where it changes."""
        return self.weights or self.weight

    def weight_after(self, step: int) -> float:
        """The weight after `step` steps."""
        return weight_after(step, weight_phases(self.schedule))

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
