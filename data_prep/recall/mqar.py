"""Multi-query associative recall, after Zoology (Arora et al. 2023, arXiv 2312.04927).

A document states pairs of a key and a value, `k1 v1 k2 v2 ...`; after a gap it asks for every key
once, in another order, and each key is followed by its value. Keys and values are from disjoint
halves of a vocabulary of single characters, each a token of `tokenizer_json`; a gap is of letters.

In a line of a file each value is an answer, and its key the prompt to it, so that the loss leaves
out the keys, which nothing predicts; or the questions with all values are one answer.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.recall.draws import Draws
from data_prep.recall.generate import record
from data_prep.recall.pair import Pair
from data_prep.recall.tasks import length

MOST_PAIRS = 512
"""Keys there are, and values."""

# Ideographs and Hangul syllables: the characters that Unicode has most of, none of them composed.
_KEYS = [chr(0x4E00 + number) for number in range(MOST_PAIRS)]
_VALUES = [chr(0xAC00 + number) for number in range(MOST_PAIRS)]
_LETTERS = string.ascii_lowercase
SYMBOLS = "".join([_LETTERS, *_KEYS, *_VALUES])
"""Every character of a document."""

Answers = Literal["values", "pairs"]
"""What the loss is of: values alone, or keys with their values."""

_TOKENIZER = "mqar.tokenizer.json"
_SPECIAL = ("<s>", "</s>")
# No document has any, but a tokenizer that lacks white space is taken for one that changes it.
_WHITE_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Wanted:
    """Documents whose numbers of pairs take turns, with gaps of 0 to `gap` letters.

    Keys and values are drawn from the first `symbols` of each.
    """

    pairs: Sequence[int]
    gap: int
    symbols: int
    seed: int
    answers: Answers = "values"


def document(seed: int, number: int, pairs: int, gap: int, symbols: int = MOST_PAIRS) -> Pair:
    """The document of this number: all before the first question, and the questions with answers.

    The pairs, and the order in which they are asked for, are the same for every gap, and a longer
    gap begins with a shorter one. A letter before the first pair makes up an even number of tokens
    with BOS, so that no pair lies across the end of a segment.
    """
    names = ("mqar", str(pairs), str(number))
    draws, letters = Draws(seed, *names), Draws(seed, "gap", *names)
    keys, values = (draws.sample(each[:symbols], pairs) for each in (_KEYS, _VALUES))
    stated = [key + value for key, value in zip(keys, values, strict=True)]
    asked = draws.sample(stated, pairs)
    filler = "".join(letters.pick(_LETTERS) for _ in range(gap + 1))
    return Pair("".join([filler[0], *stated, filler[1:]]), "".join(asked))


def line(wanted: Wanted, number: int) -> bytes:
    """The line of a file that holds the document of this number; gaps are log-uniform."""
    pairs = wanted.pairs[number % len(wanted.pairs)]
    gap = length(wanted.seed, "mqar", number, 1, wanted.gap + 1) - 1
    id = f"mqar-{wanted.seed}-{number}"
    stated, asked = document(wanted.seed, number, pairs, gap, wanted.symbols)
    if wanted.answers == "pairs":
        return record(id, stated, asked)
    prompts, answers = list(asked[::2]), list(asked[1::2])
    prompts[0] = stated + prompts[0]
    return record(id, prompts, answers)


def tokenizer_beside(path: Path) -> Path:
    """Where the tokenizer of a file of documents is written."""
    return path.with_name(_TOKENIZER)


def tokenizer_json() -> bytes:
    """A tokenizer.json with a token for each symbol, and BOS and EOS: BPE without merges."""
    tokens = [*_SPECIAL, *_WHITE_SPACE, *SYMBOLS]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    plain = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": token, "special": True, **flags}
            for id, token in enumerate(_SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": [],
        },
    }
    return json.dumps(plain, ensure_ascii=False).encode()
