"""Charts and a table of what evaluations wrote into the runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.dataset.command import TOKENS
from data_prep.pages.curves import Chart, Curve, Scale, drawn, number
from pretrain.report.figures import MOST_RUNS, Figure, Style, styles
from pretrain.report.runs import Result, Run

_COLUMNS = {
    "memory": ("with memory", ""),
    "masked": ("memory read masked", "6 4"),
    "none": ("model without memory", "2 4"),
}
"""Of pretrain.evaluate.perplexity, which a report does not import: it loads torch."""
_DASH = "\N{EN DASH}"
_METRICS = 6  # of lm-evaluation-harness that the table shows


def figures(runs: Sequence[Run], shown: Sequence[Style]) -> list[Figure]:
    """Recall by distance, and bits per byte by position: of each run its newest step's results."""
    names = dict.fromkeys(result.name for run in runs for result in run.results)
    found = []
    for name in names:
        newest = [_newest(run, name) for run in runs]
        own = [pair for pair in zip(newest, shown, strict=True) if pair[0]]
        found += [*_recall(name, own, len(runs)), *_positions(own, len(runs))]
    return found


def table(runs: Sequence[Run], shown: Sequence[Style]) -> list[tuple[str, str, int, str]]:
    """(run, file, step, what was found) of every result."""
    return [
        (style.name, result.file, result.step, _found(result.report))
        for run, style in zip(runs, shown, strict=True)
        for result in run.results
    ]


def _newest(run: Run, name: str) -> list[Result]:
    """The results of this name of the highest step that has any."""
    own = [result for result in run.results if result.name == name]
    return [result for result in own if result.step == own[-1].step]


def _recall(name: str, newest: Sequence[tuple[list[Result], Style]], runs: int) -> Iterator[Figure]:
    """The share of answers' tokens that are right, by length of the prompt; mean over depths."""
    curves: list[Curve] = []
    for results, style in newest:
        of_tasks = {
            f"{task}{_which(results, result)}": points
            for result in results
            for task, points in _by_length(result.report).items()
        }
        curves += _told_apart(of_tasks, style, runs)
    lengths = sorted({length for curve in curves for length in curve.x})
    if lengths:
        chart = _on_lengths(curves, lengths, from_zero=True)
        note = "Share of the answers' tokens that are right, mean over the depths."
        yield Figure(f"Recall by distance: {name}", chart, note, "tokens of the prompt")


def _by_length(report: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Lengths and accuracies of each task."""
    cells: dict[str, dict[int, list[float]]] = {}
    for row in _rows(report, "rows"):
        length, share = row.get("length"), row.get("token_accuracy")
        if isinstance(length, int) and length > 0 and isinstance(share, int | float):
            of_task = cells.setdefault(str(row.get("task") or "recall"), {})
            of_task.setdefault(length, []).append(float(share))
    return {
        task: (
            np.array(sorted(own), float),
            np.array([float(np.mean(own[length])) for length in sorted(own)]),
        )
        for task, own in cells.items()
    }


def _positions(newest: Sequence[tuple[list[Result], Style]], runs: int) -> Iterator[Figure]:
    """Bits per byte by position of documents, a figure per data set."""
    by_data: dict[str, list[Curve]] = {}
    for results, style in newest:
        for result, data, which, first in _by_data(results):
            rows = [r for r in _rows(result.report, "positions") if r.get("bytes")]
            rows = [r for r in rows if isinstance(r.get("end"), int) and r["end"] > 0]
            curves = by_data.setdefault(data, [])
            for column, (words, dash) in _COLUMNS.items():
                pairs = [(r["end"], _number(r.get("bits_per_byte"), column)) for r in rows]
                points = [pair for pair in pairs if pair[1] is not None]
                if not points:
                    continue
                x, y = (np.array(values, float) for values in zip(*points, strict=True))
                if runs == 1:
                    one = styles([""] * (len(curves) % MOST_RUNS + 1))[-1]
                    curves.append(Curve(f"{words}{which}", x, y, one.colour, one.dash))
                else:
                    name = f"{style.name}, {words}{which}"
                    own = dash if first else f"{dash or '9 3'} 1 3"
                    curves.append(Curve(name, x, y, style.colour, own))
    for data, curves in by_data.items():
        ends = sorted({end for curve in curves for end in curve.x})
        if ends:
            chart = _on_lengths(curves, ends)
            label = "position in the document, up to (tokens)"
            yield Figure(f"Bits per byte by position: {data}", chart, "", label)


def _on_lengths(
    curves: Sequence[Curve], lengths: Sequence[float], *, from_zero: bool = False
) -> Chart:
    """A chart whose axis is logarithmic and has at most nine of the lengths as its ticks."""
    x = Scale(lengths[0], max(lengths[-1], 2 * lengths[0]), logarithmic=True)
    ticks = lengths[:: -(-len(lengths) // 9)]
    places = x.places(np.array(ticks)).tolist()
    named = [(place, TOKENS.show(int(tick))) for place, tick in zip(places, ticks, strict=True)]
    y = Scale.around(curves, from_zero=from_zero)
    return drawn(curves, x, y)._replace(x_ticks=named)


def _told_apart(
    of_tasks: Mapping[str, tuple[np.ndarray, np.ndarray]], style: Style, runs: int
) -> list[Curve]:
    """Tasks by colour in a report on one run, else by dash within the run's colour."""
    kept = dict(list(of_tasks.items())[:MOST_RUNS])
    dashes = ("", "6 4", "2 4", "9 3 2 3")
    if runs == 1:
        own = styles(list(kept))
    elif len(kept) == 1:
        own = [style]
    else:
        own = [
            Style(f"{style.name}, {task}", style.colour, dashes[n % len(dashes)])
            for n, task in enumerate(kept)
        ]
    return [
        Curve(one.name, x, y, one.colour, one.dash)
        for one, (x, y) in zip(own, kept.values(), strict=True)
    ]


def _by_data(results: Sequence[Result]) -> Iterator[tuple[Result, str, str, bool]]:
    """Each result with its data set, what tells it from others of that set, and whether it is the
    first of them."""
    for result in results:
        data = str(result.report.get("data"))
        own = [one for one in results if str(one.report.get("data")) == data]
        yield result, data, _which(own, result), result is own[0]


def _which(results: Sequence[Result], result: Result) -> str:
    """Tells results of the same step apart."""
    return "" if len(results) == 1 else f" ({result.file})"


def _rows(report: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    rows = report.get(key)
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _number(values: Any, key: str) -> float | None:
    value = values.get(key) if isinstance(values, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _found(report: Mapping[str, Any]) -> str:
    """The main figure of a result, where it has one that we know, and the weights if averaged."""
    found = _bits(report) or _shares(report) or _rouge(report) or _of_harness(report)
    weights = report.get("weights")
    which = f" (weights {weights})" if isinstance(weights, str) else ""
    return f"{found or _DASH}{which}"


def _bits(report: Mapping[str, Any]) -> str:
    total = report.get("total")
    bits = total.get("bits_per_byte") if isinstance(total, Mapping) else None
    columns = [(words, _number(bits, column)) for column, (words, _) in _COLUMNS.items()]
    known = [f"{number(value)} {words}" for words, value in columns if value is not None]
    return f"bits per byte: {', '.join(known)}" if known else ""


def _shares(report: Mapping[str, Any]) -> str:
    """Of answers' tokens, or of the values of pairs."""
    shares = [share for _, values in _by_length(report).values() for share in values]
    if shares:
        return f"tokens right: {np.mean(shares):.1%}"
    values = [_number(row, "accuracy") for row in _rows(report, "rows")]
    right = [value for value in values if value is not None]
    return f"values right: {np.mean(right):.1%}" if right else ""


def _rouge(report: Mapping[str, Any]) -> str:
    """Of the answers to the largest share of the documents."""
    shares = [
        (share, value)
        for row in _rows(report, "rows")
        if isinstance(rouge := row.get("rouge"), Mapping)
        and (share := _number(row, "share")) is not None
        and (value := _number(rouge.get("overall"), "value")) is not None
    ]
    if not shares:
        return ""
    share, value = max(shares)
    return f"Rouge, overall: {number(value)}" + (f" at {share:.0%} read" if share < 1 else "")


def _of_harness(report: Mapping[str, Any]) -> str:
    """The metrics of the first tasks, as `acc,none` of filters; without their errors."""
    results = report.get("results")
    found = [
        f"{task} {metric.removesuffix(',none')} {number(float(value))}"
        for task, metrics in (results.items() if isinstance(results, Mapping) else ())
        for metric, value in (metrics.items() if isinstance(metrics, Mapping) else ())
        if isinstance(value, float) and "_stderr" not in metric
    ]
    more = f", and {len(found) - _METRICS} more" if len(found) > _METRICS else ""
    return ", ".join(found[:_METRICS]) + more
