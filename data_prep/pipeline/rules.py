"""datatrove's quality rules for English text, with the same verdicts in less time.

The words of a document are split once (`splitting.py`). What takes long is first bounded by
something fast; datatrove's own filter decides where the bound does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.text import split_into_words
from datatrove.utils.word_tokenizers import WordTokenizer

from data_prep.config import CleaningConfig
from data_prep.pipeline.splitting import BREAKS_SPACY, EnglishWords

_TOO_FEW = (False, "too_few_sentences")
# Of the hash of a string of characters c: the sum of c[i] base^(length - 1 - i) modulo 2^64.
_BASE = np.uint64(0x9E3779B97F4A7C15)

Verdict = bool | tuple[bool, str]


def rule(name: str, config: CleaningConfig) -> Any:
    """A rule of `CleaningConfig.rules` as a datatrove filter."""
    return _RULES[name](config, _english())


@functools.cache
def _english() -> EnglishWords:
    """One table of words for all sources; datatrove keeps each tokenizer that it is given."""
    return EnglishWords()


class C4(C4QualityFilter):  # type: ignore[misc]
    """C4's rule, which splits lines into sentences only where there are fewer than five lines."""

    def __init__(self, language: WordTokenizer) -> None:
        super().__init__(language=language)
        self._lines = _C4Lines(language=_Lines())

    def filter(self, doc: Document) -> Verdict:
        """The verdict; lines are taken out of a document that is kept."""
        if BREAKS_SPACY not in doc.text:
            # Each line that is left holds at least one sentence.
            verdict: Verdict = self._lines.filter(doc)
            if verdict != _TOO_FEW:
                return verdict
        found: Verdict = super().filter(doc)
        return found


class _C4Lines(C4QualityFilter):  # type: ignore[misc]
    def stat_update(self, *labels: str, value: int = 1, unit: str | None = None) -> None:
        """Counts of lines are not shown anywhere."""


class _Lines(WordTokenizer):  # type: ignore[misc]
    """Takes every line for one sentence."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


class Repetition(GopherRepetitionFilter):  # type: ignore[misc]
    """Gopher's rule of repetition, which counts n-grams only where they may be too many."""

    def __init__(self, language: WordTokenizer) -> None:
        super().__init__(language=language)
        self._limits: dict[str, dict[int, float]] = {
            "top_n_grams": dict(self.top_n_grams),
            "dup_n_grams": dict(self.dup_n_grams),
        }

    def filter(self, doc: Document) -> Verdict:
        """The verdict of Gopher's rule."""
        self.top_n_grams = self.dup_n_grams = ()
        verdict: Verdict = super().filter(doc)
        if verdict is not True:
            return verdict
        words = split_into_words(doc.text, self.language)
        for kind, limits in self._limits.items():
            bounds = _BOUNDS[kind](words, limits)
            doubtful = [n for n, most in bounds if most / len(doc.text) > limits[n]]
            setattr(self, kind, tuple((n, limits[n]) for n in doubtful))
        return super().filter(doc) if self.top_n_grams or self.dup_n_grams else True


def most_frequent(words: list[str], sizes: Collection[int]) -> Iterator[tuple[int, int]]:
    """For each n at least the characters of the most frequent n-gram, times its count."""
    for n, hashes, lengths in _grams(words, sizes):
        order, starts = _equal(hashes)
        counts = np.diff(starts, append=len(order))
        # The words of an n-gram are joined by spaces.
        longest = np.maximum.reduceat(lengths[order], starts) + n - 1
        yield n, int((counts * longest).max())


def repeated(words: list[str], sizes: Collection[int]) -> Iterator[tuple[int, int]]:
    """For each n at least the characters of n-grams seen before, none overlapping another."""
    word_lengths = np.fromiter(map(len, words), np.int64, len(words))
    for n, hashes, _ in _grams(words, sizes):
        order, starts = _equal(hashes)
        if len(starts) == len(order):
            yield n, 0
            continue
        again = np.ones(len(order), bool)
        again[np.minimum.reduceat(order, starts)] = False
        steps = np.zeros(len(words) + 1, np.int64)
        steps[:-n][again] += 1
        steps[n:][again] -= 1
        yield n, int(word_lengths[np.cumsum(steps[:-1]) > 0].sum())


_BOUNDS: dict[str, Callable[[list[str], Collection[int]], Iterator[tuple[int, int]]]] = {
    "top_n_grams": most_frequent,
    "dup_n_grams": repeated,
}


def _grams(
    words: list[str], sizes: Collection[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(n, hashes, lengths) of the strings [words - n + 1] that n words make without spaces.

    Equal strings have equal hashes, whatever their words.
    """
    if not words:
        return
    size = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.cumsum(size)
    powers = np.cumprod(np.full(int(size.max()) + 1, _BASE)) * _inverse(_BASE)
    characters = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), "<u4")
    behind = np.repeat(ends, size) - 1 - np.arange(len(characters))
    one = np.add.reduceat(characters * powers[behind], ends - size)
    scale, hashes, lengths = powers[size], one, size
    for n in range(1, max(sizes) + 1):
        if n > 1:
            hashes = hashes[:-1] * scale[n - 1 :] + one[n - 1 :]
            lengths = lengths[:-1] + size[n - 1 :]
        if not len(hashes):
            return
        if n in sizes:
            yield n, hashes, lengths


def _inverse(odd: np.uint64) -> np.uint64:
    return np.uint64(pow(int(odd), -1, 1 << 64))


def _equal(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in the order of their hashes, and where among them each other hash begins."""
    order = np.argsort(hashes)
    ordered = hashes[order]
    return order, np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


_RULES: dict[str, Callable[[CleaningConfig, WordTokenizer], Any]] = {
    # Its own limit of 100,000 words drops books.
    "gopher_quality": lambda config, language: GopherQualityFilter(
        max_doc_words=config.max_words or None, language=language
    ),
    "gopher_repetition": lambda config, language: Repetition(language),
    "c4": lambda config, language: C4(language),
    "fineweb": lambda config, language: FineWebQualityFilter(language=language),
}
