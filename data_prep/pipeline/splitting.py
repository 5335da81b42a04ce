"""English words and sentences as datatrove splits them, with spaCy's words kept in a table.

spaCy's tokenizer treats each run of characters without white space by itself, so the words of a
run are split once and looked up afterwards. One step of it does not: special cases such as ":))"
are also sought over the white space between runs, and of matches that overlap the longest wins. So
"so:) )" is not split as "so:)" is. That can only change a run whose words depend on that step, and
only if a special case may reach over its border; such lines are split by spaCy as a whole.

spaCy takes punctuation from both ends of a run, one after the other. Its patterns are given to it
so that they look at the ends alone, not each time at all of the run. It still copies the run each
time, so that of very long runs with hundreds of marks at their ends these are taken here: special
cases such as ":)" are not found among them. Any other run has spaCy's words.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import regex
from datatrove.utils.word_tokenizers import SpaCyTokenizer
from spacy.lang.lex_attrs import is_punct
from spacy.tokenizer import Tokenizer

from data_prep.pipeline.vocabulary import Vocabulary, Words

# Characters of the runs in the table: some 170,000 runs, 80 MB with their words.
_HELD = 1_500_000
# spaCy takes this name for one of its own; datatrove then leaves it out of the text.
BREAKS_SPACY = "IS_ALPHA"
_PIECE = regex.compile(r"\s+|\S+")
_RUN = regex.compile(r"\S+")
# Punctuation is taken here from runs of more characters, if there are so many pieces of it.
_LONG, _MANY = 10_000, 500
# What spaCy takes from an end has fewer characters, with those that its patterns look back at;
# only of dots it takes any number.
_END = 32


class EnglishWords(SpaCyTokenizer):  # type: ignore[misc]
    """datatrove's English tokenizer; its filters take it as their `language`."""

    def __init__(self) -> None:
        super().__init__("en")
        self.forget()

    @cached_property
    def tokenizer(self) -> Any:
        """spaCy's pipeline, with faster patterns of the same matches."""
        pipeline = super().tokenizer
        spacy = pipeline.tokenizer
        search = spacy.suffix_search

        def suffix(text: str) -> Any:
            dots = len(text) - len(text.rstrip("."))
            return search(text[-dots - _END :])

        # Each of its alternatives is anchored, which `search` does not use.
        spacy.prefix_search = spacy.prefix_search.__self__.match
        spacy.suffix_search = suffix
        return pipeline

    def forget(self) -> None:
        """Empty the table."""
        self._vocabulary = Vocabulary()
        # Of each run: the numbers of its words in the vocabulary.
        self._words: dict[str, bytes] = {}
        self._held = 0
        # Runs whose words depend on special cases sought over runs: their outermost pieces.
        self._fragile: dict[str, tuple[str, str]] = {}

    def word_tokenize(self, text: str) -> list[str]:
        """What spaCy gives, without white space."""
        return self.words(text).texts()

    def words(self, text: str) -> Words:
        """The words of `word_tokenize`, by number."""
        runs = text.split()
        numbers = None if BREAKS_SPACY in text else self._looked_up(runs)
        if numbers is None:
            alone = Vocabulary()
            return Words(alone.numbers(self._by_spacy(text)), alone)
        if self._fragile and self._reached_over(text, runs):
            # No special case reaches over a new line.
            numbers = b"".join(map(self._of_line, text.split("\n")))
        return Words(numbers, self._vocabulary)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """The spans of spaCy's sentencizer: one begins at a word behind a full stop.

        datatrove takes the last one to the end of the text, wherever it ends here.
        """
        if BREAKS_SPACY in text:
            spans: list[tuple[int, int]] = super().span_tokenize(text)
            return spans
        starts, ends, ended, place = [0], [], False, 0
        for word in self._pieces(text):
            end = place
            place = text.index(word, place)
            stop = word in self._stops
            if ended and not stop and not is_punct(word):
                starts.append(place)
                ends.append(end)
            ended = stop or (ended and is_punct(word))
            place += len(word)
        return list(zip(starts, [*ends, place], strict=True)) if text else []

    def _by_spacy(self, text: str) -> list[str]:
        found: list[str] = []
        begin = 0
        for match in _RUN.finditer(text):
            run = match.group()
            if words := self._stripped(run):
                found += super().word_tokenize(text[begin : match.start()])
                found += words
                begin = match.end()
        found += super().word_tokenize(text[begin:])
        return found

    def _stripped(self, run: str) -> list[str]:
        """The words of a very long run whose ends are much punctuation; else none."""
        if len(run) <= _LONG:
            return []
        before, rest, after = _without_affixes(run, self.tokenizer.tokenizer)
        if len(before) + len(after) < _MANY:
            return []
        return [*before, *super().word_tokenize(rest), *after]

    def _pieces(self, text: str) -> Iterator[str]:
        """spaCy's tokens: words and white space but for single spaces behind words."""
        words = iter(self.word_tokenize(text))
        for place, piece in enumerate(_PIECE.findall(text)):
            if not piece.isspace():
                length = len(piece)
                while length:
                    yield (word := next(words))
                    length -= len(word)
            elif space := piece[place > 0 and piece[0] == " " :]:
                yield space

    @cached_property
    def _stops(self) -> frozenset[str]:
        return frozenset(self.tokenizer.get_pipe("sentencizer").punct_chars)

    def _looked_up(self, runs: list[str]) -> bytes | None:
        """The numbers of the runs' words; None if the table has no room for the runs."""
        try:
            return b"".join(map(self._words.__getitem__, runs))
        except KeyError:
            if not self._learn(set(runs)):
                return None
            return b"".join(map(self._words.__getitem__, runs))

    def _of_line(self, line: str) -> bytes:
        """The numbers of a line's words, whose runs are in the table."""
        runs = line.split()
        if not self._reached_over(line, runs):
            return b"".join(map(self._words.__getitem__, runs))
        words = self._by_spacy(line)
        return self._vocabulary.numbers(words)

    def _learn(self, runs: set[str]) -> bool:
        """Split the runs that are not in the table; false if there is no room for them."""
        missing = [run for run in runs if run not in self._words]
        if self._held + sum(map(len, missing)) > _HELD:
            self.forget()
            missing = list(runs)
        size = sum(map(len, missing))
        if size > _HELD:
            return False
        self._add(missing)
        self._held += size
        return True

    def _add(self, runs: list[str]) -> None:
        words = {run: found for run in runs if (found := tuple(self._stripped(run)))}
        others = [run for run in runs if run not in words]
        # Every special case of the last step holds punctuation.
        uneven = [run for run in others if not run.isalnum()]
        without = self._without_special_cases  # made outside of the zone, which is forgotten
        with self.tokenizer.memory_zone():
            words |= zip(others, _split(self.tokenizer.tokenizer, others), strict=True)
            for run, pieces in zip(uneven, _split(without, uneven), strict=True):
                if words[run] != pieces:
                    self._fragile[run] = pieces[0], pieces[-1]
        self._vocabulary.add(list(itertools.chain.from_iterable(words.values())))
        self._words.update((run, self._vocabulary.numbers(words[run])) for run in runs)

    @cached_property
    def _without_special_cases(self) -> _Pieces:
        return _Pieces(self.tokenizer.tokenizer)

    @cached_property
    def _adjacent(self) -> frozenset[tuple[str, str]]:
        """Pieces that stand next to each other in a special case that is sought over runs."""
        spacy = self.tokenizer.tokenizer
        plain = Tokenizer(spacy.vocab, {}, *_patterns(spacy))
        return frozenset(
            pair
            for case in spacy.rules
            for pair in itertools.pairwise(token.text for token in plain(case))
        )

    def _reached_over(self, text: str, runs: list[str]) -> bool:
        """Whether a special case may reach over the border of a run that depends on them."""
        fragile = self._fragile
        if fragile.keys().isdisjoint(runs):
            return False
        places = [place for place, run in enumerate(runs) if run in fragile]
        for place in {max(place + step, 0) for place in places for step in (-1, 0)}:
            one, *other = runs[place : place + 2]
            # Other white space is a piece of its own, which no special case has inside.
            if other and self._is_adjacent(one, other[0]) and f"{one} {other[0]}" in text:
                return True
        return False

    def _is_adjacent(self, run: str, other: str) -> bool:
        return (self._ends(run)[1], self._ends(other)[0]) in self._adjacent

    def _ends(self, run: str) -> tuple[str, str]:
        if run in self._fragile:
            return self._fragile[run]
        words = Words(self._words[run], self._vocabulary).texts()
        return words[0], words[-1]


class _Pieces(Tokenizer):  # type: ignore[misc]
    """spaCy's tokenizer without its last step: it knows of no special cases with punctuation."""

    _made = False

    def __init__(self, whole: Tokenizer) -> None:
        super().__init__(whole.vocab, whole.rules, *_patterns(whole))
        self._made = True

    # spaCy asks these whether a special case is one for the last step.
    def find_prefix(self, string: str) -> int:
        return super().find_prefix(string) if self._made else 0

    def find_suffix(self, string: str) -> int:
        return super().find_suffix(string) if self._made else 0

    def find_infix(self, string: str) -> Any:
        return super().find_infix(string) if self._made else 0


def _patterns(whole: Tokenizer) -> tuple[Any, ...]:
    return (
        whole.prefix_search,
        whole.suffix_search,
        whole.infix_finditer,
        whole.token_match,
        whole.url_match,
    )


def _without_affixes(run: str, spacy: Tokenizer) -> tuple[list[str], str, list[str]]:
    """What spaCy takes from the ends of a run until they are none or the run is no longer long."""
    before: list[str] = []
    after: list[str] = []
    start, end = 0, len(run)
    while end - start > _LONG:
        head = spacy.find_prefix(run[start : start + _END])
        tail = spacy.find_suffix(run[end - _END : end])
        if head == _END or tail == _END:  # of dots there may be more
            head, tail = spacy.find_prefix(run[start:end]), spacy.find_suffix(run[start:end])
        if head == end - start or not head + tail:
            break
        if head:
            before.append(run[start : start + head])
        if tail:
            after.append(run[end - tail : end])
        start, end = start + head, end - tail
    return before, run[start:end], after[::-1]


def _split(tokenizer: Tokenizer, runs: list[str]) -> Iterator[tuple[str, ...]]:
    """The tokens of each run."""
    tokens = (token.text for token in tokenizer("\n".join(runs)))
    for within, group in itertools.groupby(tokens, "\n".__ne__):
        if within:
            yield tuple(group)
