"""Rules decide as datatrove's filters do, in verdict, reason and text."""

from __future__ import annotations

import inspect
import json
import random
import textwrap

import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.gopher_repetition_filter import (
    find_all_duplicate,
    find_top_duplicate,
    get_n_grams,
)

from data_prep.config import CleaningConfig
from data_prep.pipeline import rules
from data_prep.pipeline.vocabulary import Vocabulary, Words
from tools.bench import web_pages

PEERS = {
    "gopher_quality": GopherQualityFilter(max_doc_words=None),
    "gopher_repetition": GopherRepetitionFilter(),
    "c4": C4QualityFilter(),
    "fineweb": FineWebQualityFilter(),
}
TEXTS = [
    *map(web_pages.page, range(150)),
    *(inspect.getsource(module)[:5000] for module in (json, random, textwrap, inspect)),
    *filter(None, (inspect.getdoc(module) for module in (random, textwrap, inspect, pytest))),
    *("", " ", "One. Two. Three. Four. Five.", "One. Two. Three. Four. ", "One two three.\n" * 5),
    "It is IS_ALPHA here. " * 5,
    "word " * 300,
    "again and again we go on. " * 9 + " ".join(f"w{n}" for n in range(200)),
]


@pytest.mark.parametrize("name", PEERS)
def test_verdicts_reasons_and_texts_are_those_of_datatroves_filter(name: str) -> None:
    rule, reasons = rules.rule(name, CleaningConfig()), set()
    for text in TEXTS:
        ours, theirs = Document(text=text, id=""), Document(text=text, id="")
        try:
            verdict = PEERS[name].filter(theirs)
        except ZeroDivisionError:
            with pytest.raises(ZeroDivisionError):
                rule.filter(ours)
            continue
        assert rule.filter(ours) == verdict, text
        assert ours.text == theirs.text
        reasons.add(verdict)
    # The texts meet most reasons that there are.
    assert len(reasons) >= 4 and True in reasons


def words_of(words: list[str]) -> Words:
    known = Vocabulary()
    return Words(known.numbers(words), known)


def test_n_grams_that_are_too_many_are_never_missed_and_mostly_known() -> None:
    source = random.Random(2)
    for size in (0, 1, 5, 30, 200):
        # Few letters: n words that are equal when joined are often not the same words.
        for alphabet in ("a", "ab", "abcdefghij"):
            texts = ["".join(source.choices(alphabet, k=source.randint(1, 3))) for _ in range(size)]
            words = words_of(texts)
            for n in (2, 3, 4):
                if grams := get_n_grams(texts, n):
                    assert rules.may_be_frequent(words, n, find_top_duplicate(grams) - 0.5)
            for n in (5, 7, 10):
                assert rules.may_repeat(words, n, find_all_duplicate(texts, n) - 0.5) or size < n
    texts = [f"w{n}" for n in range(400)]
    assert not rules.may_repeat(words_of(texts), 5, 0)
    # "w0".."w9" again: 20 characters in 10 words; "w1 w2" of 5 characters occurs twice.
    again = words_of(texts + texts[:10])
    assert [rules.may_repeat(again, n, most) for n in (5, 10) for most in (19.5, 20)] == [
        *(True, False, True, False)
    ]
    twice = words_of(["w1", "w2", "x", "w1", "w2"])
    assert [rules.may_be_frequent(twice, 2, most) for most in (9.5, 10)] == [True, False]
    assert not rules.may_be_frequent(twice, 6, 0) and not rules.may_repeat(twice, 6, 0)
