"""Bars fill the width by their share of the longest."""

from __future__ import annotations

from data_prep.pages import bars


def test_the_longest_bar_fills_the_width() -> None:
    drawn = bars.bars({"a": 3, "b": 12, "c": 0}, "{:,}".format)
    assert drawn == [("a", "3", [0.25]), ("b", "12", [1.0]), ("c", "0", [0.0])]
    assert bars.bars({"a": 0}, str) == [("a", "0", [0.0])]
    assert bars.bars({}, str) == []
