"""Documents that lead from pairs of words to needles in a book, and a tokenizer for them.

A document states facts, each a key and a number, and after some text of a book asks for the number
of every key. The wording grows from `-lamp 123 ... -lamp 123` to that of `data-prep recall`, whose
words these are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from data_prep.dataset import durable
from data_prep.recall.draws import Draws
from data_prep.recall.generate import record
from data_prep.recall.mqar import Answers
from data_prep.recall.needles import ADJECTIVES, NOUNS
from data_prep.recall.tasks import Haystack, length

_SPACE = "\u2581"  # as SentencePiece writes it
_BOOK_PIECES = 1100
_BYTES_OF_A_PIECE = 2.4  # in the books
_SENTENCES = 100_000  # of the books that the pieces are made of
GROUPS = 1000
"""Groups of three digits with which a number begins: 000 to 999."""

_WORDS = (
    "One of the special magic numbers for is What mentioned in provided text The are all and number"
)


@dataclass(frozen=True)
class Wording:
    """What is written around a key and its number, in a fact and in a question."""

    between: tuple[str, ...] = ()
    """Words between the key and the number of a fact."""
    asking: tuple[str, ...] = ()
    """Words between the key of a question and the answer."""
    cut: bool = False
    """Of both only the first words, as many as are drawn."""
    before: str = ""
    before_question: str = ""
    end: str = ""
    adjective: bool = False
    """Keys are an adjective and a noun, not a noun alone."""
    again: bool = False
    """The words of a question come twice: as a question, and as the beginning of its answer."""

    def fact(self, draws: Draws, key: str, number: str) -> str:
        """A key and its number."""
        return f"{self.before}{key}{self._words(draws, self.between)} {number}{self.end}"

    def question(self, draws: Draws, key: str) -> str:
        """All before the number."""
        asked = f"{self.before_question}{key}"
        if self.again:
            return (
                f" What is the{asked}{''.join(self.asking[:-1])}? The{asked}{''.join(self.asking)}"
            )
        return f"{asked}{self._words(draws, self.asking)}"

    def _words(self, draws: Draws, words: Sequence[str]) -> str:
        return "".join(words[: draws.below(len(words) + 1)] if self.cut else words)


_IS = (" is", ":")
_TEXT = (" mentioned", " in", " the", " provided", " text", " is")
PAIRS = Wording()
APART = Wording(_IS[:1], _TEXT[:1], cut=True)
FURTHER = Wording(_IS, _TEXT[:3], cut=True, end=".")
KEYS = Wording(_IS, _TEXT, cut=True, end=".", adjective=True)
SHORT = Wording(_IS, _TEXT, before=" for", before_question=" number for", end=".", adjective=True)
WHOLE = Wording(
    _IS,
    _TEXT,
    before=" One of the special magic numbers for",
    before_question=" special magic number for",
    end=".",
    adjective=True,
    again=True,
)


@dataclass(frozen=True)
class Facts:
    """Documents of `pairs` facts and of 0 to `gap` characters of a book; all of these take turns.

    The characters follow the facts, or lie between them where they are `scattered`.
    """

    name: str
    wordings: tuple[Wording, ...]
    pairs: tuple[int, ...]
    gap: int
    keys: int = len(NOUNS)
    """Different keys there are in the set."""
    groups: int = GROUPS
    """Different first three digits there are."""
    digits: tuple[int, ...] = (7,)
    """Digits of the numbers of a document; one of these, drawn for each number."""
    answers: Answers = "values"
    scattered: bool = False

    @property
    def mean(self) -> float:
        """Mean tokens of a document, about."""
        words = [
            len(one.between)
            + (1 + one.again) * len(one.asking)
            + 2 * one.adjective
            + 12 * one.again
            for one in self.wordings
        ]
        pieces = [2 + (digits - 3) // 2 for digits in self.digits]  # of a key and its number
        a_pair = 2 * sum(pieces) / len(pieces) + sum(words) / len(words)
        text = self.gap / math.log(self.gap + 2) / _BYTES_OF_A_PIECE
        return a_pair * sum(self.pairs) / len(self.pairs) + text

    def line(self, books: Haystack, number: int) -> bytes:
        """The line of a file that holds the document of this number."""
        pairs = self.pairs[number // len(self.wordings) % len(self.pairs)]
        wording = self.wordings[number % len(self.wordings)]
        draws = Draws(1, self.name, str(number))
        keys = [f"-{noun}" for noun in draws.sample(NOUNS[: self.keys], pairs)]
        if wording.adjective:
            adjectives = draws.sample(ADJECTIVES, pairs)
            keys = [f" {one}{key}" for one, key in zip(adjectives, keys, strict=True)]
        firsts = draws.sample(range(self.groups), pairs)
        numbers = [self._number(draws, first) for first in firsts]
        facts = [wording.fact(draws, *pair) for pair in zip(keys, numbers, strict=True)]
        stated = self._among(facts, books, draws, number)
        order = draws.sample(range(pairs), pairs)
        prompts = [wording.question(draws, keys[one]) for one in order]
        answers = [f" {numbers[one]}" for one in order]
        if self.answers == "pairs":
            asked = "".join(
                prompt + answer for prompt, answer in zip(prompts, answers, strict=True)
            )
            return record(f"{self.name}-{number}", stated, asked)
        prompts[0] = stated + prompts[0]
        return record(f"{self.name}-{number}", prompts, answers)

    def _number(self, draws: Draws, first: int) -> str:
        rest = draws.pick(self.digits) - 3
        return f"{first:03d}" + (f"{draws.below(10**rest):0{rest}d}" if rest else "")

    def _among(self, facts: Sequence[str], books: Haystack, draws: Draws, number: int) -> str:
        """The facts and some text of a book."""
        size = length(1, self.name, number, 1, self.gap + 1) - 1 if self.gap else 0
        text = " ".join(books.drawn(draws)(1 + size // 8))[:size].strip()
        if not self.scattered:
            return "".join(facts) + (f" {text}" if text else "")
        places = sorted(draws.below(len(text) + 1) for _ in facts)
        parts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
        return parts[0] + "".join(fact + part for fact, part in zip(facts, parts[1:], strict=True))


def own_pieces() -> list[str]:
    """Pieces that the tokenizer is given: each word of a key, and digits in groups.

    So a number is three symbols, ` 123`, `45` and `67`, and each key ends in one of its own.
    """
    digits = [f"{_SPACE}{group:03d}" for group in range(GROUPS)]
    digits += [f"{group:02d}" for group in range(100)] + [str(digit) for digit in range(10)]
    keys = [f"-{noun}" for noun in NOUNS] + [f"{_SPACE}{adjective}" for adjective in ADJECTIVES]
    return [*digits, *keys, *(f"{_SPACE}{word}" for word in _WORDS.split()), ":", "?", ".", ","]


def train_tokenizer(path: Path, books: Iterator[str], more: int = _BOOK_PIECES) -> None:
    """Write a SentencePiece model with these pieces and `more` of the books' texts.

    The 256 bytes, `<unk>`, BOS and EOS are among the latter.
    """
    given = list(dict.fromkeys(own_pieces()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replacing(path) as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=books,
            model_writer=out,
            model_type="unigram",
            vocab_size=len(given) + more,
            user_defined_symbols=given,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            num_threads=1,
            input_sentence_size=_SENTENCES,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
