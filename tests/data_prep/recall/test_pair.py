"""Facts in their places, and prompts of the length that is wanted."""

from __future__ import annotations

import pytest

from data_prep.recall.pair import Pair, fitted, hidden

FILLER = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    "depth, text",
    [(0.0, "X a b c d"), (0.5, "a b X c d"), (0.74, "a b c X d"), (1.0, "a b c d X")],
)
def test_a_fact_is_placed_at_its_depth(depth: float, text: str) -> None:
    assert hidden([(depth, "X")], FILLER) == text


def test_facts_are_in_the_order_of_their_depths_and_no_filler_is_lost() -> None:
    facts = [(0.8, "Z"), (0.0, "X"), (0.25, "Y1"), (0.25, "Y2")]
    assert hidden(facts, FILLER) == "X a Y1 Y2 b c Z d"
    assert hidden(facts, []) == "X Y1 Y2 Z"


def _words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("length", [3, 4, 6, 7, 8, 100, 5000])
def test_a_prompt_is_as_long_as_whole_pieces_allow(length: int) -> None:
    def made_of(count: int) -> Pair:
        return Pair(" ".join(["q"] * 3 + ["one two three four"] * count), " a")

    made = fitted(made_of, _words, length)
    assert length - 4 < _words(made.prompt) <= length


def test_pieces_of_unequal_length_are_fitted_too() -> None:
    def made_of(count: int) -> Pair:
        return Pair(" ".join("w " * (1 + 90 * (piece % 7 == 0)) for piece in range(count)), " a")

    for length in (50, 91, 500, 5000):
        made = fitted(made_of, _words, length)
        assert length - 91 <= _words(made.prompt) <= length


def test_where_the_task_alone_is_too_long_there_is_no_filler() -> None:
    made = fitted(lambda count: Pair("one two three" + " more" * count, " a"), _words, 2)
    assert made.prompt == "one two three"
