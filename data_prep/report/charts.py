"""The numbers of the chart of document lengths."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_prep.pages.curves import Scale

_BINS = 32
# Between the lines of the axis of shares; the largest share is at least that of 32 equal bins.
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2)
_LINES = 5.3


class Histogram(NamedTuple):
    """Heights in [0, 1] by bin; ticks are (place in [0, 1], label)."""

    documents: list[float]
    tokens: list[float]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


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
    x_ticks = Scale(low, high, logarithmic=True).ticks()
    return Histogram(heights[0], heights[1], x_ticks, y_ticks)
