"""Lanes: endless streams of concatenated documents, cut into windows.

A lane draws the source (data set) of each of its documents by key, and reads each source on its
own: lane g of G reads, in epoch e, every G-th shard of a permutation keyed by (seed, e), from the
g-th on. Its tokens depend on the sources, their weights, G, g and the seed alone, and its place is
a few integers.

Weights may change with the number of steps. A step is a window of each lane, so the number of a
lane's window says which weights hold for the documents that begin in it; a document that is open
is read to its end.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset import shards
from data_prep.dataset.shards import DataError, Document
from data_prep.dataset.wording import counted
from pretrain.config.data import CacheConfig, Weight, weight_after, weight_phases
from pretrain.data.files import files_of
from pretrain.data.packing import LaidOut, Packer, Window


@dataclass(frozen=True)
class SourcePlace:
    """Where a lane's next document of a source is.

    `shard` counts within the lane's shards of that epoch, `document` within the shard. A document
    that was read to its end is behind the place; `read` counts those, over all epochs.
    """

    epoch: int = 0
    shard: int = 0
    document: int = 0
    read: int = 0


@dataclass(frozen=True)
class LanePlace:
    """Where a lane's next token is.

    `token` is an offset in the laid-out document that is next in `source`. Where it is 0 no
    document is open: the source of the next one is drawn as it is opened.
    """

    source: int
    token: int
    sources: tuple[SourcePlace, ...]

    @staticmethod
    def of(plain: Mapping[str, Any]) -> LanePlace:
        """The place of which `dataclasses.asdict` gave `plain`, also by way of JSON."""
        places = tuple(SourcePlace(**place) for place in plain["sources"])
        return LanePlace(plain["source"], plain["token"], places)

    @property
    def drawn(self) -> int:
        """The number of the next draw: how many documents the lane has read to their end."""
        return sum(place.read for place in self.sources)


class Dataset:
    """The data set in a directory or under a URL. Safe to share between threads.

    A shard's size and sha256 are checked before its first use, once in the life of this object;
    `checked` says for each shard whether they were. Shards under a URL are fetched into `cache`.
    Raises DataError where there is no data set or it holds no tokens.
    """

    def __init__(self, location: Path | str, cache: CacheConfig | None = None) -> None:
        self.files = files_of(location, cache or CacheConfig())
        self.location = self.files.location
        self.manifest = self.files.manifest
        info = self.manifest.tokenizer
        self._head = np.array([] if info.bos_id is None else [info.bos_id], np.int64)
        self._tail = np.array([] if info.eos_id is None else [info.eos_id], np.int64)
        # Lanes would look for a first token forever.
        marks = len(self._head) + len(self._tail)
        laid_out = self.manifest.tokens + self.manifest.documents * marks
        if laid_out == 0:
            raise DataError(f"{location}: the data set holds no tokens; prepare it from more text")
        self.mean_length = laid_out / self.manifest.documents  # tokens of a laid-out document
        self._locks = [threading.Lock() for _ in self.manifest.shards]
        self.checked = [False for _ in self.manifest.shards]

    def check(self, shard: int) -> None:
        """Have the shard with this index here, checked. Raises DataError."""
        with self._held(shard):
            pass

    def read(self, shard: int, skip: int = 0) -> Iterator[Document]:
        """The documents of a shard, after the first `skip`, streamed. Raises DataError."""
        with self._held(shard) as path:
            yield from shards.read_shard(path, self.manifest.shards[shard], skip)

    @contextlib.contextmanager
    def _held(self, shard: int) -> Iterator[Path]:
        """The shard as a local file, which stays there in this block."""
        info = self.manifest.shards[shard]
        with contextlib.ExitStack() as stack:
            with self._locks[shard]:
                path = stack.enter_context(self.files.shard(info, self.checked[shard]))
                self.checked[shard] = True
            yield path

    def documents(self) -> Iterator[Document]:
        """Every document once, in the order of the manifest's shards. Raises DataError."""
        for shard in range(len(self.manifest.shards)):
            yield from self.read(shard)

    def lay_out(self, document: Document) -> np.ndarray:
        """What a model sees of a document: [BOS if any] + tokens + [EOS if any], int64 [n]."""
        return np.concatenate([self._head, document.tokens, self._tail], dtype=np.int64)

    def weigh(self, document: Document, prompt_weight: float) -> np.ndarray:
        """The weight in the loss of each token of the laid-out document, float32 [n].

        BOS and prompts have `prompt_weight`; answers, the EOS after them and plain documents 1.
        """
        weights = np.ones(len(self._head) + len(document.tokens) + len(self._tail), np.float32)
        head = len(self._head)
        # Prompts are the even ones of the parts that the turns divide a document into.
        for start, stop in zip((-head, *document.turns[1::2]), document.turns[::2], strict=False):
            weights[head + start : head + stop] = prompt_weight
        return weights

    def order(self, seed: int, epoch: int, source: int = 0) -> np.ndarray:
        """The permutation of shard indices keyed by (seed, epoch), and by the source's number.

        Of Philox's raw stream, which numpy promises to keep; its shuffles may change.
        """
        bits = _philox(seed, epoch, (0, 0, source, 0))
        return np.argsort(bits.random_raw(len(self.manifest.shards)), kind="stable")


class Mix:
    """The sources of a run, and how a lane draws from them.

    `weights` are shares of tokens, in any unit, at every step. A document of source s is drawn
    with a probability in proportion to weight_s / (mean length of its laid-out documents), so that
    the share of its tokens is weight_s / (sum of weights): exactly in expectation, whatever the
    documents' lengths.
    `prompt_weight` is that of a prompt's tokens in the loss.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        weights: Sequence[Weight] = (1.0,),
        prompt_weight: float = 1.0,
    ) -> None:
        self.datasets = list(datasets)
        self.prompt_weight = prompt_weight
        schedules = [weight_phases(weight) for weight in weights]
        self._begins = sorted({begin for phases in schedules for begin, _ in phases})
        self._bounds = [
            self._bounds_of([weight_after(begin, phases) for phases in schedules])
            for begin in self._begins
        ]

    def _bounds_of(self, weights: Sequence[float]) -> list[float]:
        """Where the parts of [0, 1) end in which a draw is of each source."""
        pairs = zip(weights, self.datasets, strict=True)
        sums = list(itertools.accumulate(weight / data.mean_length for weight, data in pairs))
        # Divided by itself the last one is exactly 1, which no draw reaches: weight 0 is never.
        return [total / sums[-1] for total in sums]

    @property
    def is_weighted(self) -> bool:
        """Whether any token's weight in the loss is another than 1."""
        prompts = any(data.manifest.prompt_tokens for data in self.datasets)
        return prompts and self.prompt_weight != 1.0

    def draw(self, seed: int, lane: int, number: int, step: int = 0) -> int:
        """The source of the document of this number in a lane, which begins after `step` steps: a
        function of these alone."""
        if len(self.datasets) == 1:
            return 0
        # The counter's last word sets these streams apart from those of `order`.
        bits = _philox(seed, lane, (number, 0, 0, 1)).random_raw()
        return bisect_right(self._bounds_after(step), (int(bits) >> 11) * 2.0**-53)

    def drawn(self, step: int) -> list[int]:
        """The sources that a document which begins after `step` steps may be of."""
        parts = itertools.pairwise([0.0, *self._bounds_after(step)])
        return [source for source, (begin, end) in enumerate(parts) if begin < end]

    def _bounds_after(self, step: int) -> list[float]:
        return self._bounds[bisect_right(self._begins, step) - 1]


def _philox(seed: int, key: int, counter: tuple[int, int, int, int]) -> np.random.Philox:
    return np.random.Philox(
        key=np.array([seed, key], dtype=np.uint64), counter=np.array(counter, dtype=np.uint64)
    )


class _Stream:
    """The documents of one source that a lane reads, from `place` on, without end."""

    def __init__(
        self, dataset: Dataset, source: int, index: int, lanes: int, seed: int, place: SourcePlace
    ) -> None:
        count = len(dataset.manifest.shards)
        if count < lanes:
            raise DataError(
                f"{dataset.location}: {counted(count, 'shard')} cannot feed "
                f"{counted(lanes, 'lane')}, each of which reads its own; set data.lanes to {count} "
                "or less, or cut the data set into more shards (data-prep reshard, or its "
                "shards.count or a smaller shards.tokens)"
            )
        assert 0 <= index < lanes
        self.place = place
        self.dataset = dataset
        self._key = (seed, source)
        self._index, self._lanes = index, lanes
        self._reader: Iterator[Document] | None = None
        self._shards = self._shards_of(place.epoch)

    @property
    def next_shard(self) -> int:
        """Index in the data set of the shard that is opened next."""
        following = self.place.shard + (self._reader is not None)
        if following < len(self._shards):
            return int(self._shards[following])
        return int(self._shards_of(self.place.epoch + 1)[0])

    def open_document(self) -> Document:
        """The document at the place; moves on over shard ends."""
        while True:
            if self._reader is None:
                shard = int(self._shards[self.place.shard])
                self._reader = self.dataset.read(shard, skip=self.place.document)
            found = next(self._reader, None)
            if found is not None:
                return found
            self._pass_shard()

    def pass_document(self) -> None:
        """Move on to the next document."""
        place = self.place
        self.place = replace(place, document=place.document + 1, read=place.read + 1)

    def has_place(self, token: int) -> bool:
        """Whether there is such a place; with a `token`, whether there is a document at it."""
        place = self.place
        if place.shard >= len(self._shards):
            return False
        documents = self.dataset.manifest.shards[int(self._shards[place.shard])].documents
        return place.document < documents + (token == 0)

    def _shards_of(self, epoch: int) -> np.ndarray:
        seed, source = self._key
        return self.dataset.order(seed, epoch, source)[self._index :: self._lanes]

    def _pass_shard(self) -> None:
        self._reader = None
        epoch, shard = self.place.epoch, self.place.shard + 1
        if shard == len(self._shards):
            epoch, shard = epoch + 1, 0
            self._shards = self._shards_of(epoch)
        self.place = SourcePlace(epoch, shard, 0, self.place.read)


class Lane(Packer):
    """Lane `index` of `lanes`, from `place` on (None: the beginning). Not usable after it raised.

    `step` is the number of the windows before the place.
    Raises DataError where a source has fewer shards than lanes or has no such place.
    """

    def __init__(
        self,
        mix: Mix,
        index: int,
        lanes: int,
        seed: int,
        place: LanePlace | None = None,
        step: int = 0,
    ) -> None:
        self._step = step
        if place is None:
            place = LanePlace(0, 0, (SourcePlace(),) * len(mix.datasets))
        super().__init__(offset=place.token, weighted=mix.is_weighted)
        self._mix, self._index, self._lanes, self._seed = mix, index, lanes, seed
        numbers = [place.token, *itertools.chain.from_iterable(map(astuple, place.sources))]
        known = 0 <= place.source < len(mix.datasets) == len(place.sources)
        if not known or min(numbers) < 0:
            raise self._foreign_place(mix.datasets[0], place)
        self._streams = [
            _Stream(dataset, source, index, lanes, seed, place.sources[source])
            for source, dataset in enumerate(mix.datasets)
        ]
        self._source = place.source
        for source, stream in enumerate(self._streams):
            if not stream.has_place(place.token if source == place.source else 0):
                raise self._foreign_place(stream.dataset, place)

    @property
    def place(self) -> LanePlace:
        """Where the next token is: a lane that is given this place continues with it."""
        return LanePlace(self._source, self.offset, tuple(s.place for s in self._streams))

    @property
    def next_shards(self) -> list[tuple[int, int]]:
        """(source, index of a shard) of what this lane opens next in each source of which its next
        window may have a document."""
        return [
            (source, self._streams[source].next_shard) for source in self._mix.drawn(self._step)
        ]

    def window(self, length: int) -> Window:
        """The next `length` tokens, without padding. Raises DataError."""
        window, _ = self.pack(length)
        self._step += 1
        return window

    def open_document(self) -> LaidOut:
        """The document at the place, or where none is open the next that has a token.

        An empty document is a draw like another: the mean lengths count it.
        """
        while True:
            if self.offset == 0:
                key = self._seed, self._index, self.place.drawn
                self._source = self._mix.draw(*key, step=self._step)
            stream = self._streams[self._source]
            found = stream.open_document()
            tokens = stream.dataset.lay_out(found)
            if self.offset > 0 and self.offset >= len(tokens):
                raise self._foreign_place(stream.dataset, self.place)
            if len(tokens):
                if not self._mix.is_weighted:
                    return LaidOut(found.id, tokens)
                weights = stream.dataset.weigh(found, self._mix.prompt_weight)
                return LaidOut(found.id, tokens, weights)
            self.pass_document()

    def pass_document(self) -> None:
        """Move the place behind the open document."""
        self._streams[self._source].pass_document()

    def _foreign_place(self, dataset: Dataset, place: LanePlace) -> DataError:
        return DataError(
            f"{dataset.location}: lane {self._index} of {self._lanes} has no {place}; it was "
            "saved with other data sets, another seed or number of lanes: use those it was saved "
            "with"
        )
