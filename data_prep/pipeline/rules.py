"""datatrove's quality rules for English text, with the same verdicts in less time.

The words of a document are split once (`splitting.py`) and counted by what is known of each
(`vocabulary.py`). What takes long is first bounded by something fast; datatrove's own filter
decides where the bound does not.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
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
from data_prep.pipeline.vocabulary import ALPHABETIC, NOT_PUNCTUATION, STOP_WORD, Words

_TOO_FEW = (False, "too_few_sentences")

Verdict = bool | tuple[bool, str]
_Limits = tuple[tuple[int, float], ...]  # (n, share of a text's characters)


def rule(name: str, config: CleaningConfig) -> Any:
    """A rule of `CleaningConfig.rules` as a datatrove filter."""
    return _RULES[name](config, *english())


@functools.cache
def english() -> tuple[EnglishWords, _Numbered]:
    """One table of words for all sources; datatrove keeps each tokenizer that it is given."""
    language = EnglishWords()
    return language, _Numbered(language)


class _Numbered(WordTokenizer):  # type: ignore[misc]
    """Gives `Words` in place of a list, which datatrove's `split_into_words` then keeps."""

    def __init__(self, language: EnglishWords) -> None:
        super().__init__()
        self._language = language

    def word_tokenize(self, text: str) -> Words:
        return self._language.words(text)

    def sent_tokenize(self, text: str) -> list[str]:
        found: list[str] = self._language.sent_tokenize(text)
        return found

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return self._language.span_tokenize(text)


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


class Quality(GopherQualityFilter):  # type: ignore[misc]
    """Gopher's rule of quality, with counts by what is known of each word."""

    def filter(self, doc: Document) -> Verdict:
        """The verdict of Gopher's rule."""
        words: Words = split_into_words(doc.text, self.language)
        checks = itertools.chain(self._of_words(words), self._of_text(doc.text, words))
        return next(((False, reason) for is_so, reason in checks if is_so), True)

    def _of_words(self, words: Words) -> Iterator[tuple[bool, str]]:
        lengths = words.lengths[(words.kinds & NOT_PUNCTUATION) > 0]
        yield len(lengths) < self.min_doc_words, "gopher_short_doc"
        most = self.max_doc_words or len(lengths)
        yield len(lengths) > most, "gopher_long_doc"
        mean = lengths.mean()
        yield bool(mean < self.min_avg_word_length), "gopher_below_avg_threshold"
        yield bool(mean > self.max_avg_word_length), "gopher_above_avg_threshold"

    def _of_text(self, text: str, words: Words) -> Iterator[tuple[bool, str]]:
        count, most = len(words), self.max_symbol_word_ratio
        ellipses = text.count("...") + text.count("…")
        yield text.count("#") / count > most, "gopher_too_many_hashes"
        yield ellipses / count > most, "gopher_too_many_ellipsis"
        lines = text.splitlines()
        # There are no more such lines than there are marks in the text.
        bullets, most = text.count("•") + text.count("-"), self.max_bullet_lines_ratio
        if bullets / len(lines) > most:
            bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
        yield bullets / len(lines) > most, "gopher_too_many_bullets"
        most = self.max_ellipsis_lines_ratio
        if ellipses / len(lines) > most:
            ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
        yield ellipses / len(lines) > most, "gopher_too_many_end_ellipsis"
        alphabetic = np.count_nonzero(words.kinds & ALPHABETIC) / count
        yield alphabetic < self.max_non_alpha_words_ratio, "gopher_below_alpha_threshold"
        stops = int(np.bitwise_or.reduce(words.kinds)) & STOP_WORD
        yield stops.bit_count() < self.min_stop_words, "gopher_enough_stop_words"


class Repetition(GopherRepetitionFilter):  # type: ignore[misc]
    """Gopher's rule of repetition, which counts n-grams only where they may be too many."""

    def __init__(self, language: WordTokenizer, numbered: WordTokenizer) -> None:
        super().__init__(language=language)
        self._numbered = numbered
        self._of_lines = GopherRepetitionFilter(top_n_grams=(), dup_n_grams=(), language=numbered)
        self._limits: tuple[_Limits, _Limits] = self.top_n_grams, self.dup_n_grams

    def filter(self, doc: Document) -> Verdict:
        """The verdict of Gopher's rule."""
        verdict: Verdict = self._of_lines.filter(doc)
        if verdict is not True:
            return verdict
        words: Words = split_into_words(doc.text, self._numbered)
        size = len(doc.text) * (1 - 1e-9)  # a little less: quotients are rounded
        top, again = self._limits
        self.top_n_grams = tuple((n, f) for n, f in top if may_be_frequent(words, n, f * size))
        self.dup_n_grams = tuple((n, f) for n, f in again if may_repeat(words, n, f * size))
        return super().filter(doc) if self.top_n_grams or self.dup_n_grams else True


def may_be_frequent(words: Words, n: int, limit: float) -> bool:
    """Whether the most frequent n-gram's characters, times its count, may be above the limit."""
    hashes, lengths = words.n_grams(n)
    if not len(hashes):
        return False
    # The words of an n-gram are joined by spaces.
    often = int(limit / (lengths.max() + n - 1))
    ordered = np.sort(hashes)
    if often and not (ordered[often:] == ordered[:-often]).any():
        return False
    order, starts = _equal(hashes)
    counts = np.diff(starts, append=len(order))
    longest = np.maximum.reduceat(lengths[order], starts) + n - 1
    return bool((counts * longest).max() > limit)


def may_repeat(words: Words, n: int, limit: float) -> bool:
    """Whether n-grams seen before, none overlapping another, may have more characters."""
    hashes, lengths = words.n_grams(n)
    if not len(hashes):
        return False
    ordered = np.sort(hashes)
    if np.count_nonzero(ordered[1:] == ordered[:-1]) * lengths.max() <= limit:
        return False
    order, starts = _equal(hashes)
    again = np.ones(len(order), bool)
    again[np.minimum.reduceat(order, starts)] = False
    steps = np.zeros(len(words) + 1, np.int64)
    steps[:-n][again] += 1
    steps[n:][again] -= 1
    return bool(words.lengths[np.cumsum(steps[:-1]) > 0].sum() > limit)


def _equal(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in the order of their hashes, and where among them each other hash begins."""
    order = np.argsort(hashes)
    ordered = hashes[order]
    return order, np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


_RULES: dict[str, Callable[[CleaningConfig, WordTokenizer, WordTokenizer], Any]] = {
    # Its own limit of 100,000 words drops books.
    "gopher_quality": lambda config, _, numbered: Quality(
        max_doc_words=config.max_words or None, language=numbered
    ),
    "gopher_repetition": lambda config, language, numbered: Repetition(language, numbered),
    "c4": lambda config, language, _: C4(language),
    # It asks only for the number of words.
    "fineweb": lambda config, _, numbered: FineWebQualityFilter(language=numbered),
}
