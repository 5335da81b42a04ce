"""Counts and hints in messages."""

from __future__ import annotations

from data_prep.dataset.wording import any_of, counted, meant


def test_a_count_has_the_number_of_its_noun() -> None:
    assert [counted(n, "rank") for n in (0, 1, 2, 2000)] == [
        "0 ranks", "1 rank", "2 ranks", "2,000 ranks",
    ]  # fmt: skip
    assert (counted(1, "node is", "nodes are"), counted(3, "node is", "nodes are")) == (
        "1 node is", "3 nodes are",
    )  # fmt: skip


def test_an_unknown_name_is_answered_with_the_nearest_known_one_or_all() -> None:
    assert meant("stpes", ["seed", "steps"], "train.") == "did you mean train.steps?"
    assert meant("zzz", iter(["seed", "steps"])) == "known: seed, steps"
    assert meant("zzz", []) == "known: none"


def test_choices_are_listed_with_or() -> None:
    assert [any_of(choices) for choices in ([1], ["a", 2], "abc")] == ["1", "a or 2", "a, b or c"]
