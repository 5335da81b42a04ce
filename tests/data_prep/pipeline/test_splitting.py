"""Words and sentences are those of spaCy, whatever the text."""

from __future__ import annotations

import inspect
import random

import pytest
from datatrove.utils.text import split_into_sentences
from datatrove.utils.word_tokenizers import SpaCyTokenizer

from data_prep.pipeline import splitting
from data_prep.pipeline.splitting import EnglishWords

SPACY = SpaCyTokenizer("en")
# Pieces of special cases, punctuation of sentences, and white space of all kinds.
PIECES = [
    *(":", "(", ")", "-", "8", "D", ":)", "x", "hello", "a.m.", "'s", "don't", ".", "!", "?", '"'),
    *("Mr.", "]", "=", ">", "_", "o", "f(x):", "\u2019", "\u3002", "é", "<3", "IS_ALPH"),
    *(" ", " ", "  ", "\n", "\xa0", "\t"),
]


@pytest.fixture(scope="module")
def ours() -> EnglishWords:
    return EnglishWords()


@pytest.mark.parametrize(
    "text",
    ["", " ", "so:) )", "(so:) ) f(x): )", "so:)\n)", "so:)  )", "a.m. . (:) :) )", "IS_ALPHA a"],
)
def test_special_cases_that_reach_over_white_space_are_those_of_spacy(
    ours: EnglishWords, text: str
) -> None:
    assert ours.word_tokenize(text) == SPACY.word_tokenize(text)


def test_any_mixture_of_pieces_is_split_as_by_spacy(ours: EnglishWords) -> None:
    source = random.Random(1)
    for _ in range(400):
        text = "".join(source.choices(PIECES, k=source.randint(1, 20)))
        assert ours.word_tokenize(text) == SPACY.word_tokenize(text), ascii(text)
        assert split_into_sentences(text, ours) == split_into_sentences(text), ascii(text)


def test_source_code_is_split_as_by_spacy(ours: EnglishWords) -> None:
    text = inspect.getsource(random)[:20_000]
    assert ours.word_tokenize(text) == SPACY.word_tokenize(text)
    assert ours.word_tokenize(text) == SPACY.word_tokenize(text)  # all of it from the table
    assert split_into_sentences(text, ours) == split_into_sentences(text)


def test_a_full_table_is_emptied_and_a_text_too_large_for_it_is_split_by_spacy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(splitting, "_HELD", 30)
    small = EnglishWords()
    for text in (
        "One, two. " * 3,
        "Three; four five six seven!",
        "One, " + "eight? " * 2,
        "x" * 40,
    ):
        assert small.word_tokenize(text) == SPACY.word_tokenize(text)
        assert sum(map(len, small._words)) == small._held <= 30
