"""What is known of words is what a loop over each of them finds."""

from __future__ import annotations

import random

import numpy as np
from datatrove.pipeline.filters.gopher_quality_filter import STOP_WORDS
from datatrove.utils.text import PUNCTUATION_SET

from data_prep.pipeline.vocabulary import ALPHABETIC, NOT_PUNCTUATION, STOP_WORD, Vocabulary, Words

SOME = [
    "the",
    "of",
    "be",
    "cat",
    "ca",
    "t",
    "...",
    "…",
    "3.5",
    "7",
    "x1",
    "é",
    "\U0001f600",
    "。",
    "٣",
]


def drawn(seed: int, size: int) -> list[str]:
    source = random.Random(seed)
    return [source.choice([*SOME, f"w{source.randrange(90)}"]) for _ in range(size)]


def test_words_keep_their_numbers_while_more_are_added() -> None:
    known = Vocabulary()
    texts = [drawn(seed, 1 + 40 * seed) for seed in range(8)]
    words = [Words(known.numbers(text), known) for text in texts]
    for text, found in zip(texts, words, strict=True):
        assert found.texts() == text and len(found) == len(text)
        assert found.lengths.tolist() == [len(word) for word in text]
    assert sorted(known.words) == sorted({word for text in texts for word in text})


def test_kinds_are_those_that_gophers_rule_asks_for() -> None:
    known, text = Vocabulary(), drawn(1, 300)
    kinds = Words(known.numbers(text), known).kinds.tolist()
    for word, kind in zip(text, kinds, strict=True):
        assert bool(kind & NOT_PUNCTUATION) == any(c not in PUNCTUATION_SET for c in word)
        assert bool(kind & ALPHABETIC) == any(c.isalpha() for c in word)
        assert bool(kind & STOP_WORD) == (word in STOP_WORDS)
    met = Words(known.numbers(STOP_WORDS), known).kinds
    assert int(np.bitwise_or.reduce(met) & STOP_WORD).bit_count() == len(STOP_WORDS)


def test_equal_hashes_are_of_equal_strings_whatever_their_words() -> None:
    known, text = Vocabulary(), [*drawn(2, 400), "ca", "t", "x", "cat", "x", "x"]
    words = Words(known.numbers(text), known)
    strings: dict[int, str] = {}
    for n in (1, 2, 3, 7):
        hashes, lengths = words.n_grams(n)
        grams = ["".join(text[first : first + n]) for first in range(len(text) - n + 1)]
        assert lengths.tolist() == [len(gram) for gram in grams]
        for one, gram in zip(hashes.tolist(), grams, strict=True):
            assert strings.setdefault(one, gram) == gram
    assert len(strings) == len(set(strings.values()))
    assert [len(found) for found in words.n_grams(len(text) + 1)] == [0, 0]
    assert [len(found) for found in Words(b"", known).n_grams(1)] == [0, 0]
