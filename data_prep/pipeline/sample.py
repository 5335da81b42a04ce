"""The text that a tokenizer is trained on: the passages of the corpus with the lowest keys."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


class Lowest:
    """Of the (key, text) added those with the lowest keys, until they have `size` bytes together.

    Holds about twice as many bytes. Keys are hexadecimal, of equal length; above `bound` none is
    needed any more (empty: all may be).
    """

    def __init__(self, size: int, bound: str = "") -> None:
        self._size, self._held_bytes, self.bound = size, 0, bound
        self._held: list[tuple[str, str]] = []

    def wants(self, key: str) -> bool:
        """Whether a text of this key may be among them."""
        return not self.bound or key <= self.bound

    def add(self, key: str, text: str) -> None:
        """Add a text."""
        if self.wants(key):
            self._held.append((key, text))
            self._held_bytes += len(text.encode())
            if self._held_bytes > 2 * self._size:
                self._cut()

    @property
    def passages(self) -> list[tuple[str, str]]:
        """Those with the lowest keys, in the order of their keys; the last one may reach beyond."""
        self._cut()
        return self._held

    def _cut(self) -> None:
        self._held.sort()
        self._held_bytes = 0
        for count, (key, text) in enumerate(self._held, 1):
            self._held_bytes += len(text.encode())
            if self._held_bytes >= self._size:
                del self._held[count:]
                self.bound = key
                break


@dataclass
class Sample:
    """Passages `drawn` of `read` records; `left_out` counts those of no use, by the reason.

    Of any other record the drawn passages are there, or none was drawn.
    """

    drawn: Lowest
    read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def undrawn(self) -> int:
        """Where there is no passage: records that may be documents."""
        return self.read - self.left_out.total()

    def plain(self) -> dict[str, Any]:
        """For a unit's marker."""
        return {"passages": self.drawn.passages, "read": self.read, "left_out": self.left_out}

    def add(self, plain: dict[str, Any]) -> None:
        """Add what `plain()` of other records gave."""
        for key, text in plain["passages"]:
            self.drawn.add(key, text)
        self.read += plain["read"]
        self.left_out.update(plain["left_out"])
