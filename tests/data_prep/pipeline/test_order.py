"""The order of documents and their cut into shards."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from data_prep.dataset.keyed import keyed
from data_prep.dataset.settings import SettingsError
from data_prep.pipeline import order


def arranged(ids: Sequence[str], seed: int) -> list[tuple[int, str]]:
    """(place in the corpus, id in the data set) in the order of the data set."""

    def given(places: np.ndarray) -> Iterator[str]:
        assert (np.diff(places) > 0).all()
        return (ids[place] for place in places)

    keys = np.frombuffer(b"".join(keyed(seed, id) for id in ids), ">u8").reshape(-1, 2)
    ordered, numbers = order.shuffled(keys.astype(np.uint64), seed, given)
    return [(at, order.named(ids[at], int(numbers[at]))) for at in ordered.tolist()]


def naive(ids: Sequence[str], seed: int) -> list[tuple[int, str]]:
    """The same in plain Python, from the definition."""
    names: list[str] = []
    for at, id in enumerate(ids):
        number = 1
        name = id
        while name in names or (number > 1 and name in ids) or (id in ids[:at] and number == 1):
            number += 1
            name = f"{id}#{number}"
        names.append(name)
    return sorted(enumerate(names), key=lambda document: keyed(seed, document[1]))


def test_unique_ids_are_ordered_by_their_hash_alone() -> None:
    ids = [str(n) for n in range(500)]
    ordered = arranged(ids, 7)
    assert [id for _, id in ordered] == sorted(ids, key=lambda id: keyed(7, id))
    assert arranged(ids, 8) != ordered
    # Neither the order of the corpus nor other documents count.
    assert [id for _, id in arranged(random.Random(1).sample(ids, 500), 7)] == [
        id for _, id in ordered
    ]
    fewer = [id for id in ids if int(id) % 3]
    assert [id for _, id in arranged(fewer, 7)] == [id for _, id in ordered if int(id) % 3]


@pytest.mark.parametrize("different", [1, 3, 40, 2000])
def test_repeated_ids_are_numbered_in_the_order_of_the_corpus_and_shuffled(different: int) -> None:
    source = random.Random(different)
    ids = [f"id {source.randrange(different)}" for _ in range(400)]
    ids += [f"id {source.randrange(different)}#{source.randrange(5)}" for _ in range(40)]
    source.shuffle(ids)
    found = arranged(ids, 3)
    assert found == naive(ids, 3)
    assert len({name for _, name in found}) == len(ids)
    neighbours = sum(b == a + 1 for (a, _), (b, _) in itertools.pairwise(found))
    assert neighbours < 8


def test_a_number_is_never_one_that_another_id_ends_with() -> None:
    ids = ["x", "y", "x", "x#2", "x", "x#2"]
    assert [name for _, name in sorted(arranged(ids, 1))] == [
        *("x", "y", "x#3", "x#2", "x#4", "x#2#2")
    ]


def test_runs_are_even_in_order_and_never_empty() -> None:
    source = random.Random(2)
    for _ in range(300):
        tokens = [source.choice((1, 10, 1000)) for _ in range(source.randrange(1, 40))]
        count = source.randrange(1, len(tokens) + 1)
        runs = order.cut(np.array(tokens, np.uint64), count)
        assert len(runs) == count
        assert all(len(run) for run in runs)
        assert [index for run in runs for index in run] == list(range(len(tokens)))
    even = order.cut(np.full(100, 3), 7)
    assert {len(run) for run in even} <= {14, 15}


def test_shards_are_counted_by_number_or_by_tokens() -> None:
    assert order.shard_count(1000, 50, 8, 1) == 8
    assert order.shard_count(1000, 50, 0, 100) == 10
    assert order.shard_count(1000, 5, 0, 100) == 5
    assert order.shard_count(10, 5, 0, 100) == 1
    with pytest.raises(SettingsError, match=r"shards\.count: 51 .* 50 documents"):
        order.shard_count(1000, 50, 51, 1)
