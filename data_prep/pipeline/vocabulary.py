"""Words by number, with what rules ask about each: looked up instead of worked out for each place.

The hash of a string of characters c is the sum of c[i] base^(length - 1 - i) modulo 2^64, so the
hash of words without spaces between them follows from theirs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from datatrove.pipeline.filters.gopher_quality_filter import STOP_WORDS
from datatrove.utils.text import PUNCTUATION_SET

# Bits of a word's kind; each of Gopher's stop words has one of its own above the others.
NOT_PUNCTUATION, ALPHABETIC = 1, 2
_STOP_WORDS = {word: 4 << number for number, word in enumerate(STOP_WORDS)}
STOP_WORD = sum(_STOP_WORDS.values())
_BASE = np.uint64(0x9E3779B97F4A7C15)


class Vocabulary:
    """The words met so far; a word's number is its place in `words`."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self._numbers: dict[str, int] = {}
        # Of each word, with room for more: these arrays are longer than `words`.
        self.lengths = np.zeros(0, np.int64)
        self.hashes = np.zeros(0, np.uint64)
        self.scales = np.zeros(0, np.uint64)
        """base^length."""
        self.kinds = np.zeros(0, np.uint16)

    def numbers(self, words: Sequence[str]) -> bytes:
        """The number of each word as int32; those not met before are added."""
        try:
            return array("i", map(self._numbers.__getitem__, words)).tobytes()
        except KeyError:
            self.add(words)
            return array("i", map(self._numbers.__getitem__, words)).tobytes()

    def add(self, words: Sequence[str]) -> None:
        """Add those of the words, none empty, that have not been met."""
        new = list(dict.fromkeys(word for word in words if word not in self._numbers))
        if not new:
            return
        first, last = len(self.words), len(self.words) + len(new)
        self.words += new
        self._numbers.update(zip(new, range(first, last), strict=True))
        if last > len(self.lengths):
            self._make_room(2 * last)
        here = slice(first, last)
        self.lengths[here] = lengths = np.fromiter(map(len, new), np.int64, len(new))
        self.hashes[here], self.scales[here] = _hashes(new, lengths)
        self.kinds[here] = np.fromiter(map(_kind, new), np.uint16, len(new))

    def _make_room(self, room: int) -> None:
        for name in ("lengths", "hashes", "scales", "kinds"):
            old = getattr(self, name)
            grown = np.zeros(room, old.dtype)
            grown[: len(old)] = old
            setattr(self, name, grown)


class Words:
    """The words of a text, by number in a vocabulary."""

    def __init__(self, numbers: bytes, known: Vocabulary) -> None:
        self.numbers = np.frombuffer(numbers, np.int32)
        self._known = known
        self._hashes: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.numbers)

    def texts(self) -> list[str]:
        """The words themselves."""
        return list(map(self._known.words.__getitem__, self.numbers.tolist()))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Characters of each word."""
        return self._known.lengths[self.numbers]

    @cached_property
    def kinds(self) -> np.ndarray:
        """Bits of each word: NOT_PUNCTUATION, ALPHABETIC, and one of each stop word."""
        return self._known.kinds[self.numbers]

    def n_grams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(hashes, lengths) of the strings [words - n + 1, or 0] of n words.

        No spaces are between the words: equal strings have equal hashes, whatever their words.
        """
        if len(self) < n:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        if not self._hashes:
            self._hashes.append(self._known.hashes[self.numbers])
        while len(self._hashes) < n:
            more, one, shorter = len(self._hashes), self._hashes[0], self._hashes[-1]
            self._hashes.append(shorter[:-1] * self._scales[more:] + one[more:])
        return self._hashes[n - 1], self._ends[n:] - self._ends[:-n]

    @cached_property
    def _scales(self) -> np.ndarray:
        return self._known.scales[self.numbers]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)])


def _hashes(words: list[str], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The words' hashes and base^length."""
    powers = np.cumprod(np.full(int(lengths.max()) + 1, _BASE)) * _inverse(_BASE)
    characters = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), "<u4")
    ends = np.cumsum(lengths)
    behind = np.repeat(ends, lengths) - 1 - np.arange(len(characters))
    return np.add.reduceat(characters * powers[behind], ends - lengths), powers[lengths]


def _inverse(odd: np.uint64) -> np.uint64:
    return np.uint64(pow(int(odd), -1, 1 << 64))


def _kind(word: str) -> int:
    kind = _STOP_WORDS.get(word, 0)
    if not PUNCTUATION_SET.issuperset(word):
        kind |= NOT_PUNCTUATION
    if word.isalpha() or any(map(str.isalpha, word)):
        kind |= ALPHABETIC
    return kind
