"""The statistics of comparisons of language models, by hand and against a known spread."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tools.recipes.scores import Scores, by_position, compare, interval, scores_of


def test_bits_a_byte_are_of_all_bytes_and_averaged_over_seeds() -> None:
    nats = np.array([[2.0, 30.0], [4.0, 50.0]]) * math.log(2)
    score = Scores(nats, np.array([1, 9]))
    assert score.of_seeds == pytest.approx([3.2, 5.4])
    assert score.bits == pytest.approx(4.3)
    # The first book alone, the second alone, and both.
    drawn = score.drawn(np.array([[0, 0], [1, 1], [1, 0]]))
    assert drawn.tolist() == pytest.approx([3.0, 40 / 9, 4.3])


def test_a_difference_that_every_document_shows_is_sure_where_the_documents_differ_much() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(1000, 9000, size=8)
    bits = rng.uniform(1.5, 3.0, size=8)
    none = Scores((bits * sizes * math.log(2))[None], sizes)
    better = Scores(((bits - 0.01) * sizes * math.log(2))[None], sizes)
    base, row = compare({"none": none, "delta": better}, "none")
    low, high = row["interval"]
    assert high - low > 0.3, "documents differ"
    assert row["gain"] == pytest.approx(0.01)
    assert row["gain_interval"] == pytest.approx((0.01, 0.01))
    assert base["gain"] == 0 and base["interval"][0] < none.bits < base["interval"][1]


def test_an_interval_is_the_middle_95_percent() -> None:
    assert interval(np.arange(1001.0)) == (25.0, 975.0)


def test_documents_are_matched_by_their_ids() -> None:
    def report(*documents: tuple[str, float]) -> dict[str, object]:
        return {
            "by_document": [
                {
                    "id": id,
                    "total": {"nats": {"memory": nats}, "bytes": 10 * int(id)},
                    "positions": [
                        {
                            "first": end // 2,
                            "end": end,
                            "nats": {"memory": nats / 4},
                            "bytes": int(id),
                        }
                        for end in (32, 64, 128)[: 1 + int(id)]
                    ],
                }
                for id, nats in documents
            ]
        }

    scores = scores_of([report(("2", 5.0), ("1", 7.0)), report(("1", 8.0), ("2", 6.0))])
    assert scores.nats.tolist() == [[7.0, 5.0], [8.0, 6.0]]
    assert scores.bytes.tolist() == [10, 20]
    # Of a range of positions, and of all from there on; the first document has none of 64 and more.
    both = [report(("1", 8.0), ("2", 6.0))]
    assert scores_of([report(("2", 8.0))], 64, 128).nats.tolist() == [[2.0]]
    far = scores_of(both, 32)
    assert far.nats.tolist() == [[2.0, 3.0]] and far.bytes.tolist() == [1, 4]
    assert scores_of(both, 64).nats.tolist() == [[1.5]]
    # Only ranges that both have are compared, without the first.
    (row,) = by_position({"none": both, "delta": both}, "none")
    assert row["end"] == 64 and [one["model"] for one in row["rows"]] == ["none", "delta"]
    assert row["rows"][1]["bits"] == pytest.approx(3.5 / 3 / math.log(2))


def test_a_model_with_memory_is_compared_with_its_memory_in_whatever_order_columns_come() -> None:
    def report(**nats: float) -> dict[str, object]:
        return {"by_document": [{"id": "1", "total": {"nats": nats, "bytes": 1}, "positions": []}]}

    # As JSON of sorted keys gives them back.
    assert scores_of([report(masked=9.0, memory=3.0)]).nats.tolist() == [[3.0]]
    assert scores_of([report(none=4.0)]).nats.tolist() == [[4.0]]
