"""Random choices keyed by a seed and names: the same on every machine and with every numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from data_prep.dataset.keyed import keyed

T = TypeVar("T")


class Draws:
    """A stream of choices keyed by a seed and names.

    They are computed here from Philox's raw stream, which numpy promises not to change, as it may
    change its own distributions.
    """

    def __init__(self, seed: int, *names: str) -> None:
        key = np.frombuffer(keyed(seed, *names), "<u8")
        self._bits = np.random.Philox(key=key)

    def fraction(self) -> float:
        """Uniform in [0, 1)."""
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def below(self, count: int) -> int:
        """Uniform among 0, ..., count - 1."""
        return int(self.fraction() * count)

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` of the items without replacement, in the order drawn."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def depths(self, first: float | None, count: int) -> list[float]:
        """Depths in ascending order: the first one (None: drawn), the others uniform after it."""
        start = self.fraction() if first is None else first
        return [start, *sorted(start + (1 - start) * self.fraction() for _ in range(count - 1))]

    def number(self, digits: int) -> str:
        """A number of `digits` digits without a leading zero."""
        low = 10 ** (digits - 1)
        return str(low + self.below(9 * low))
