"""The order of documents and their cut into shards."""

from __future__ import annotations

import random

import pytest

from data_prep.dataset.settings import SettingsError
from data_prep.pipeline import order
from data_prep.pipeline.order import Placed


def placed(id: str, line: int = 1, source: str = "s", file: str = "s/f") -> Placed:
    return Placed(id, source, file, line, 10, 5, 0, 0)


def test_the_order_depends_on_seed_and_ids_alone() -> None:
    documents = [placed(str(n), line=n) for n in range(500)]
    mixed = random.Random(1).sample(documents, 500)
    ordered = order.shuffled(documents, 7)
    assert order.shuffled(mixed, 7) == ordered
    assert order.shuffled(documents, 8) != ordered
    assert ordered != documents
    fewer = [document for document in documents if document.line % 3]
    assert order.shuffled(fewer, 7) == [document for document in ordered if document.line % 3]


def test_equal_ids_stay_in_the_corpus_order() -> None:
    documents = [
        placed("x", source=source, file=f"{source}/{file}", line=line)
        for source in ("a", "b")
        for file in ("f", "g")
        for line in (2, 10)
    ]
    assert order.shuffled(documents[::-1], 1) == documents


def test_repeated_ids_are_numbered_and_never_collide() -> None:
    documents = [placed(id) for id in ("x", "y", "x", "x#2", "x", "x#2")]
    assert order.unique_ids(documents) == ["x", "y", "x#3", "x#2", "x#4", "x#2#2"]


def test_runs_are_even_in_order_and_never_empty() -> None:
    source = random.Random(2)
    for _ in range(300):
        tokens = [source.choice((1, 10, 1000)) for _ in range(source.randrange(1, 40))]
        count = source.randrange(1, len(tokens) + 1)
        runs = order.cut(tokens, count)
        assert len(runs) == count
        assert all(len(run) for run in runs)
        assert [index for run in runs for index in run] == list(range(len(tokens)))
    even = order.cut([3] * 100, 7)
    assert {len(run) for run in even} <= {14, 15}


def test_shards_are_counted_by_number_or_by_tokens() -> None:
    assert order.shard_count(1000, 50, 8, 1) == 8
    assert order.shard_count(1000, 50, 0, 100) == 10
    assert order.shard_count(1000, 5, 0, 100) == 5
    assert order.shard_count(10, 5, 0, 100) == 1
    with pytest.raises(SettingsError, match=r"shards\.count: 51 .* 50 documents"):
        order.shard_count(1000, 50, 51, 1)
