"""A finished data set as one HTML page: no script, no request, every text of the data escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from data_prep import accounts
from data_prep.accounts import ACCOUNTS, Account, Accounts, Sample
from data_prep.dataset import durable, shards
from data_prep.report import charts, statistics
from data_prep.report.charts import Bar
from data_prep.report.rendering import render, scaled, share, short
from data_prep.report.statistics import Count, Stats

PAGE = "report.html"
# A page of a data set with more is still read by a person.
_ROWS = 20
_INPUTS = 200
_SAMPLES = 4


def write(directory: Path, output: Path) -> None:
    """Write the page of the data set. Raises DataError where the data set is damaged."""
    durable.write_bytes(output, page(directory).encode(errors="replace"))


def page(directory: Path) -> str:
    """The page of the data set; reads every shard. Raises DataError where one is damaged."""
    found = statistics.count(directory, words=True)
    stats, cleaned = statistics.summary(directory, found), accounts.load(directory)
    recorded = cleaned or _uncleaned(directory, found)
    seconds = (directory / shards.MANIFEST).stat().st_mtime
    values = {
        "title": directory.resolve().name,
        "finished": datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "stats": stats,
        "manifest": found.manifest,
        "configuration": yaml.safe_dump(
            found.manifest.configuration, sort_keys=False, allow_unicode=True
        ),
        "cleaned": cleaned is not None,
        "records": {kind: recorded.total(kind) for kind in ("read", "accepted")},
        "files": {"manifest": shards.MANIFEST, "accounts": ACCOUNTS},
        "inputs": [(f.path, f.sha256[:16], f.bytes) for f in found.manifest.inputs[:_INPUTS]],
        "sources": _sources(stats, found),
        "lengths": charts.lengths(found.lengths),
        "longest": [(id, source, tokens) for tokens, id, source in found.longest],
        "outcomes": _outcomes(recorded),
        "duplicates": _duplicates(recorded),
        "left_out": [*_dropped(recorded), *_rejected(directory)],
        "rates": _rates(stats, found),
        "sampled": sum(source.word_tokens for source in found.sources.values()),
    }
    return render("data_set.html", values)


def _uncleaned(directory: Path, found: Count) -> Accounts:
    configured = found.manifest.configuration.get("sources", [])
    documents = {source["name"]: 0 for source in configured}
    documents |= {name: len(source.lengths) for name, source in found.sources.items()}
    return accounts.of_rejects(directory, documents)


def _largest(sizes: Mapping[str, int]) -> dict[str, int]:
    """As many as a chart shows, the largest first."""
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:_ROWS])


def _counted(counts: Mapping[str, int], number: Callable[[int], str]) -> list[Bar]:
    """Bars of the largest counts, each with its share of all."""
    whole = sum(counts.values())
    return charts.bars(_largest(counts), lambda n: f"{number(n)} \u00b7 {share(n, whole)}")


def _sources(stats: Stats, found: Count) -> dict[str, Any]:
    rows = [
        (
            *(name, source.documents, source.tokens, share(source.tokens, stats.tokens)),
            *(scaled(source.bytes, "B"), int(np.median(found.sources[name].lengths))),
        )
        for name, source in sorted(stats.sources.items(), key=lambda item: -item[1].tokens)
    ]
    return {"bars": _counted(_tokens(stats), short), "rows": rows}


def _tokens(stats: Stats) -> dict[str, int]:
    return {name: source.tokens for name, source in stats.sources.items()}


def _parts(account: Account) -> list[int]:
    """Records accepted, dropped, exact and near duplicates, rejected: all that were read."""
    duplicates = [account.duplicates[kind] for kind in ("exact", "near")]
    return [account.accepted, account.dropped.total(), *duplicates, account.rejected]


def _outcomes(found: Accounts) -> dict[str, Any]:
    """What became of the records, by source."""
    sources = dict(sorted(found.sources.items()))
    read = {name: account.read for name, account in sources.items() if account.read}
    bars = [
        Bar(
            name,
            f"{short(count)} read \u00b7 {share(sources[name].accepted, count)} accepted",
            [part / count for part in _parts(sources[name])],
        )
        for name, count in _largest(read).items()
    ]
    changed = [
        (step, name, count, share(count, account.read))
        for name, account in sources.items()
        for step, count in account.changed.items()
        if count
    ]
    return {
        "bars": bars,
        "of": len(read),
        "dropped": _counted(_by_reason(a.dropped for a in sources.values()), "{:,}".format),
        "rows": [
            (name, account.read, *_parts(account), share(account.accepted, account.read))
            for name, account in sources.items()
        ],
        "changed": sorted(changed),
    }


def _by_reason(counts: Iterable[Counter[str]]) -> Counter[str]:
    return sum(counts, Counter())


def _duplicates(found: Accounts) -> dict[str, Any]:
    """Duplicates by source, as shares of the records read."""
    totals = {name: account.duplicates.total() for name, account in found.sources.items()}
    totals = {name: count for name, count in totals.items() if count}
    bars = []
    for name, total in _largest(totals).items():
        read, (_, _, exact, near, _) = found.sources[name].read, _parts(found.sources[name])
        value = f"{exact:,} exact \u00b7 {near:,} near \u00b7 {share(total, read)}"
        bars.append(Bar(name, value, [exact / read, near / read]))
    return {"bars": bars, "of": len(totals)}


class _LeftOut(NamedTuple):
    """Records that are not in the data set for one reason; `how`: dropped or rejected."""

    reason: str
    records: int
    how: str
    samples: Sequence[Sample]


def _dropped(found: Accounts) -> list[_LeftOut]:
    """By reason, the commonest first; duplicates too."""
    counts = _by_reason(account.dropped for account in found.sources.values())
    for kind, count in _by_reason(a.duplicates for a in found.sources.values()).items():
        counts[f"{kind} duplicate"] += count
    samples: dict[str, list[Sample]] = {reason: [] for reason in counts}
    for sample in found.samples:
        samples.setdefault(sample.reason, []).append(sample)
    return _grouped("dropped", counts, samples)


def _rejected(directory: Path) -> list[_LeftOut]:
    """By reason, the commonest first. Raises DataError where the list of them is damaged."""
    counts: Counter[str] = Counter()
    samples: dict[str, list[Sample]] = {}
    for sample in accounts.rejects(directory):
        counts[sample.reason] += 1
        if counts[sample.reason] <= _SAMPLES:
            samples.setdefault(sample.reason, []).append(sample)
    return _grouped("rejected", counts, samples)


def _grouped(
    how: str, counts: Mapping[str, int], samples: Mapping[str, list[Sample]]
) -> list[_LeftOut]:
    reasons = sorted(samples, key=lambda reason: (-counts.get(reason, 0), reason))
    return [
        _LeftOut(reason, counts.get(reason, 0), how, samples[reason][:_SAMPLES])
        for reason in reasons
    ]


def _rates(stats: Stats, found: Count) -> dict[str, list[Bar]]:
    """How the tokenizer does on the largest sources."""
    names = list(_largest(_tokens(stats)))
    words = {name: found.sources[name] for name in names}
    return {
        "bytes": charts.bars(
            {name: stats.sources[name].bytes_per_token for name in names}, "{:.3f}".format
        ),
        "words": charts.bars(
            {name: source.word_tokens / max(source.words, 1) for name, source in words.items()},
            "{:.3f}".format,
        ),
        "fallback": charts.bars(
            {name: stats.sources[name].byte_fallback for name in names}, "{:.3%}".format
        ),
    }
