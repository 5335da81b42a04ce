"""The documents of a unit as a table in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.pipeline import table
from data_prep.pipeline.table import Rows, Tables

TURNS = [(), (1,), (1, 1, 2), (), (3,), (0, 1, 2, 4, 2**40)]
IDS = [["a", "", "\u00fcber #2"], [], ["d"], ["e" * 70_000, "f"]]


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    paths = [tmp_path / f"{unit}.documents" for unit in range(len(IDS))]
    number = 0
    for path, ids in zip(paths, IDS, strict=True):
        rows = Rows()
        for line, id in enumerate(ids, 1):
            key = bytes([number]) * 16
            place, size = (number, line), (10, number)
            rows.add(id, key, key[::-1] if line % 2 else b"", place, size, TURNS[number])
            number += 1
        assert len(rows) == len(ids)
        rows.write(path)
    return Tables.of(paths)


def test_what_was_added_comes_back_by_column_and_by_document(tables: Tables) -> None:
    assert len(tables) == 6 and tables.starts.tolist() == [0, 3, 3, 4, 6]
    assert tables.column("tokens").tolist() == tables.column("file").tolist() == [0, 1, 2, 3, 4, 5]
    assert tables.column("line").tolist() == [1, 2, 3, 1, 1, 2]
    word = 0x0101010101010101
    assert tables.column("key").tolist() == [[n * word] * 2 for n in range(6)]
    assert tables.column("fingerprint")[:, 1].tolist() == [0, 0, 2 * word, 3 * word, 4 * word, 0]
    # Tokens of a document begin where those of the one before it in its unit end.
    assert tables.column("first").tolist() == [0, 0, 1, 0, 0, 4]
    assert list(tables.ids(np.array([1, 2, 4, 5]))) == ["", IDS[0][2], IDS[3][0], "f"]
    assert tables.column("prompt").tolist() == [0, 1, 2, 0, 3, 2**40 - 3]
    rows, ids, turns = table.pick(tables.paths[3], np.array([1, 0]))
    assert ids == ["f", "e" * 70_000] and rows["tokens"].tolist() == [5, 4]
    assert turns == [TURNS[5], TURNS[4]]
    assert table.pick(tables.paths[0], np.array([2, 0])).turns == [(1, 1, 2), ()]


def test_keys_are_ordered_as_their_bytes_and_equal_ones_stay(tables: Tables) -> None:
    keys = np.array([[2, 1], [1, 9], [2, 0], [1, 9], [2, 1], [1, 9]], np.uint64)
    order, again = table.grouped(keys)
    assert order.tolist() == [1, 3, 5, 2, 0, 4]
    assert again.tolist() == [False, True, True, False, False, True]
    assert [part.tolist() for part in table.grouped(keys[:0])] == [[], []]
