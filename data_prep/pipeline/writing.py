"""The stages that write the shards: all workers take part, however few shards there are.

OrderDocuments leaves a recipe: the documents in the order of the shards, cut into parts. A shard of
one part is written as it is; the parts of a larger one are units of their own, joined afterwards.
Rows, ids and tokens are read unit by unit for a part or for a block of tokens at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from abc import ABC
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from data_prep.dataset import durable, shards
from data_prep.dataset.shards import Document, ShardInfo, StoredDocument
from data_prep.pipeline import order, progress, table
from data_prep.pipeline.stages import Stage
from data_prep.pipeline.table import Picked, Tables
from data_prep.pipeline.workspace import Work

# A document by its number in the corpus, and the number that its id ends with; see order.py.
_ENTRY = np.dtype([("document", "<u8"), ("number", "<u4")])
# Documents of a part at most: few enough for a shard of short ones to be shared between workers.
_PART = 1 << 15
# Tokens that are held in memory at a time.
_BLOCK = 1 << 22


def write_recipe(work: Work, documents: np.ndarray, numbers: np.ndarray) -> None:
    """Write the documents in the order of the shards, durably; `numbers` are those of their ids."""
    work.recipe.parent.mkdir(exist_ok=True)
    with durable.replacing(work.recipe) as out:
        for first in range(0, len(documents), _PART):
            own = slice(first, first + _PART)
            entries = np.empty(len(documents[own]), _ENTRY)
            entries["document"], entries["number"] = documents[own], numbers[own]
            out.write(entries.tobytes())


def parts(runs: Iterable[range]) -> list[tuple[int, int, int]]:
    """(shard, first document, the one after the last) of each part of shards of these documents."""
    found = []
    for shard, run in enumerate(runs):
        count = -(-len(run) // _PART)
        ends = [run.start + len(run) * part // count for part in range(count + 1)]
        found += [(shard, first, stop) for first, stop in itertools.pairwise(ends)]
    return found


@dataclasses.dataclass(frozen=True)
class _Part:
    """Documents `first` to `stop` of the recipe; they are of one shard and have `bytes` of text."""

    shard: int
    first: int
    stop: int
    bytes: int


class _Writing(Stage, ABC):
    """What both stages know: `shards`, the parts of each; `shared`, all those of several parts.

    `numbers` are those of each shard in `shared`: none where it is of one part.
    """

    def measure(self) -> list[int]:
        self.shards: list[list[_Part]] = []
        for shard, *place in self.work.read("order", 0)["parts"]:
            if shard == len(self.shards):
                self.shards.append([])
            self.shards[shard].append(_Part(shard, *place))
        self.shared: list[_Part] = []
        self.numbers: list[range] = []
        for own in self.shards:
            first = len(self.shared)
            self.shared += own if len(own) > 1 else []
            self.numbers.append(range(first, len(self.shared)))
        return []


class WriteParts(_Writing):
    """Write the parts of shards of several parts; a unit's result are the fields of ShardInfo."""

    name = "parts"
    label = "writing large shards in parts"

    def measure(self) -> list[int]:
        super().measure()
        return [part.bytes for part in self.shared]

    def do(self, unit: int) -> Any:
        part = self.shared[unit]
        path = self.work.part(unit)
        path.parent.mkdir(exist_ok=True)
        dtype = shards.dtype_of(self.work.tokenizer.vocab_size)
        first = part.first - self.shards[part.shard][0].first
        found = shards.write_part(path, _documents(self.work, part, dtype), dtype, first)
        return dataclasses.asdict(found)


class WriteShards(_Writing):
    """Write the shards; a unit is a shard, its result the fields of ShardInfo."""

    name = "shards"
    label = "writing shards"

    def measure(self) -> list[int]:
        super().measure()
        return [sum(part.bytes for part in own) for own in self.shards]

    def run(self, units: Iterable[int]) -> None:
        """As any stage; parts are removed once the shard is marked as done."""
        for unit in units:
            super().run([unit])
            for number in self.numbers[unit]:
                self.work.part(number).unlink(missing_ok=True)

    def do(self, unit: int) -> Any:
        path = self.work.output / shards.shard_name(unit)
        if own := self.numbers[unit]:
            infos = [ShardInfo(**self.work.read(WriteParts.name, number)) for number in own]
            found = shards.join_parts(path, [self.work.part(number) for number in own], infos)
            progress.count(self.sizes[unit])
        else:
            dtype = shards.dtype_of(self.work.tokenizer.vocab_size)
            (part,) = self.shards[unit]
            found = shards.write_shard(path, _documents(self.work, part, dtype), dtype)
        return dataclasses.asdict(found)


def _documents(work: Work, part: _Part, dtype: str) -> Iterator[Document | StoredDocument]:
    """The documents of a part in the order of the recipe."""
    start = part.first * _ENTRY.itemsize
    entries = np.fromfile(work.recipe, _ENTRY, part.stop - part.first, offset=start)
    units, (rows, ids, turns) = _look_up(work.tables, entries["document"])
    for block in _blocks(rows["tokens"].tolist()):
        found: list[np.ndarray] = []
        if len(block) > 1 or rows["tokens"][block.start] <= _BLOCK:
            own = slice(block.start, block.stop)
            found = _tokens(work, units[own], rows[own], dtype)
        for at in block:
            row = rows[at]
            id = order.named(ids[at], int(entries["number"][at]))
            size, count = int(row["bytes"]), int(row["tokens"])
            source = work.files[row["file"]].source
            if found:
                yield Document(id, source, size, found[at - block.start], turns[at])
            else:
                stored = _stored(work, int(units[at]), int(row["first"]), count, dtype)
                yield StoredDocument(id, source, size, count, stored, turns[at])
            progress.count(size, count)


def _look_up(tables: Tables, documents: np.ndarray) -> tuple[np.ndarray, Picked]:
    """The unit and the row of each document; every unit's file is opened once."""
    units, count = np.empty(len(documents), np.int64), len(documents)
    found = Picked(np.empty(count, table.ROW), [""] * count, [()] * count)
    by_unit = np.argsort(documents)
    ascending = documents[by_unit].astype(np.int64)
    for unit, own in tables.split(ascending):
        places = by_unit[own]
        units[places] = unit
        indices = ascending[own] - tables.starts[unit]
        found.rows[places], ids, turns = table.pick(tables.paths[unit], indices)
        for place, id, own_turns in zip(places.tolist(), ids, turns, strict=True):
            found.ids[place], found.turns[place] = id, own_turns
    return units, found


def _blocks(tokens: list[int]) -> Iterator[range]:
    """Consecutive documents with at most a block of tokens together, or one with more."""
    first = size = 0
    for at, count in enumerate(tokens):
        if size and size + count > _BLOCK:
            yield range(first, at)
            first, size = at, 0
        size += count
    yield range(first, len(tokens))


def _tokens(work: Work, units: np.ndarray, rows: np.ndarray, dtype: str) -> list[np.ndarray]:
    """The tokens of each document, read in the order in which they are stored."""
    kind = np.dtype(dtype).newbyteorder("<")
    found = [np.empty(0, kind)] * len(rows)
    places = np.lexsort((rows["first"], units))
    ends = np.flatnonzero(np.diff(units[places], append=-1)) + 1
    for own in np.split(places, ends[:-1]):
        with work.tokens(int(units[own[0]])).open("rb") as file:
            stored = rows[["first", "tokens"]][own].tolist()
            for place, (first, count) in zip(own.tolist(), stored, strict=True):
                size = count * kind.itemsize
                data = os.pread(file.fileno(), size, first * kind.itemsize)
                assert len(data) == size, f"{file.name} is shorter than its table says"
                found[place] = np.frombuffer(data, kind)
    return found


def _stored(work: Work, unit: int, first: int, count: int, dtype: str) -> Iterator[np.ndarray]:
    """The tokens of a document, a block at a time."""
    for start in range(first, first + count, _BLOCK):
        yield work.read_tokens(unit, start, min(_BLOCK, first + count - start), dtype)
