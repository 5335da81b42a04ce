"""Duplicates over all sources: exact ones by a hash, near ones by MinHash.

MinHash is datatrove's (signatures, buckets, clusters), with this data set's units in place of its
ranks, so what is found does not depend on workers or tasks. Two texts whose n-grams overlap by s
(Jaccard) meet in one of the buckets with probability 1 - (1 - s^rows)^buckets: at 20 buckets of 5
rows that is 1.00 for s = 0.8, 0.88 for s = 0.63 (5 % of the words of one changed) and 0.05 for
s = 0.3. FineWeb's 14 buckets of 8 rows give 0.92, 0.29 and 0.00.

Of documents that are duplicates of one another the first in the order of the corpus is kept.
"""

from __future__ import annotations

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

from data_prep.cleaning import words
from data_prep.config import DuplicatesConfig

EXACT, NEAR = "exact", "near"

# Shingles that are hashed at once: a book has more than memory wants to see times all hashes.
_SHINGLES = 8192


def sign(texts: Iterator[str], unit: int, directory: Path, config: DuplicatesConfig) -> None:
    """Write the signatures of a unit's documents, durably, as it draws them."""
    if not config.near:
        deque(texts, maxlen=0)
        return
    signatures = _Signatures(str(directory / "signatures"), config=_minhash(config))
    signatures.run((Document(text=text, id="") for text in texts), rank=unit)
    for bucket in range(config.buckets):
        path = directory / "signatures" / f"bucket_{bucket:03d}" / f"{unit:05d}.minhash.sig"
        with path.open("rb") as file:
            os.fsync(file.fileno())


def match(bucket: int, directory: Path, config: DuplicatesConfig) -> None:
    """Write the pairs of documents that meet in a bucket."""
    # It opens the files of all units at once.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    pairs = directory / "pairs"
    step = MinhashDedupBuckets(
        str(directory / "signatures"), str(pairs), config=_minhash(config), lines_to_buffer=256
    )
    step.run(None, rank=bucket, world_size=config.buckets)


def cluster(directory: Path, config: DuplicatesConfig) -> None:
    """Join pairs into clusters: files of (document, cluster) a unit."""
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
    """EXACT or NEAR for each document that is left out, by its number in the order of the corpus.

    `fingerprints` are of all documents, `unit_starts` the number of each unit's first document.
    """
    found: dict[int, str] = {}
    first: dict[str, int] = {}
    for number, fingerprint in enumerate(fingerprints):
        if first.setdefault(fingerprint, number) != number:
            found[number] = EXACT
    kept: dict[int, int] = {}
    # By number: a cluster's first document is the one that stays.
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
    """datatrove's, in bounded memory, and with words of any script in place of spaCy's English."""

    def get_shingles(self, text: str) -> np.ndarray:
        """Hashes of the text's n-grams: uint64 [n-grams, 1]."""
        found, size = words(text), self.config.n_grams
        grams = (" ".join(found[i : i + size]) for i in range(len(found) - size + 1))
        return np.fromiter(map(self._hash_func, grams), dtype=np.uint64).reshape(-1, 1)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """The minimum of each hash function over the shingles, bucket by bucket."""
        parts = [
            super(_Signatures, self).get_signature(shingles[first : first + _SHINGLES])
            for first in range(0, len(shingles), _SHINGLES)
        ]
        least: list[list[int]] = np.min(np.array(parts, dtype=np.uint64), axis=0).tolist()
        return least
