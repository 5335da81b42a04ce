"""The order of documents, decided by seed and ids alone, and their cut into shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.dataset.keyed import keyed
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.wording import counted


@dataclass(frozen=True, slots=True)
class Placed:
    """A tokenized document: its place in the corpus, and of its tokens in a unit's file.

    Its first `prompt` tokens are its prompt.
    """

    id: str
    source: str
    file: str
    line: int
    bytes: int
    tokens: int
    unit: int
    first: int
    prompt: int = 0


def shuffled(documents: Sequence[Placed], seed: int) -> list[Placed]:
    """The documents in the order of a hash of their ids; equal ids stay in the corpus's order."""
    return sorted(documents, key=lambda doc: (keyed(seed, doc.id), doc.source, doc.file, doc.line))


def unique_ids(documents: Sequence[Placed]) -> list[str]:
    """Ids in the given order; the second document with the id X gets X#2, and so on."""
    taken = {document.id for document in documents}
    seen: dict[str, int] = {}
    ids = []
    for document in documents:
        count = seen.get(document.id, 0) + 1
        id = document.id
        while count > 1 and (id := f"{document.id}#{count}") in taken:
            count += 1
        taken.add(id)
        seen[document.id] = count
        ids.append(id)
    return ids


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


def cut(tokens: Sequence[int], count: int) -> list[range]:
    """`count` ranges of documents with about equal numbers of tokens, none of them empty."""
    assert 0 < count <= len(tokens)
    sums = np.cumsum(np.asarray(tokens, dtype=np.int64))
    runs, first = [], 0
    for shard in range(count):
        goal = sums[-1] * (shard + 1) / count
        stop = int(np.searchsorted(sums, goal)) + 1
        stop = min(max(stop, first + 1), len(tokens) - (count - 1 - shard))
        runs.append(range(first, stop))
        first = stop
    return runs
