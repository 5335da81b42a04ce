"""Words and n-grams for comparing texts with one another, without case, punctuation, diacritics."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
import regex
import xxhash
from datatrove.utils.text import PUNCTUATION

# Of scripts without spaces between words each character is a word, whatever is next to it; the
# last four are letters of Japanese that Unicode counts to no script.
_SPACELESS = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\u30fc\uff70\uff9e\uff9f]"
)
# Of other symbols a run is a word: a word of Braille, a formula's sign, a line of a table.
_SYMBOLS = regex.compile(r"[^\x00-\x7f\p{L}\p{M}\p{N}]+")
# Soft hyphens, joiners, marks of direction: nobody sees them, and a word goes on behind them. Not
# so the space and the non-joiner of no width, in place of which others write a space.
_INSIDE_WORDS = regex.compile(r"(?V1)[[\p{Default_Ignorable_Code_Point}&&\p{Cf}]--[\u200b\u200c]]")
# They stand for what is missing.
_REPLACEMENTS = "\ufffc\ufffd"
_FOREIGN = re.compile(r"[^\x00-\x7f]")
_FEW = 30
# Characters that are simplified at a time, and where a text may be cut for that.
_SIMPLIFIED = 1 << 20
_BREAK = regex.compile(r"\s")


class _Simple(dict[int, str | None]):
    """What becomes of each character in words; filled by the characters that are met."""

    def __missing__(self, code: int) -> str | None:
        character = chr(code)
        found: str | None = character
        category = unicodedata.category(character)
        if category == "Mn" or _INSIDE_WORDS.match(character):
            found = None
        elif character in PUNCTUATION or _is_between_words(character, category):
            found = " "
        elif _SPACELESS.match(character):
            found = f" {character} "
        self[code] = found
        return found


def _is_between_words(character: str, category: str) -> bool:
    """Whether it is punctuation, white space, invisible or half a character."""
    return category[0] in "PZ" or category in ("Cc", "Cf", "Cs") or character in _REPLACEMENTS


_SIMPLE = _Simple()


class _Alone(dict[str, str | None]):
    """What becomes of each character, whatever its neighbours are; None where that matters."""

    def __missing__(self, character: str) -> str | None:
        simple = unicodedata.normalize("NFD", character.lower()).translate(_SIMPLE)
        # A sigma is another one at the end of a word; marks of several kinds are put in order.
        matters = character == "\u03a3" or any(map(unicodedata.combining, simple))
        self[character] = None if matters else simple
        return self[character]


_ALONE = _Alone()
# What becomes of each byte of UTF-8 where the characters outside of ASCII are simple already.
_SIMPLE_ASCII = bytes(range(128)).decode().lower().translate(_SIMPLE).encode() + bytes(
    range(128, 256)
)


def words(text: str) -> list[str]:
    """Words for comparing texts: those of datatrove's `simplify_text`, but numbers count.

    Letters and numbers, symbols, and each character of a script without spaces are words of their
    own also where they touch.
    """
    plain = _with_simple_few(text)
    if plain is None:
        simple = unicodedata.normalize("NFD", text.lower()).translate(_SIMPLE)
    else:
        simple = plain.encode().translate(_SIMPLE_ASCII).decode()
    if not simple.isascii():
        simple = _SYMBOLS.sub(r" \g<0> ", simple)
    return simple.split()


def _with_simple_few(text: str) -> str | None:
    """The text with all characters outside of ASCII simplified; None if they are not few."""
    # The others then take a fraction of the time.
    if text.isascii():
        return text
    few = set(_FOREIGN.findall(text))
    if len(few) > _FEW or None in map(_ALONE.__getitem__, few):
        return None
    for character in few:
        text = text.replace(character, _ALONE[character] or "")
    return text


class NGrams:
    """The n-grams of `size` words of a document that comes in passages."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._open: list[str] = []

    def __call__(self, passage: str) -> Iterator[np.ndarray]:
        """Hashes (uint64) of the n-grams that end in this passage, in bounded memory."""
        start = 0
        while start < len(passage):
            space = _BREAK.search(passage, start + _SIMPLIFIED)
            stop = space.end() if space else len(passage)
            found = self._open + words(passage[start:stop])
            ends = max(len(found) - self._size + 1, 0)
            if ends:
                yield _hashes(found, self._size)
            self._open = found[ends:]
            start = stop


def hashes_of_record(texts: Sequence[str], size: int) -> Iterator[np.ndarray]:
    """Hashes of the n-grams of a record's texts, and of those that reach from one into the next.

    The latter are datatrove's "overlap n-grams" of a question and its answer.
    """
    for text in texts:
        yield from NGrams(size)(text)
    for one, other in itertools.pairwise(map(words, texts)):
        found = one[max(len(one) - size + 1, 0) :] + other[: size - 1]
        if len(found) >= size:
            yield _hashes(found, size)


def _hashes(found: list[str], size: int) -> np.ndarray:
    """xxHash64 of each n-gram's UTF-8, its words joined by spaces: uint64 [words - size + 1]."""
    grams = map(" ".join, zip(*(found[n:] for n in range(size)), strict=False))
    return np.fromiter(map(xxhash.xxh64_intdigest, grams), np.uint64, len(found) - size + 1)
