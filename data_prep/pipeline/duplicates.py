"""Duplicates over all sources: exact ones by a hash, near ones by MinHash.

MinHash is datatrove's (signatures, buckets, clusters), with this data set's units as its ranks, so
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
    MinhashDedupCluster,
    MinhashDedupSignature,
)

from data_prep.config import DuplicatesConfig
from data_prep.pipeline.ngrams import NGrams

EXACT, NEAR = "exact", "near"

# N-grams that all hash functions take at once: their products then stay in the processor's cache.
_SHINGLES = 512
# 2^61 - 1: datatrove's hash functions are (a x + b) modulo 2^64 modulo this prime.
_PRIME = np.uint64((1 << 61) - 1)


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
        for bucket in range(self._config.buckets):
            path = self._directory / f"bucket_{bucket:03d}" / f"{unit:05d}.minhash.sig"
            with path.open("rb") as file:
                os.fsync(file.fileno())


class Signature:
    """What identifies duplicates of a document; its text is added passage by passage."""

    def __init__(self, minhash: _Signatures | None, config: DuplicatesConfig) -> None:
        self._minhash, self._config = minhash, config
        self._digest = hashlib.blake2b(digest_size=16)
        self._grams = NGrams(config.ngram)
        self.least = np.empty((0, config.rows), np.uint64)
        """The minimum of each hash function over the n-grams: [buckets, rows], or [0, rows]."""

    @property
    def fingerprint(self) -> str:
        """A hash that exact duplicates share: 16 bytes in hex; empty where none are looked for."""
        return self._digest.hexdigest() if self._config.wanted else ""

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
    """Write the pairs of documents that match in a bucket."""
    # datatrove opens the files of all units at once.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    pairs = directory / "pairs"
    step = MinhashDedupBuckets(
        str(directory / "signatures"), str(pairs), config=_minhash(config), lines_to_buffer=256
    )
    step.run(None, rank=bucket, world_size=config.buckets)


def cluster(directory: Path, config: DuplicatesConfig) -> None:
    """Join pairs into clusters: files of (document, cluster), one per unit."""
    step = MinhashDedupCluster(
        str(directory / "pairs"),
        str(directory / "clusters"),
        config=_minhash(config),
        save_cluster_id=True,
        lines_to_buffer=256,
    )
    step.run(None, 0, 1)


def find(
    fingerprints: Sequence[str], unit_starts: Sequence[int], directory: Path
) -> dict[int, str]:
    """EXACT or NEAR for each document to leave out, by its number in the order of the corpus.

    `fingerprints` are those of all documents; unit n begins with document `unit_starts[n]`.
    """
    found: dict[int, str] = {}
    first: dict[str, int] = {}
    for number, fingerprint in enumerate(fingerprints):
        if first.setdefault(fingerprint, number) != number:
            found[number] = EXACT
    kept: dict[int, int] = {}
    # Sorted by number: a cluster's first document is kept.
    for number, name in sorted(_clustered(unit_starts, directory / "clusters")):
        if kept.setdefault(name, number) != number:
            found.setdefault(number, NEAR)
    return found


def _clustered(unit_starts: Sequence[int], directory: Path) -> Iterator[tuple[int, int]]:
    """(number of the document, its cluster)."""
    for unit, start in enumerate(unit_starts):
        path = directory / f"{unit:06d}.clusters"
        if path.exists():
            for document, name in np.fromfile(path, "<u4").reshape(-1, 2).tolist():
                yield start + document, name


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
