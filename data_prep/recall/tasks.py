"""The tasks of recall by name, and their documents as functions of seed, task and number."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

from data_prep.dataset import shards
from data_prep.dataset.settings import MistakeError
from data_prep.dataset.wording import counted
from data_prep.recall import needles, passkey, stories
from data_prep.recall.draws import Draws
from data_prep.recall.pair import Pair, fitted
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import Tokenizer

Task: TypeAlias = Callable[[Draws, Sequence[str], float | None], Pair]
"""Makes a pair from random choices, pieces of filler and a depth (None: drawn)."""

PASSKEY = "passkey"
TASKS: dict[str, Task] = {
    PASSKEY: passkey.passkey,
    "single": partial(needles.needles, keys=1, values=1, queries=1),
    "multikey": partial(needles.needles, keys=4, values=1, queries=1),
    "multivalue": partial(needles.needles, keys=1, values=4, queries=1),
    "multiquery": partial(needles.needles, keys=4, values=1, queries=4),
    "variables": needles.variable_tracking,
    "words": needles.common_words,
    "qa1": partial(stories.story, with_things=False, ask=stories.person_question),
    "qa2": partial(stories.story, with_things=True, ask=stories.thing_question),
    "qa3": partial(stories.story, with_things=True, ask=stories.past_question),
}
"""By the names in commands and reports. All but the first are hidden in a book."""

# Chinese and Japanese full stop, exclamation and question mark, and the danda of Hindi. Often no
# space follows them: opening quotes and brackets behind them belong to the next sentence.
_MARKS = "\u3002\uff01\uff1f\u0964"
_OPENING = "\u201c\u2018\u300c\u300e\uff08\u300a\u3008\u3010"
# The end of the text may stand for a mark: otherwise a text without one would be searched anew
# from each of its characters.
_SENTENCE = re.compile(rf"[^.!?{_MARKS}]+(?:([.!?]+[^\s\w]*|[{_MARKS}]+[^\s\w{_OPENING}]*)\s*|\Z)")


class Haystack:
    """Pieces of filler from a drawn place on, starting again at the end."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces = pieces

    @classmethod
    def repeated(cls) -> Haystack:
        """The passkey's filler."""
        return cls([passkey.FILLER])

    @classmethod
    def of_books(cls, directory: Path) -> Haystack:
        """The sentences of a data set's documents, with single spaces.

        Raises DataError where there is no data set or a damaged one, and MistakeError where it
        has no sentence.
        """
        manifest = shards.read_manifest(directory)
        own = tokenizer.load(tokenizer.find(directory))
        pieces = [
            " ".join(sentence.split())
            for document in shards.read_documents(directory, manifest)
            for sentence in sentences(own.decode(document.tokens))
        ]
        if not pieces:
            raise MistakeError(
                f"{directory}: holds no sentence, one that ends in a full stop, a question or an "
                "exclamation mark, to hide anything among; give a data set of books"
            )
        return cls(pieces)

    def drawn(self, draws: Draws) -> Callable[[int], list[str]]:
        """A function that gives the first n pieces from one place on."""
        first, count = draws.below(len(self._pieces)), len(self._pieces)
        return lambda n: [self._pieces[(first + place) % count] for place in range(n)]


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text up to the last mark that ends one, in time linear in the text."""
    return (match[0] for match in _SENTENCE.finditer(text) if match[1])


def document(
    task: str,
    haystack: Haystack,
    model: Tokenizer | None,
    length: int,
    *,
    seed: int,
    number: int,
    depth: float | None = None,
) -> Pair:
    """The task's document of this number, with a prompt of at most `length` tokens.

    Where the task is longer without filler (`least`), the prompt is that long. Without a model
    each byte counts as a token.
    """
    names = (task, str(number))
    pieces = haystack.drawn(Draws(seed, "filler", *names))

    def made_of(count: int) -> Pair:
        return TASKS[task](Draws(seed, "task", *names), pieces(count), depth)

    return fitted(made_of, partial(_tokens, model), length)


def least(
    task: str, model: Tokenizer | None, *, seed: int, number: int, depth: float | None = None
) -> int:
    """Tokens of the prompt of the task's document of this number without any filler."""
    return _tokens(model, TASKS[task](Draws(seed, "task", task, str(number)), [], depth).prompt)


def least_of_all(
    task: str,
    model: Tokenizer,
    *,
    seed: int,
    samples: int,
    depths: Sequence[float | None],
) -> int:
    """The most of `least` over the first `samples` documents at each depth: no prompt of a task
    can be asked for in fewer tokens."""
    return max(
        least(task, model, seed=seed, number=number, depth=depth)
        for depth in depths
        for number in range(samples)
    )


def too_short(
    task: str,
    model: Tokenizer,
    lengths: Sequence[int],
    *,
    seed: int,
    samples: int,
    depths: Sequence[float | None],
) -> list[str]:
    """Which of `lengths` are fewer tokens than `least_of_all`, a sentence each."""
    least_asked = least_of_all(task, model, seed=seed, samples=samples, depths=depths)
    return [
        f"{counted(length, 'token is', 'tokens are')} fewer than {task} has without any filler; "
        f"ask for at least {least_asked}"
        for length in lengths
        if length < least_asked
    ]


def _tokens(model: Tokenizer | None, text: str) -> int:
    if model is None:
        return len(text.encode())
    return sum(len(ids) for _, ids in model.encode_parts([text]))


def length(seed: int, task: str, number: int, low: int, high: int) -> int:
    """Tokens of a document's prompt, `low` to `high`; their logarithm is uniformly distributed."""
    draws = Draws(seed, "length", task, str(number))
    return int(low * math.exp(draws.fraction() * math.log((high + 1) / low)))
