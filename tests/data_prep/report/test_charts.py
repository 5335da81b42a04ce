"""The numbers that charts are drawn from."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.report import charts


def _lengths(tokens: list[int]) -> charts.Histogram:
    return charts.lengths(np.array(tokens, dtype=np.uint64))


def test_shares_of_documents_and_tokens_are_by_length() -> None:
    drawn = _lengths([1] * 8 + [2**32 - 1] * 2)
    top = 1.05
    # Nearly all tokens are in the two longest documents of ten.
    assert np.allclose(drawn.documents, [0.8 / top, *[0] * 30, 0.2 / top])
    assert np.allclose(drawn.tokens, [0, *[0] * 30, 1 / top], atol=1e-6)
    assert [label for _, label in drawn.y_ticks] == ["0%", "20%", "40%", "60%", "80%", "100%"]
    assert np.allclose([place for place, _ in drawn.y_ticks], np.arange(6) / 5 / top)


def test_ticks_are_at_round_numbers() -> None:
    drawn = _lengths([100, 9999])
    assert [label for _, label in drawn.x_ticks] == ["100", "200", "500", "1k", "2k", "5k", "10k"]
    assert np.allclose([drawn.x_ticks[n][0] for n in (0, 3, 6)], [0, 0.5, 1])
    assert [label for _, label in _lengths([1, 10**6]).x_ticks] == [
        *("1", "10", "100", "1k", "10k", "100k", "1M")
    ]
    assert [label for _, label in _lengths([210, 330]).x_ticks] == ["210", "420"]


@pytest.mark.parametrize("tokens", [[1], [5, 5, 5], [0, 1, 10**7], [*range(1, 3000)]])
def test_any_lengths_can_be_drawn(tokens: list[int]) -> None:
    drawn = _lengths(tokens)
    for heights in (drawn.documents, drawn.tokens):
        assert len(heights) == 32 and all(0 <= height < 0.96 for height in heights)
    assert max(*drawn.documents, *drawn.tokens) > 0.95
    for ticks, least in ((drawn.x_ticks, 2), (drawn.y_ticks, 3)):
        assert least <= len(ticks) <= 9
        assert all(0 <= place <= 1 for place, _ in ticks)
