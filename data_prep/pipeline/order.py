"""The order of documents, decided by seed and ids alone, and their cut into shards.

Documents are ordered by `key` of their ids. Ids of the data set are unique: of documents with the
same id X, the first in the order of the corpus keeps it, the others become X#2, X#3, and are
ordered as such. So the order depends on neither workers nor units, and repeated ids are shuffled.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

import numpy as np

from data_prep.dataset.keyed import keyed
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.wording import counted
from data_prep.pipeline.table import grouped


def shuffled(
    keys: np.ndarray, seed: int, ids: Callable[[np.ndarray], Iterator[str]]
) -> tuple[np.ndarray, np.ndarray]:
    """The order of documents with these keys [n, 2], and for each its number, where its id repeats.

    Both are [n]. Document i becomes X#number where numbers[i] is not 0. `ids` gives the ids of the
    documents at ascending places; the keys of those that repeat are replaced.
    """
    order, again = grouped(keys)
    numbers = np.zeros(len(keys), np.uint32)
    if again.any():
        _number(keys, order, again, numbers, seed, ids)
        del order, again
        order, _ = grouped(keys)
    return order, numbers


def _number(
    keys: np.ndarray,
    order: np.ndarray,
    again: np.ndarray,
    numbers: np.ndarray,
    seed: int,
    ids: Callable[[np.ndarray], Iterator[str]],
) -> None:
    """Give each document whose id repeats a number so that X#number is nobody else's id."""
    taken = keys[order, 0]
    # In the order of the corpus; documents with the same id are of the same group.
    repeats, group = order[again], np.cumsum(~again, dtype=np.uint32)[again]
    by_place = np.argsort(repeats)
    repeats, group = repeats[by_place], group[by_place]
    del by_place
    last = np.ones(group.max() + 1, np.uint32)
    for at, id in enumerate(ids(repeats)):
        number = int(last[group[at]])
        while True:
            number += 1
            key = keyed(seed, named(id, number))
            high = np.uint64(int.from_bytes(key[:8]))
            found = int(taken.searchsorted(high))
            if found == len(taken) or taken[found] != high:
                break
        last[group[at]] = numbers[repeats[at]] = number
        keys[repeats[at]] = np.frombuffer(key, ">u8")


def named(id: str, number: int) -> str:
    """The id in the data set of a document that has this number, 0: the first one of its id."""
    return f"{id}#{number}" if number else id


def shard_count(tokens: int, documents: int, wanted: int, shard_tokens: int) -> int:
    """Number of shards: `wanted`, or if that is 0 so many that each has about `shard_tokens`.

    Raises SettingsError if there are fewer documents than wanted shards.
    """
    if wanted > documents:
        raise SettingsError(
            [
                f"shards.count: {counted(wanted, 'shard')} cannot be made of "
                f"{counted(documents, 'document')}, since a document is never cut; lower it to at "
                f"most {documents}"
            ]
        )
    return wanted or min(documents, max(1, round(tokens / shard_tokens)))


def cut(tokens: np.ndarray | array[int], count: int) -> list[range]:
    """`count` ranges of documents with about equal numbers of tokens, none of them empty."""
    assert 0 < count <= len(tokens)
    sums = np.cumsum(tokens, dtype=np.int64)
    runs, first = [], 0
    for shard in range(count):
        goal = sums[-1] * (shard + 1) / count
        stop = int(np.searchsorted(sums, goal)) + 1
        stop = min(max(stop, first + 1), len(tokens) - (count - 1 - shard))
        runs.append(range(first, stop))
        first = stop
    return runs
