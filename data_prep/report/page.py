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
from data_prep.pages.bars import Bar, bars
from data_prep.pages.rendering import render, scaled, share, short
from data_prep.report import charts, statistics
from data_prep.report.statistics import Stats

# A person reads the page: of more rows than these the largest are shown.
_ROWS = 20
_INPUTS = 200
_SAMPLES = 4


def write(directory: Path, output: Path) -> None:
    """Write the page of the data set, and make the directory of `output` if need be.

    Raises DataError where the data set is damaged.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    durable.write_bytes(output, page(directory).encode(errors="replace"))


def page(directory: Path) -> str:
    """The page of the data set; reads every shard. Raises DataError where one is damaged."""
    stats, recorded = statistics.stats(directory, words=True), accounts.load(directory)
    manifest = stats.manifest
    seconds = (directory / shards.MANIFEST).stat().st_mtime
    values = {
        "title": directory.resolve().name,
        "finished": datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "stats": stats.plain(),
        "manifest": manifest,
        "configuration": yaml.safe_dump(
            manifest.configuration, sort_keys=False, allow_unicode=True
        ),
        "records": {kind: recorded.total(kind) for kind in ("read", "accepted")},
        "files": {"manifest": shards.MANIFEST, "accounts": ACCOUNTS},
        "inputs": [
            (f.path, f.sha256[:16] or "not read to its end", f.bytes)
            for f in manifest.inputs[:_INPUTS]
        ],
        "sources": _sources(stats),
        "lengths": charts.lengths(stats.lengths),
        "longest": [(id, source, tokens) for tokens, id, source in stats.longest],
        "outcomes": _outcomes(recorded),
        "duplicates": _duplicates(recorded),
        "left_out": [
            *_left_out("dropped", _dropped(recorded), recorded.samples),
            *_left_out("rejected", stats.rejected_by_reason, accounts.rejects(directory)),
        ],
        "rates": _rates(stats),
        "sampled": sum(source.word_tokens for source in stats.sources.values()),
    }
    return render("data_prep.report", "data_set.html", values)


def _largest(sizes: Mapping[str, int]) -> dict[str, int]:
    """As many as a chart shows, the largest first."""
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:_ROWS])


def _counted(counts: Mapping[str, int], number: Callable[[int], str]) -> list[Bar]:
    """Bars of the largest counts, each with its share of all."""
    whole = sum(counts.values())
    return bars(_largest(counts), lambda n: f"{number(n)} \u00b7 {share(n, whole)}")


def _sources(stats: Stats) -> dict[str, Any]:
    rows = [
        (
            *(name, len(source.lengths), source.tokens),
            *(share(source.tokens, stats.manifest.tokens), scaled(source.bytes, "B")),
            int(np.median(source.lengths)),
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
    rows = [
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
        "bars": rows,
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
    rows = []
    for name, total in _largest(totals).items():
        read, (_, _, exact, near, _) = found.sources[name].read, _parts(found.sources[name])
        value = f"{exact:,} exact \u00b7 {near:,} near \u00b7 {share(total, read)}"
        rows.append(Bar(name, value, [exact / read, near / read]))
    return {"bars": rows, "of": len(totals)}


class _LeftOut(NamedTuple):
    """Records that are not in the data set for one reason; `how`: dropped or rejected."""

    reason: str
    records: int
    how: str
    samples: Sequence[Sample]


def _dropped(found: Accounts) -> Counter[str]:
    """Dropped documents by reason; duplicates too."""
    counts = _by_reason(account.dropped for account in found.sources.values())
    for kind, count in _by_reason(a.duplicates for a in found.sources.values()).items():
        counts[f"{kind} duplicate"] += count
    return counts


def _left_out(how: str, counts: Mapping[str, int], samples: Iterable[Sample]) -> list[_LeftOut]:
    """By reason, the commonest first. Raises DataError where the list of rejects is damaged."""
    kept: dict[str, list[Sample]] = {reason: [] for reason in counts}
    for sample in samples:
        own = kept.setdefault(sample.reason, [])
        if len(own) < _SAMPLES:
            own.append(sample)
    found = [_LeftOut(reason, counts.get(reason, 0), how, own) for reason, own in kept.items()]
    return sorted(found, key=lambda one: (-one.records, one.reason))


def _rates(stats: Stats) -> dict[str, list[Bar]]:
    """How the tokenizer does on the largest sources."""
    own = {name: stats.sources[name] for name in _largest(_tokens(stats))}
    ratio, percent = "{:.3f}".format, "{:.3%}".format
    return {
        "bytes": bars({name: s.bytes / s.tokens for name, s in own.items()}, ratio),
        "words": bars({name: s.word_tokens / max(s.words, 1) for name, s in own.items()}, ratio),
        "fallback": bars({name: s.byte_tokens / s.tokens for name, s in own.items()}, percent),
    }
