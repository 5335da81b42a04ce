"""Lanes: endless streams of documents, laid end to end, cut into windows.

Lane g of G reads, in epoch e, every G-th shard of a permutation keyed by (seed, e), starting at g.
What it gives depends on the data set, G, g and the seed alone, and its place is four integers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep import shards
from data_prep.shards import DataError, Document

IGNORE = -100  # the target that torch's cross-entropy leaves out


@dataclass(frozen=True)
class LanePlace:
    """Where a lane's next token lies.

    `shard` counts within the lane's shards of that epoch; `token` is an offset in the laid-out
    document. A document that was read to its end is behind the place: (…, document + 1, 0).
    """

    epoch: int
    shard: int
    document: int
    token: int


START = LanePlace(0, 0, 0, 0)


class Dataset:
    """The data set in a directory. Safe to share between threads.

    A shard's size and sha256 are checked before its first use, once in the life of this object;
    `checked` says for each shard whether they were.
    Raises DataError where the directory is no data set or holds no tokens.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = shards.read_manifest(directory)
        info = self.manifest.tokenizer
        self._head = np.array([] if info.bos_id is None else [info.bos_id], np.int64)
        self._tail = np.array([] if info.eos_id is None else [info.eos_id], np.int64)
        # Lanes would look for a first token forever.
        marks = len(self._head) + len(self._tail)
        if self.manifest.tokens + self.manifest.documents * marks == 0:
            raise DataError(f"{directory}: the data set holds no tokens; prepare it from more text")
        self._locks = [threading.Lock() for _ in self.manifest.shards]
        self.checked = [False for _ in self.manifest.shards]

    def check(self, shard: int) -> None:
        """Check the shard with this index unless that was done. Raises DataError."""
        info = self.manifest.shards[shard]
        with self._locks[shard]:
            if not self.checked[shard]:
                shards.check_shard(self.directory / info.name, info)
                self.checked[shard] = True

    def read(self, shard: int, skip: int = 0) -> Iterator[Document]:
        """The documents of a shard, after the first `skip`, streamed. Raises DataError."""
        self.check(shard)
        info = self.manifest.shards[shard]
        yield from shards.read_shard(self.directory / info.name, info, skip)

    def documents(self) -> Iterator[Document]:
        """Every document once, in the order of the manifest's shards. Raises DataError."""
        for shard in range(len(self.manifest.shards)):
            yield from self.read(shard)

    def lay_out(self, document: Document) -> np.ndarray:
        """What a model sees of a document: [BOS if any] + tokens + [EOS if any], int64 [n]."""
        return np.concatenate([self._head, document.tokens, self._tail], dtype=np.int64)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The permutation of shard indices keyed by (seed, epoch).

        Of Philox's raw stream, which numpy promises to keep; its shuffles may change.
        """
        bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
        return np.argsort(bits.random_raw(len(self.manifest.shards)), kind="stable")


class Lane:
    """Lane `index` of `lanes`, from `place` on. Not usable after it raised.

    Raises DataError where the data set has fewer shards than lanes or has no such place.
    """

    def __init__(
        self, dataset: Dataset, index: int, lanes: int, seed: int, place: LanePlace = START
    ) -> None:
        count = len(dataset.manifest.shards)
        if count < lanes:
            raise DataError(
                f"{dataset.directory}: {count} shards cannot feed {lanes} lanes, each reads shards "
                f"of its own; set data.lanes to {count} or less, or prepare the data set again "
                "with more shards (data-prep's shards.count, or a smaller shards.tokens)"
            )
        assert 0 <= index < lanes
        self.place = place
        self._dataset = dataset
        self._index, self._lanes, self._seed = index, lanes, seed
        self._reader: Iterator[Document] | None = None
        self._document: np.ndarray | None = None
        if min(place.epoch, place.shard, place.document, place.token) < 0:
            raise self._foreign_place()
        self._shards = self._shards_of(place.epoch)
        self._check_place()

    @property
    def next_shard(self) -> int:
        """Index in the data set of the shard that this lane opens next."""
        following = self.place.shard + 1
        if following < len(self._shards):
            return int(self._shards[following])
        return int(self._shards_of(self.place.epoch + 1)[0])

    def window(self, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next `length` tokens: tokens int64, targets int64, starts bool, all [length].

        The target of a token is the token after it in its document, also where that lies beyond
        the window; of a document's last token it is IGNORE. `starts` marks the first token of each
        document. Raises DataError.
        """
        tokens = np.empty(length, np.int64)
        targets = np.full(length, IGNORE, np.int64)
        starts = np.zeros(length, np.bool_)
        filled = 0
        while filled < length:
            if self._document is None:
                self._document = self._open_document()
            document, offset = self._document, self.place.token
            taken = min(length - filled, len(document) - offset)
            tokens[filled : filled + taken] = document[offset : offset + taken]
            following = document[offset + 1 : offset + 1 + taken]
            targets[filled : filled + len(following)] = following
            starts[filled] = offset == 0
            filled += taken
            if offset + taken == len(document):
                self._pass_document()
            else:
                self.place = replace(self.place, token=offset + taken)
        return tokens, targets, starts

    def _shards_of(self, epoch: int) -> np.ndarray:
        return self._dataset.order(self._seed, epoch)[self._index :: self._lanes]

    def _open_document(self) -> np.ndarray:
        """The document at the place, laid out; moves on over shard ends and empty documents."""
        while True:
            if self._reader is None:
                shard = int(self._shards[self.place.shard])
                self._reader = self._dataset.read(shard, skip=self.place.document)
            found = next(self._reader, None)
            if found is None:
                self._pass_shard()
                continue
            document = self._dataset.lay_out(found)
            if self.place.token >= len(document) and self.place.token > 0:
                raise self._foreign_place()
            if len(document):
                return document
            self._pass_document()

    def _pass_document(self) -> None:
        self._document = None
        self.place = replace(self.place, document=self.place.document + 1, token=0)

    def _pass_shard(self) -> None:
        self._reader = None
        epoch, shard = self.place.epoch, self.place.shard + 1
        if shard == len(self._shards):
            epoch, shard = epoch + 1, 0
            self._shards = self._shards_of(epoch)
        self.place = LanePlace(epoch, shard, 0, 0)

    def _check_place(self) -> None:
        place = self.place
        if place.shard >= len(self._shards):
            raise self._foreign_place()
        info = self._dataset.manifest.shards[int(self._shards[place.shard])]
        if place.document > info.documents or (place.document == info.documents and place.token):
            raise self._foreign_place()

    def _foreign_place(self) -> DataError:
        return DataError(
            f"{self._dataset.directory}: lane {self._index} of {self._lanes} has no {self.place}; "
            "it was saved with another data set, seed or number of lanes: use those it was saved "
            "with"
        )
