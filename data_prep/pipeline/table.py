"""The documents of a unit as a file: a table of rows of fixed width, then ids and turns of each.

A process that needs something of every document reads one column of all tables; ids are read where
a shard is written. So no process holds an object for each document of the corpus.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.dataset import durable, shards

# `first` is the number of the document's first token in the unit's file of tokens, `id` that of
# the first byte of its id behind the table. `prompt` counts the tokens of all its prompts. Where it
# has several, the tokens before each of its `turns` lie behind its id, else `turns` is 0.
# The hashes are compared as their bytes are.
ROW = np.dtype(
    [
        ("key", ">u8", 2),
        ("fingerprint", ">u8", 2),
        ("file", "<u4"),
        ("id_bytes", "<u4"),
        ("turns", "<u4"),
        ("line", "<u8"),
        ("bytes", "<u8"),
        ("tokens", "<u8"),
        ("prompt", "<u8"),
        ("first", "<u8"),
        ("id", "<u8"),
    ]
)
_PACKED = struct.Struct("<16s16sIIIQQQQQQ")
# The file begins with the number of rows.
_HEAD = 8
_TURN = "<u8"


class Rows:
    """The table of a unit while it is filled; `first` counts the tokens of its documents."""

    def __init__(self) -> None:
        self._rows, self._ids, self._first = bytearray(), bytearray(), 0

    def __len__(self) -> int:
        return len(self._rows) // ROW.itemsize

    def add(
        self,
        id: str,
        key: bytes,
        fingerprint: bytes,
        place: tuple[int, int],
        size: tuple[int, int],
        turns: Sequence[int] = (),
    ) -> None:
        """Add a document: `place` is (file, line), `size` its bytes and tokens.

        `key` decides its place in the order; `fingerprint` is empty or what exact duplicates share.
        `turns` counts the tokens before its first answer, its second prompt, and so on.
        """
        data, (file, line) = id.encode(), place
        several = turns if len(turns) > 1 else ()
        prompt = shards.prompt_tokens(turns)
        head = (key, fingerprint, file, len(data), len(several), line)
        self._rows += _PACKED.pack(*head, *size, prompt, self._first, len(self._ids))
        self._ids += data
        if several:  # as good as never in a corpus, whose every document comes by here
            self._ids += np.array(several, _TURN).tobytes()
        self._first += size[1]

    def write(self, path: Path) -> None:
        """Write the file durably."""
        with durable.replacing(path) as out:
            out.write(len(self).to_bytes(_HEAD, "little"))
            out.write(self._rows)
            out.write(self._ids)


def read(path: Path) -> np.ndarray:
    """The rows of a unit: ROW [documents]."""
    return np.fromfile(path, ROW, _count(path), offset=_HEAD)


class Picked(NamedTuple):
    """Documents of a unit: ROW [documents], and the id and the turns of each."""

    rows: np.ndarray
    ids: list[str]
    turns: list[tuple[int, ...]]


def pick(path: Path, indices: np.ndarray) -> Picked:
    """Some documents of a unit, without reading the others."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        count = int.from_bytes(data[:_HEAD], "little")
        rows = np.frombuffer(data, ROW, count, _HEAD)[indices]
        starts = rows["id"] + (_HEAD + count * ROW.itemsize)
        ends = starts + rows["id_bytes"]
        places = zip(starts.tolist(), ends.tolist(), strict=True)
        ids = [data[start:end].decode() for start, end in places]
        turns: list[tuple[int, ...]] = [(n,) if n else () for n in rows["prompt"].tolist()]
        for place in np.flatnonzero(rows["turns"]).tolist():
            start, size = int(ends[place]), int(rows["turns"][place]) * np.dtype(_TURN).itemsize
            turns[place] = tuple(np.frombuffer(data[start : start + size], _TURN).tolist())
        return Picked(rows, ids, turns)


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(_HEAD), "little")


@dataclass(frozen=True)
class Tables:
    """The tables of all units: documents are numbered from 0 in the order of the corpus.

    Unit n begins with document `starts[n]`; the last entry is the number of documents.
    """

    paths: list[Path]
    starts: np.ndarray

    @classmethod
    def of(cls, paths: list[Path]) -> Tables:
        """Count the rows of each unit."""
        return cls(paths, np.cumsum([0, *map(_count, paths)]))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def column(self, name: str) -> np.ndarray:
        """A field of all rows: [documents] or, of a hash, [documents, 2]."""
        kind, shape = ROW[name].base, ROW[name].shape
        found = np.empty((len(self), *shape), kind.newbyteorder("="))
        for path, first, stop in zip(self.paths, self.starts, self.starts[1:], strict=False):
            found[first:stop] = read(path)[name]
        return found

    def split(self, documents: np.ndarray) -> Iterator[tuple[int, slice]]:
        """The units that hold the documents, in ascending order, and which of them each holds."""
        ends = np.searchsorted(documents, self.starts)
        for unit in np.flatnonzero(np.diff(ends)).tolist():
            yield unit, slice(int(ends[unit]), int(ends[unit + 1]))

    def ids(self, documents: np.ndarray) -> Iterator[str]:
        """The ids of the documents, whose numbers are in ascending order."""
        for unit, own in self.split(documents):
            yield from pick(self.paths[unit], documents[own] - self.starts[unit])[1]


def grouped(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of keys [n, 2], equal ones as they are; which of them in it repeat the one before.

    Takes about 30 bytes a key while it runs.
    """
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    again = np.zeros(len(keys), bool)
    for word in range(2):
        ordered = keys[order, word]
        same = ordered[1:] == ordered[:-1]
        again[1:] = again[1:] & same if word else same
    return order, again
