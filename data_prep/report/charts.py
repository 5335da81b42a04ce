"""The numbers of the charts that the templates draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from data_prep.report.rendering import scaled

Number = TypeVar("Number", int, float)
_BINS = 32
# Between the lines of the axis of shares; the largest share is at least that of 32 equal bins.
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2)
_LINES = 5.3


class Bar(NamedTuple):
    """A row of a bar chart. `parts` are shares of the whole width, one per colour."""

    name: str
    value: str
    parts: list[float]


class Histogram(NamedTuple):
    """Heights in [0, 1] by bin; ticks are (place in [0, 1], label)."""

    documents: list[float]
    tokens: list[float]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def bars(values: Mapping[str, Number], show: Callable[[Number], str]) -> list[Bar]:
    """A bar per value, in their order; the longest fills the width."""
    longest = max(values.values(), default=0) or 1
    return [Bar(name, show(value), [value / longest]) for name, value in values.items()]


def lengths(tokens: np.ndarray) -> Histogram:
    """Shares of the documents and of the tokens by length of the document: uint64 [documents].

    The bins are of equal width on a logarithmic axis.
    """
    low = max(int(tokens.min()), 1)
    high = max(int(tokens.max()) + 1, low * 2)
    edges = np.geomspace(low, high, _BINS + 1)
    edges[0] = 0
    edges[-1] = high
    documents, _ = np.histogram(tokens, edges)
    weights, _ = np.histogram(tokens, edges, weights=tokens.astype(float))
    shares = np.stack([documents / documents.sum(), weights / weights.sum()])
    top = 1.05 * float(shares.max())
    step = next(step for step in _STEPS if top / step <= _LINES)
    heights = (shares / top).tolist()
    y_ticks = [(step * n / top, f"{step * n:.0%}") for n in range(int(top / step) + 1)]
    return Histogram(heights[0], heights[1], _round_numbers(low, high), y_ticks)


def _round_numbers(low: int, high: int) -> list[tuple[float, str]]:
    """Ticks of a logarithmic axis; its ends where there are too few round numbers between them."""
    factors = (1,) if np.log10(high / low) > 2.5 else (1, 2, 5)
    powers = (10**power for power in range(len(str(high))))
    ticks = [factor * power for power in powers for factor in factors]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < 2:
        ticks = [low, high]
    places = np.log(np.array(ticks) / low) / np.log(high / low)
    return [(place, scaled(tick, form=".3g")) for place, tick in zip(places, ticks, strict=True)]
