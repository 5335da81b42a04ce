"""Duplicates over all sources: exact ones by a hash, near ones by MinHash.

MinHash is datatrove's (signatures, buckets), with this data set's units as its ranks, so
the result does not depend on workers or tasks. Two texts whose n-grams overlap by s (Jaccard) match
in one of the buckets with probability 1 - (1 - s^rows)^buckets: for 20 buckets of 5 rows that is
1.00 at s = 0.8, 0.88 at s = 0.63 (5 % of the words of one changed) and 0.05 at s = 0.3. FineWeb's
14 buckets of 8 rows give 0.92, 0.29 and 0.00.

Of documents that are duplicates of one another the first in the order of the corpus is kept.
"""

from __future__ import annotations

import hashlib
import os
import resource
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupSignature,
)

from data_prep.config import DuplicatesConfig
from data_prep.dataset import durable
from data_prep.pipeline.ngrams import NGrams
from data_prep.pipeline.table import grouped

EXACT, NEAR = 1, 2
KINDS = {EXACT: "exact", NEAR: "near"}

# N-grams that all hash functions take at once: their products then stay in the processor's cache.
_SHINGLES = 512
# 2^61 - 1: datatrove's hash functions are (a x + b) modulo 2^64 modulo this prime.
_PRIME = np.uint64((1 << 61) - 1)
# Pairs that are read at once.
_PAIRS = 1 << 18


class Signer:
    """Writes the signatures of a unit's documents, where near duplicates are left out."""

    def __init__(self, directory: Path, config: DuplicatesConfig) -> None:
        self._directory, self._config = directory / "signatures", config
        # It takes time to load, so only if it is needed.
        self._minhash: _Signatures | None = None
        if config.near:
            self._minhash = _Signatures(str(self._directory), config=_minhash(config))

    def document(self) -> Signature:
        """The signature of a new document, to be filled by its text."""
        return Signature(self._minhash, self._config)

    def write(self, signatures: Iterator[Signature], unit: int) -> None:
        """Write the signatures durably, one after the other as the iterator yields them."""
        if self._minhash is None:
            deque(signatures, maxlen=0)
            return
        self._minhash.run((Document(text=found, id="") for found in signatures), rank=unit)
        found = (f"bucket_{n:03d}/{unit:05d}.minhash.sig" for n in range(self._config.buckets))
        _make_durable([self._directory / name for name in found], self._directory.parent)


class Signature:
    """What identifies duplicates of a document; its text is added passage by passage."""

    def __init__(self, minhash: _Signatures | None, config: DuplicatesConfig) -> None:
        self._minhash, self._config = minhash, config
        self._digest = hashlib.blake2b(digest_size=16)
        self._grams = NGrams(config.ngram)
        self.least = np.empty((0, config.rows), np.uint64)
        """The minimum of each hash function over the n-grams: [buckets, rows], or [0, rows]."""

    @property
    def fingerprint(self) -> bytes:
        """A hash that exact duplicates share: 16 bytes; empty where none are looked for."""
        return self._digest.digest() if self._config.wanted else b""

    def add(self, passage: str) -> None:
        """Add the next passage of the text."""
        if self._config.wanted:
            self._digest.update(passage.encode())
        if self._minhash is None:
            return
        for hashes in self._grams(passage):
            least = self._minhash.least(hashes)
            self.least = np.minimum(self.least, least) if len(self.least) else least


def match(bucket: int, directory: Path, config: DuplicatesConfig) -> None:
    """Write the pairs of documents that match in a bucket, durably."""
    # datatrove opens the files of all units at once.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    pairs = directory / "pairs"
    step = MinhashDedupBuckets(
        str(directory / "signatures"), str(pairs), config=_minhash(config), lines_to_buffer=256
    )
    step.run(None, rank=bucket, world_size=config.buckets)
    _make_durable([pairs / f"{bucket:05d}_00.dups"], directory)


def _make_durable(files: Sequence[Path], directory: Path) -> None:
    """Sync files that datatrove wrote, and the directories down to them from this one on.

    A unit is marked as done after that: a file that a power loss took would not be missed, and with
    it the documents of all later units would be taken for others.
    """
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    on_the_way = {place for path in files for place in path.parents}
    for place in on_the_way - {*directory.parents}:
        durable.sync_directory(place)


def find(fingerprints: np.ndarray, unit_starts: np.ndarray, directory: Path) -> np.ndarray:
    """EXACT or NEAR for each document to leave out, 0 for the others: uint8 [documents].

    `fingerprints` [documents, 2] are those of all documents in the order of the corpus; unit n
    begins with document `unit_starts[n]`. Documents that match in any bucket, also by others
    between them, are a cluster, of which the first is kept.
    """
    found = np.zeros(len(fingerprints), np.uint8)
    first = _first_of_clusters(unit_starts, directory / "pairs")
    found[first != np.arange(len(first))] = NEAR
    order, again = grouped(fingerprints)
    found[order[again]] = EXACT
    return found


def _first_of_clusters(unit_starts: np.ndarray, pairs: Path) -> np.ndarray:
    """For each document the first one of its cluster, itself if it is in none: [documents].

    datatrove's step holds Python objects of each document that matches. Here each round lets both
    documents of a pair point to the earlier of those that they point to, until these are equal
    (hooking and pointer jumping: Shiloach and Vishkin 1982, doi:10.1016/0196-6774(82)90008-6).
    """
    first, is_done = np.arange(unit_starts[-1]), False
    while not is_done:
        is_done = True
        for one, other in _pairs(unit_starts, pairs):
            one, other = first[one], first[other]
            is_done = is_done and bool((one == other).all())
            earlier = np.minimum(one, other)
            np.minimum.at(first, one, earlier)
            np.minimum.at(first, other, earlier)
        while (first[first] != first).any():
            first = first[first]
    return first


def _pairs(unit_starts: np.ndarray, pairs: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The numbers of documents that match, some pairs at a time."""
    for path in sorted(pairs.glob("*.dups")):
        with path.open("rb") as file:
            while len(block := np.fromfile(file, "<u4", 4 * _PAIRS)):
                unit, document, other_unit, other = block.reshape(-1, 4).T
                yield unit_starts[unit] + document, unit_starts[other_unit] + other


def _minhash(config: DuplicatesConfig) -> MinhashConfig:
    return MinhashConfig(
        n_grams=config.ngram, num_buckets=config.buckets, hashes_per_bucket=config.rows
    )


class _Signatures(MinhashDedupSignature):  # type: ignore[misc]
    """datatrove's step over signatures computed in bounded memory, from words of any script."""

    def least(self, hashes: np.ndarray) -> np.ndarray:
        """The minimum of each hash function over n-grams' hashes [n]: uint64 [buckets, rows].

        As datatrove's `get_signature`, without a division: x modulo 2^61 - 1 is
        (x modulo 2^61) + (x / 2^61), less the prime where that reaches it.
        """
        factors, terms = (numbers.reshape(-1, 1) for numbers in self.parameters)
        least = np.full(len(factors), _PRIME)
        for start in range(0, len(hashes), _SHINGLES):
            found = hashes[start : start + _SHINGLES] * factors
            found += terms
            high = found >> np.uint64(61)
            found &= _PRIME
            found += high
            if (found.max(axis=1) >= _PRIME).any():
                found[found >= _PRIME] -= _PRIME
            np.minimum(least, found.min(axis=1), out=least)
        return least.reshape(self.config.num_buckets, self.config.hashes_per_bucket)

    def get_shingles(self, text: Signature) -> np.ndarray:
        return text.least  # in place of its n-grams

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        found: list[list[int]] = shingles.tolist()
        return found
