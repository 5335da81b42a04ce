"""A finished data set as one HTML page: no script, no request, every text of the data escaped."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import numpy as np
import yaml
from matplotlib.ticker import EngFormatter

from data_prep.accounts import ACCOUNTS, Account
from data_prep.dataset import durable, shards
from data_prep.dataset.shards import Manifest
from data_prep.report import charts, statistics
from data_prep.report.statistics import Cleaning, Count, Sample, Stats

PAGE = "report.html"
# A page of a data set with more is still read by a person.
_ROWS = 20
_INPUTS = 200
_SAMPLES = 4
# What became of a record, and its colour.
_FATES = {
    "accepted": "c3",
    "dropped": "c2",
    "exact duplicate": "c4",
    "near duplicate": "c5",
    "rejected": "ink",
}
_bytes: Callable[[float], str] = EngFormatter(unit="B", places=1)
_thousands: Callable[[float], str] = EngFormatter(places=1, sep="")


def write(directory: Path, output: Path) -> None:
    """Write the page of the data set. Raises DataError where the data set is damaged."""
    durable.write_bytes(output, page(directory).encode(errors="replace"))


def page(directory: Path) -> str:
    """The page of the data set; reads every shard. Raises DataError where one is damaged."""
    found = statistics.count(directory, words=True)
    stats, clean = statistics.summary(directory, found), statistics.cleaning(directory, found)
    sections = {
        "Sources": _sources(stats, found),
        "Document lengths": _lengths(stats, found),
        "Records read": _records(clean, found),
        "Duplicates": _duplicates(clean),
        "Left out": _left_out(directory, clean),
        "Tokenizer": _tokenizer(stats, found),
        "How it was made": _made(found.manifest),
    }
    title = html.escape(charts.plain(directory.resolve().name))
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in sections)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{name}</h2>{content}</section>'
        for name, content in sections.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{_CSS}</style></head><body>'
        f"<header><h1><bdi>{title}</bdi></h1>{_header(directory, stats, found, clean)}"
        f"<nav>{links}</nav></header><main>{body}</main>"
        "<footer>Written by <code>data-prep report</code>; counted from the shards, each of which "
        "was checked against the manifest.</footer></body></html>\n"
    )


def _text(value: str) -> str:
    """A text of the data set, which may be hostile, as HTML that shows it and nothing else."""
    return f"<bdi>{html.escape(charts.plain(value))}</bdi>"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _cell(value: str | int) -> str:
    return f"{value:,}" if isinstance(value, int) else _text(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str | int]]) -> str:
    """A table; the columns whose head begins with `>` hold figures."""
    kinds = [' class="n"' if title.startswith(">") else "" for title in head]
    pairs = zip(kinds, head, strict=True)
    titles = "".join(f"<th{kind}>{_text(title.lstrip('>'))}</th>" for kind, title in pairs)
    lines = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{_cell(v)}</td>" for kind, v in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _tiles(values: Mapping[str, str]) -> str:
    tiles = (f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _figure(title: str, drawn: str, note: str = "") -> str:
    more = f'<p class="note">{note}</p>' if note else ""
    return f"<figure><figcaption>{title}</figcaption>{drawn}{more}</figure>"


def _grid(*figures: str) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def _legend(colours: Mapping[str, str]) -> str:
    items = (f'<li><i style="background:var(--{c})"></i>{name}</li>' for name, c in colours.items())
    return f'<ul class="legend">{"".join(items)}</ul>'


def _largest(sources: Mapping[str, int]) -> tuple[list[str], str]:
    """The sources with the most of something, and a note where some are left out."""
    names = sorted(sources, key=lambda name: (-sources[name], name))
    note = f"The {_ROWS} largest of {len(names)} sources." if len(names) > _ROWS else ""
    return names[:_ROWS], note


def _short(count: int) -> str:
    return f"{count:,}" if count < 10_000 else _thousands(count)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "\u2013"


def _header(directory: Path, stats: Stats, found: Count, clean: Cleaning) -> str:
    seconds = (directory / shards.MANIFEST).stat().st_mtime
    when = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    read = sum(fate.read for fate in clean.sources.values())
    disk = sum(info.bytes for info in found.manifest.shards)
    given = found.manifest.configuration.get("tokenizer", {}).get("path")
    origin = f"taken from {_text(given)}" if given else "trained on its own texts"
    made = (
        f"A data set of {len(stats.sources):,} source{'s' * (len(stats.sources) != 1)}, "
        f"finished {when}. Its tokenizer of {stats.vocab_size:,} pieces was {origin}."
    )
    return f"<p>{made}</p>" + _tiles(
        {
            "documents": f"{stats.documents:,}",
            "tokens": f"{stats.tokens:,}",
            "bytes of text": _bytes(stats.bytes),
            "bytes a token": f"{stats.bytes_per_token:.3f}",
            "records read": f"{read:,}",
            "shards": f"{stats.shards:,}",
            "on disk": _bytes(disk),
        }
    )


def _sources(stats: Stats, found: Count) -> str:
    names, note = _largest({name: source.tokens for name, source in stats.sources.items()})
    tokens = {name: stats.sources[name].tokens for name in names}
    told = [f"{_short(n)} \u00b7 {_share(n, stats.tokens)}" for n in tokens.values()]
    rows = [
        (
            *(name, source.documents, source.tokens, _share(source.tokens, stats.tokens)),
            *(_bytes(source.bytes), int(np.median(found.sources[name].lengths))),
        )
        for name, source in sorted(stats.sources.items(), key=lambda item: -item[1].tokens)
    ]
    head = ("Source", ">Documents", ">Tokens", ">Share", ">Text", ">Median document")
    drawn = charts.bars("Tokens by source", tokens, told)
    return _grid(_figure("Tokens by source", drawn, note)) + _table(head, rows)


def _lengths(stats: Stats, found: Count) -> str:
    names = {"0": "shortest", "50": "median", "100": "longest"}
    marks = {
        names.get(percent, f"{percent}% are at most"): f"{length:,}"
        for percent, length in stats.length_percentiles.items()
    }
    legend = _legend({"documents": "c1", "tokens": "c2"})
    drawn = legend + charts.lengths(found.lengths)
    longest = _table(
        ("Id", "Source", ">Tokens"), [(id, source, tokens) for tokens, id, source in found.longest]
    )
    return _tiles(marks) + _grid(
        _figure(
            "Share by length",
            drawn,
            "Of all documents, and of all tokens, the share in documents of this length.",
        ),
        _figure(f"The {len(found.longest)} longest documents", longest),
    )


def _parts(fate: Account) -> list[int]:
    """Records by what became of them, in the order of _FATES."""
    duplicates = [fate.duplicates.get(kind, 0) for kind in ("exact", "near")]
    return [fate.accepted, fate.dropped.total(), *duplicates, fate.rejected]


def _records(clean: Cleaning, found: Count) -> str:
    fates = {name: fate for name, fate in clean.sources.items() if fate.read}
    names, note = _largest({name: fate.read for name, fate in fates.items()})
    shares = {name: [n / fates[name].read for n in _parts(fates[name])] for name in names}
    told = [
        f"{_short(fates[n].read)} read \u00b7 {_share(fates[n].accepted, fates[n].read)} accepted"
        for n in names
    ]
    drawn = charts.stacked("Records by what became of them", shares, told, list(_FATES.values()))
    figures = [_figure("What became of them", _legend(_FATES) + drawn, note)]
    reasons: Counter[str] = Counter()
    for fate in fates.values():
        reasons.update(fate.dropped)
    if reasons:
        drawn = _counted("Dropped by reason", reasons, sum(reasons.values()), "c2")
        figures.append(_figure("Dropped, by reason", drawn))
    head = ("Source", ">Read", *(f">{name.capitalize()}" for name in _FATES), ">Accepted share")
    rows: list[Sequence[str | int]] = [
        (name, fate.read, *_parts(fate), _share(fate.accepted, fate.read))
        for name, fate in clean.sources.items()
    ]
    return _cleaned(clean, found) + _grid(*figures) + _table(head, rows) + _changed(clean)


def _cleaned(clean: Cleaning, found: Count) -> str:
    if not clean.cleaned:
        return (
            f"<p>There was no cleaning: the data set has no <code>{ACCOUNTS}</code>. Every "
            "record that could be read is a document.</p>"
        )
    accepted = sum(fate.accepted for fate in clean.sources.values())
    if accepted == found.manifest.documents:
        return ""
    return (
        f"<p>{accepted:,} records were accepted; the shards hold {found.manifest.documents:,} "
        "documents.</p>"
    )


def _counted(title: str, counts: Mapping[str, int], whole: int, colour: str) -> str:
    names, _ = _largest(counts)
    told = [f"{counts[name]:,} \u00b7 {_share(counts[name], whole)}" for name in names]
    return charts.bars(title, {name: counts[name] for name in names}, told, colour)


def _changed(clean: Cleaning) -> str:
    rows = [
        (step, name, count, _share(count, fate.read))
        for name, fate in clean.sources.items()
        for step, count in sorted(fate.changed.items())
        if count
    ]
    if not rows:
        return ""
    head = ("Step", "Source", ">Documents changed", ">Of those read")
    return "<h3>Repaired or masked</h3>" + _table(head, sorted(rows))


def _duplicates(clean: Cleaning) -> str:
    if not clean.cleaned:
        return "<p>There was no cleaning, so duplicates were not looked for.</p>"
    kinds = {"exact": "c4", "near": "c5"}
    found = {name: fate for name, fate in clean.sources.items() if fate.duplicates.total()}
    if not found:
        return "<p>None was removed.</p>"
    names, note = _largest({n: fate.duplicates.total() for n, fate in found.items()})
    shares, told = {}, []
    for name in names:
        counts, read = [found[name].duplicates.get(kind, 0) for kind in kinds], found[name].read
        shares[name] = [count / read for count in counts]
        told.append(
            f"{counts[0]:,} exact \u00b7 {counts[1]:,} near \u00b7 {_share(sum(counts), read)}"
        )
    drawn = charts.stacked("Duplicates by source", shares, told, list(kinds.values()))
    note = f"The width is every record read. {note}"
    return _grid(_figure("Removed, by source", _legend(kinds) + drawn, note))


def _left_out(directory: Path, clean: Cleaning) -> str:
    """Samples of what is not in the data set, by reason."""
    counts: Counter[str] = Counter()
    for fate in clean.sources.values():
        counts.update(fate.dropped)
        counts.update({f"{kind} duplicate": n for kind, n in fate.duplicates.items() if n})
    content = _by_reason("dropped", counts, clean.samples, _dropped)
    counts.clear()
    samples: dict[str, list[Sample]] = {}
    for sample in statistics.rejects(directory, clean.sources):
        counts[sample.reason] += 1
        kept = samples.setdefault(sample.reason, [])
        if len(kept) < _SAMPLES:
            kept.append(sample)
    content += _by_reason(
        "rejected", counts, [s for kept in samples.values() for s in kept], _place
    )
    return content or "<p>Nothing: every record is a document.</p>"


def _by_reason(
    fate: str, counts: Mapping[str, int], samples: list[Sample], show: Callable[[Sample], str]
) -> str:
    grouped = {
        reason: list(group)
        for reason, group in groupby(sorted(samples, key=lambda s: s.reason), lambda s: s.reason)
    }
    names = sorted(counts.keys() | grouped.keys(), key=lambda name: (-counts.get(name, 0), name))
    parts = []
    for name in names:
        shown = "".join(show(sample) for sample in grouped.get(name, [])[:_SAMPLES])
        parts.append(
            f"<details><summary><b>{_text(name)}</b><span>{counts.get(name, 0):,} {fate}</span>"
            f"</summary>{shown or '<p>No sample was kept.</p>'}</details>"
        )
    return "".join(parts)


def _dropped(sample: Sample) -> str:
    place = f"{_text(sample.id)} \u00b7 {_text(f'{sample.file}:{sample.line}')}"
    return f'<p class="place">{place}</p><pre>{_text(sample.text)}</pre>'


def _place(sample: Sample) -> str:
    detail = f" \u00b7 {_text(sample.text)}" if sample.text else ""
    return f'<p class="place">{_text(f"{sample.file}:{sample.line}")}{detail}</p>'


def _tokenizer(stats: Stats, found: Count) -> str:
    names, note = _largest({name: source.tokens for name, source in stats.sources.items()})
    sources = {name: found.sources[name] for name in names}
    sampled = sum(source.word_tokens for source in found.sources.values())
    rates = {name: stats.sources[name].bytes_per_token for name in names}
    words = {name: source.word_tokens / max(source.words, 1) for name, source in sources.items()}
    fallback = {name: stats.sources[name].byte_fallback for name in names}
    return _grid(
        _rates("Bytes a token", rates, "{:.3f}", "c1", note),
        _rates(
            *("Tokens a word", words, "{:.3f}", "c4"),
            f"Words stand between white space. Counted in a sample of {sampled:,} tokens: of the "
            "first documents in the shards' order, which is random, up to a bound a source.",
        ),
        _rates(
            *("Byte fallback", fallback, "{:.3%}", "c2"),
            "Share of tokens that spell one byte of a character that has no piece.",
        ),
    )


def _rates(title: str, rows: Mapping[str, float], form: str, colour: str, note: str) -> str:
    drawn = charts.bars(title, rows, [form.format(rate) for rate in rows.values()], colour)
    return _figure(f"{title}, by source", drawn, note)


def _made(manifest: Manifest) -> str:
    tokenizer, sizes = manifest.tokenizer, [info.tokens for info in manifest.shards]
    facts = [
        ("Tokenizer", f"{tokenizer.file}, {tokenizer.vocab_size:,} pieces"),
        ("Its sha256", tokenizer.sha256),
        ("Shards", f"{len(sizes):,} of {min(sizes):,} to {max(sizes):,} tokens, {manifest.dtype}"),
        (
            "Input",
            f"{len(manifest.inputs):,} files, {_bytes(sum(f.bytes for f in manifest.inputs))}",
        ),
    ]
    told = yaml.safe_dump(manifest.configuration, sort_keys=False, allow_unicode=True)
    files = _table(
        ("File", ">Bytes", "sha256"),
        [(file.path, file.bytes, file.sha256[:16]) for file in manifest.inputs[:_INPUTS]],
    )
    left = len(manifest.inputs) - _INPUTS
    more = f"<p>{left:,} more are in {shards.MANIFEST}.</p>" if left > 0 else ""
    return (
        _table(("Part", "Value"), facts)
        + f"<details><summary><b>Configuration</b></summary><pre>{_text(told)}</pre></details>"
        + f"<details><summary><b>Input files</b></summary>{files}{more}</details>"
    )


_CSS = """
:root{color-scheme:light dark;--ink:#1c2430;--muted:#5b6675;--bg:#f5f6f8;--card:#fff;--line:#dfe3e8;
--track:#e9ecf0;--c1:#2a6fbb;--c2:#d9822b;--c3:#2b9a66;--c4:#8a5cc2;--c5:#c9527f}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--muted:#9aa5b4;--bg:#12161c;--card:#1a2029;
--line:#2b3440;--track:#2b3440;--c1:#5b9fe6;--c2:#eba04f;--c3:#4fbf8a;--c4:#ad86e0;--c5:#e67fa5}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:2rem 1.25rem;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
h1{margin:0;font-size:1.9rem;line-height:1.2;overflow-wrap:anywhere}
h2{margin:0 0 .9rem;font-size:1.2rem}h3{margin:1.4rem 0 .5rem;font-size:1rem}
p{margin:.5rem 0}header p{color:var(--muted);overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:.4rem;margin:1.2rem 0 0}
nav a{padding:.2rem .7rem;border:1px solid var(--line);border-radius:1rem;color:inherit;
background:var(--card);text-decoration:none;font-size:.85rem}
section{margin:1.1rem 0;padding:1.3rem 1.4rem;background:var(--card);border:1px solid var(--line);
border-radius:10px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(7.6rem,1fr));gap:.6rem;
margin:.9rem 0}
.tiles div{padding:.55rem .8rem;background:var(--card);border:1px solid var(--line);
border-radius:8px}
dt{color:var(--muted);font-size:.78rem}dd{margin:0;font-size:1.12rem;font-weight:600;
font-variant-numeric:tabular-nums;white-space:nowrap}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));
gap:1.2rem 2.2rem;margin:.4rem 0 1rem}
figure{margin:0;min-width:0;max-width:560px;break-inside:avoid}
figcaption{margin-bottom:.35rem;font-weight:600}
svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round}svg text{font-family:inherit!important}
.note{color:var(--muted);font-size:.82rem}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:0 0 .35rem;padding:0;list-style:none;
color:var(--muted);font-size:.82rem}
.legend i{display:inline-block;width:.7rem;height:.7rem;margin-right:.35rem;border-radius:2px}
.scroll{overflow-x:auto}figure .scroll{max-height:22rem;overflow-y:auto}
table{width:100%;border-collapse:collapse;font-size:.88rem}
th,td{padding:.32rem .8rem .32rem 0;border-bottom:1px solid var(--line);text-align:left;
vertical-align:top}
th{color:var(--muted);font-weight:500;white-space:nowrap}td{overflow-wrap:anywhere;min-width:7.5rem}
.n{min-width:0;text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
details{border-top:1px solid var(--line);padding:.5rem 0}
summary{cursor:pointer;overflow-wrap:anywhere}
summary b{font-weight:600}summary span{margin-left:.7rem;color:var(--muted);font-size:.88rem}
pre{margin:.3rem 0 .8rem;padding:.7rem .9rem;background:var(--bg);border-radius:6px;
font:.82rem/1.45 ui-monospace,Menlo,Consolas,"Liberation Mono",monospace;white-space:pre-wrap;
overflow-wrap:anywhere}
.place{color:var(--muted);font-size:.82rem;overflow-wrap:anywhere}
footer{margin:1.4rem 0 0;color:var(--muted);font-size:.82rem}
@media (max-width:640px){body{padding:1rem .6rem}section{padding:1rem .9rem}
svg text{font-size:11px!important}}
@media print{:root{color-scheme:light;--ink:#1c2430;--muted:#5b6675;--bg:#fff;--card:#fff;
--line:#dfe3e8;--track:#e9ecf0;--c1:#2a6fbb;--c2:#d9822b;--c3:#2b9a66;--c4:#8a5cc2;--c5:#c9527f}
body{max-width:none;padding:0;font-size:12px;print-color-adjust:exact;
-webkit-print-color-adjust:exact}
nav{display:none}section{border:0;padding:.4rem 0}tr,.tiles{break-inside:avoid}
h2,summary{break-after:avoid}.scroll,figure .scroll{overflow:visible;max-height:none}
details::details-content{content-visibility:visible;display:block}}
"""
