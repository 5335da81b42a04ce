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


@pytest.mark.parametrize(
    "run",
    [
        *("(" * 300, "=" * 200, "'s" * 150, "(.." * 100, "😀" * 150, "." * 300, "x" * 300),
        *("x" + "." * 99, "." * 99 + "x", "x" * 99 + "5km².", "x" * 99 + "9US$)", "+" * 99 + "1+"),
        *(
            "x" * 99 + "°C.",
            "x" * 99 + "AB.",
            "x" * 99 + "a...'s",
            "“" * 50 + "x" * 99 + "……”" * 30,
        ),
    ],
)
def test_long_runs_with_punctuation_at_their_ends_are_split_as_by_spacy(
    ours: EnglishWords, run: str
) -> None:
    assert ours.word_tokenize(f"a {run} b") == SPACY.word_tokenize(f"a {run} b")


def test_punctuation_taken_from_very_long_runs_is_what_spacy_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(splitting, "_LONG", 60)
    monkeypatch.setattr(splitting, "_MANY", 2)
    source, stripped = random.Random(2), EnglishWords()
    # Of these no special case consists, and an infix is among them.
    pieces = [*("(", "¿", "..", "…", "$", "《", "»", "£", "a..b", "12km", "x", "." * 50), "[" * 20]
    for _ in range(100):
        text = "".join(source.choices([*pieces, " "], k=100))
        words = SPACY.word_tokenize(text)
        assert stripped.word_tokenize(text) == words, ascii(text)
        assert stripped._by_spacy(text) == words


@pytest.mark.parametrize(
    ("before", "after"), [("(", ""), ("=", ""), ("", "'s"), ("(..", ""), ("", "\U0001f600")]
)
@pytest.mark.parametrize("held", [splitting._HELD, 30])
def test_a_very_long_run_of_punctuation_is_split_in_time_that_grows_with_its_length(
    ours: EnglishWords, before: str, after: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """spaCy takes minutes for each; this takes a fraction of a second."""
    monkeypatch.setattr(splitting, "_HELD", held)
    text = f"He wrote {before * 30_000}abc{after * 30_000} it."
    words = ours.word_tokenize(text)
    assert words[:2] == ["He", "wrote"] and words[-2:] == ["it", "."]
    assert len(words) > 30_000 and "abc" in words and "".join(words) == text.replace(" ", "")


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
