"""Words and n-grams for comparing texts with one another, without case, punctuation, diacritics."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

import numpy as np
import regex
import xxhash
from datatrove.utils.text import PUNCTUATION

# Scripts without spaces between words are split into characters where a word begins with them.
_SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_HAS_SPACELESS = regex.compile(_SPACELESS)
_WORD = regex.compile(_SPACELESS + r"|\S+")
_IN_WORDS = regex.compile(r"[\p{L}\p{M}\p{N}]")
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
        if unicodedata.category(character) == "Mn":
            found = None
        elif character in PUNCTUATION:
            found = " "
        elif not _IN_WORDS.match(character):
            found = f" {character} " if _HAS_SPACELESS.match(character) else " "
        self[code] = found
        return found


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


def words(text: str) -> list[str]:
    """Words for comparing texts: those of datatrove's `simplify_text`, but numbers count."""
    if not text.isascii():
        text = _without_few(text)
    simple = unicodedata.normalize("NFD", text.lower()).translate(_SIMPLE)
    if simple.isascii() or not _HAS_SPACELESS.search(simple):
        return simple.split()
    found: list[str] = _WORD.findall(simple)
    return found


def _without_few(text: str) -> str:
    """The text with characters outside of ASCII simplified first, if they are few."""
    # What follows takes a fraction of the time for ASCII alone.
    few = set(_FOREIGN.findall(text))
    if len(few) > _FEW or None in map(_ALONE.__getitem__, few):
        return text
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


def _hashes(found: list[str], size: int) -> np.ndarray:
    """xxHash64 of each n-gram's UTF-8, its words joined by spaces: uint64 [words - size + 1]."""
    grams = map(" ".join, zip(*(found[n:] for n in range(size)), strict=False))
    return np.fromiter(map(xxhash.xxh64_intdigest, grams), np.uint64, len(found) - size + 1)
