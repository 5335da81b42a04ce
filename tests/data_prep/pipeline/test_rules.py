"""Rules decide as datatrove's filters do, in verdict, reason and text."""

from __future__ import annotations

import inspect
import json
import random
import sys
import textwrap
from pathlib import Path

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

sys.path.append(str(Path(__file__).parents[3] / "tools/bench"))
import web_pages

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


def test_bounds_of_n_grams_are_never_below_what_is_counted_and_mostly_near() -> None:
    source = random.Random(2)
    for size in (0, 1, 5, 30, 200):
        # Few letters: n words that are equal when joined are often not the same words.
        for alphabet in ("a", "ab", "abcdefghij"):
            words = ["".join(source.choices(alphabet, k=source.randint(1, 3))) for _ in range(size)]
            top = dict(rules.most_frequent(words, (2, 3, 4)))
            again = dict(rules.repeated(words, (5, 7, 10)))
            for n in (2, 3, 4):
                grams = get_n_grams(words, n)
                assert not grams or top[n] >= find_top_duplicate(grams)
            for n in (5, 7, 10):
                assert again.get(n, 0) >= find_all_duplicate(words, n)
    words = [f"w{n}" for n in range(400)]
    assert set(dict(rules.repeated(words, (5, 10))).values()) == {0}
    # "w0".."w9" again: 20 characters in 10 words; "w1 w2" of 5 characters occurs twice.
    assert dict(rules.repeated(words + words[:10], (5, 10))) == {5: 20, 10: 20}
    assert dict(rules.most_frequent(["w1", "w2", "x", "w1", "w2"], (2,))) == {2: 10}
