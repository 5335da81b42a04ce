"""The tasks of recall by name, and their documents: each a function of seed, task and number."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from data_prep.dataset import shards
from data_prep.dataset.shards import DataError
from data_prep.recall import needles, passkey, stories
from data_prep.recall.draws import Draws
from data_prep.recall.pair import Pair, fitted
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import Tokenizer

Task: TypeAlias = Callable[[Draws, Sequence[str], float | None], Pair]
"""Makes a pair of choices, pieces of filler and a depth; None: it is drawn."""

PASSKEY = "passkey"
TASKS: dict[str, Task] = {
    PASSKEY: passkey.passkey,
    "single": needles.single_needle,
    "multikey": needles.multi_key,
    "multivalue": needles.multi_value,
    "multiquery": needles.multi_query,
    "variables": needles.variable_tracking,
    "words": needles.common_words,
    "qa1": stories.one_fact,
    "qa2": stories.two_facts,
    "qa3": stories.three_facts,
}
"""By the name that commands and reports give them; all but the first stand in a book."""

_SENTENCE = re.compile(r"[^.!?]+[.!?]+[^\s\w]*\s*")


class Haystack:
    """Pieces of filler from a place that is drawn, round and round."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces = pieces

    @classmethod
    def repeated(cls) -> Haystack:
        """The passkey's filler."""
        return cls([passkey.FILLER])

    @classmethod
    def of_books(cls, directory: Path) -> Haystack:
        """The sentences of a data set's documents, white space made one space.

        Raises DataError where there is no data set, or no sentence in it.
        """
        manifest = shards.read_manifest(directory)
        own = tokenizer.load(tokenizer.find(directory))
        pieces = [
            " ".join(sentence.split())
            for info in manifest.shards
            for document in shards.read_shard(directory / info.name, info)
            for sentence in _SENTENCE.findall(own.decode(document.tokens))
        ]
        if not pieces:
            raise DataError(f"{directory}: holds no sentence to hide anything among; give books")
        return cls(pieces)

    def drawn(self, draws: Draws) -> Callable[[int], list[str]]:
        """Gives the first so many pieces from one place on."""
        first, count = draws.below(len(self._pieces)), len(self._pieces)
        return lambda many: [self._pieces[(first + place) % count] for place in range(many)]


def document(
    task: str,
    haystack: Haystack,
    model: Tokenizer | None,
    length: int,
    *,
    seed: int,
    number: int,
    depth: float | None = None,
) -> Pair | None:
    """The task's document of this number, its prompt of at most `length` tokens.

    Without a model each byte counts as a token. None where even the task's own text is longer.
    """
    names = (task, str(number))
    pieces = haystack.drawn(Draws(seed, "filler", *names))

    def made_of(many: int) -> Pair:
        return TASKS[task](Draws(seed, "task", *names), pieces(many), depth)

    def count(text: str) -> int:
        if model is None:
            return len(text.encode())
        return sum(len(ids) for _, ids in model.encode_parts([text]))

    return fitted(made_of, count, length)


def length(seed: int, task: str, number: int, low: int, high: int) -> int:
    """Tokens of a document's prompt, `low` to `high`; their logarithm is uniform."""
    draws = Draws(seed, "length", task, str(number))
    return int(low * math.exp(draws.fraction() * math.log((high + 1) / low)))
