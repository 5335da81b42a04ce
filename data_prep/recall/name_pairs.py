"""Pairs of a book, or a passage of it, and the names in it: a substitute for summaries.

The answer lists the most frequent names of the text, which takes all of the text to know. A *name*
is a word that is capitalised inside sentences, more often than it is in lower case, and is not a
title: mostly persons, some places and peoples.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import regex

from data_prep.dataset import shards
from data_prep.dataset.settings import MistakeError
from data_prep.dataset.shards import Document
from data_prep.recall.draws import Draws
from data_prep.recall.generate import record, write_lines
from data_prep.recall.tasks import length
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import Tokenizer

_WORD = r"[^\W\d_]+"
# After a small letter, a comma or a semicolon and white space: no sentence begins there.
_CAPITALISED = regex.compile(r"(?<=[\p{Ll},;]\s)\p{Lu}\p{Ll}+\b")
_TITLES = frozenset(
    re.findall(
        r"\w+",
        """
        Aunt Captain Colonel Doctor Dr Father Lady Lord Madam Madame Major Master Miss Mistress
        Mother Mr Mrs Ms Reverend Sir Squire Uncle
        """,
    )
)
_TRIES = 100  # passages drawn until one has a name


@dataclass(frozen=True)
class Wanted:
    """A pair of each whole book; or `passages` pairs of passages, of `low` to `high` tokens each.

    An answer has at most `names` names.
    """

    passages: int | None
    low: int
    high: int
    names: int
    seed: int


def names(text: str, most: int) -> list[str]:
    """At most `most` names, the most frequent first; of equal ones the first in the text."""
    capitalised = Counter(_CAPITALISED.findall(text))
    in_lower_case = Counter(re.findall(_WORD, text))
    return [
        name
        for name, times in capitalised.most_common()  # equal ones in the order of the text
        if name not in _TITLES and in_lower_case[name.lower()] < times
    ][:most]


def write(path: Path, directory: Path, wanted: Wanted) -> tuple[int, int]:
    """Write pairs of the data set's books as jsonl (id, prompt, answer).

    Returns how many, and of how many books none is made: those without a name or, of passages,
    shorter than `low` tokens. The bytes depend only on the data set and on what is wanted. An
    answer begins with its space. Raises MistakeError where there are no books or no names, and what
    `write_lines` raises.
    """
    manifest = shards.read_manifest(directory)
    documents = shards.read_documents(directory, manifest)
    # Their order in the shards depends on the number of these; sorted by id it does not.
    least = wanted.low if wanted.passages else 1
    books = sorted((one for one in documents if len(one.tokens) >= least), key=lambda book: book.id)
    if not books:
        raise MistakeError(
            f"{directory}: none of its documents has {least:,} tokens; lower --min-tokens, or give "
            "books"
        )
    model = tokenizer.load(tokenizer.find(directory))
    pairs = (_passages if wanted.passages else _whole)(books, model, wanted)
    made = [record(id, text, f" {', '.join(found)}") for id, text, found in pairs]
    if not made:
        raise MistakeError(f"{directory}: none of its documents has a name in it; give books")
    write_lines(path, made)
    return len(made), manifest.documents - (len(books) if wanted.passages else len(made))


# Id, text and names of each pair.
_Pairs: TypeAlias = Iterator[tuple[str, str, list[str]]]


def _whole(books: list[Document], model: Tokenizer, wanted: Wanted) -> _Pairs:
    for book in books:
        text = model.decode(book.tokens)
        if found := names(text, wanted.names):
            yield book.id, text, found


def _passages(books: list[Document], model: Tokenizer, wanted: Wanted) -> _Pairs:
    """From drawn places of drawn books; the logarithm of the length is uniformly distributed."""
    assert wanted.passages is not None
    for number in range(wanted.passages):
        draws = Draws(wanted.seed, "passage", str(number))
        tokens = length(wanted.seed, "passage", number, wanted.low, wanted.high)
        for _ in range(_TRIES):
            book = draws.pick(books)
            first = draws.below(max(len(book.tokens) - tokens, 0) + 1)
            text = model.decode(book.tokens[first : first + tokens])
            # Without words that were cut: from the first to the last white space.
            text = re.sub(r"\A\S*\s*|\s*\S*\Z", "", text)
            if found := names(text, wanted.names):
                yield f"{book.id}-{first}-{tokens}", text, found
                break
        else:
            raise MistakeError(
                f"{_TRIES} passages of {tokens} tokens in a row have no name in them; ask for "
                "longer ones (--min-tokens), or give books"
            )
