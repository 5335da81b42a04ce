"""Random choices that a seed and names decide, the same on every machine and numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from data_prep.dataset.keyed import keyed

T = TypeVar("T")


class Draws:
    """A stream of choices keyed by a seed and names.

    Of Philox's raw stream, which numpy promises to keep; what it makes of it may change.
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
        """So many of the items, each place at most once, in the order drawn."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def number(self, digits: int) -> str:
        """A whole number of so many digits, none of them zero at its front."""
        low = 10 ** (digits - 1)
        return str(low + self.below(9 * low))
