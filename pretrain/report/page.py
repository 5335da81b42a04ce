"""Runs as one HTML page: no script, no request, no credential, of bounded size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from data_prep.dataset import durable, settings
from data_prep.pages.curves import number
from data_prep.pages.rendering import render, short
from pretrain.config.root import Config
from pretrain.report import evaluations, figures, runs, timeline
from pretrain.report.figures import Style
from pretrain.report.runs import Run

_DASH = "\N{EN DASH}"
_LONGEST = 400  # characters of a value in a table


def write(directories: Sequence[Path], output: Path) -> None:
    """Write the page of the runs, and make the directory of `output` if need be."""
    output.parent.mkdir(parents=True, exist_ok=True)
    shown = page(directories, datetime.now(UTC))
    durable.write_bytes(output, shown.encode(errors="replace"))


def page(directories: Sequence[Path], now: datetime) -> str:
    """The page of up to figures.MOST_RUNS runs, as they are at `now`."""
    found = [runs.read(directory) for directory in directories]
    shown = figures.styles(_names(directories))
    sections = figures.sections(found, shown)
    evaluated = evaluations.table(found, shown)
    values = {
        "title": shown[0].name if len(found) == 1 else f"{len(found)} runs",
        "written": f"{now:%Y-%m-%d %H:%M UTC}",
        "runs": [_overview(run, style, now) for run, style in zip(found, shown, strict=True)],
        "charts": sections,
        "evaluated": evaluated,
        "recall": evaluations.figures(found, shown),
        "progress": timeline.progress(found, shown),
        "lives": [timeline.life(run, style) for run, style in zip(found, shown, strict=True)],
        "differences": _differences(found),
        "configurations": {
            style.name: _yaml(run.configuration) for run, style in zip(found, shown, strict=True)
        },
    }
    return render("pretrain.report", "runs.html", values)


class Overview(NamedTuple):
    """A run in a few figures, as texts."""

    style: Style
    directory: str
    state: str
    touched: str
    figures: Mapping[str, str]


def _overview(run: Run, style: Style, now: datetime) -> Overview:
    train, validation = run.train, run.records.get("validation", [])
    last: Mapping[str, Any] = train[-1] if train else {}
    losses = [(r["loss"], r["step"]) for r in validation if _is_number(r.get("loss"))]
    step = max([r["step"] for r in train], default=max(run.log.reached.values(), default=0))
    speeds = [r["tokens_per_second"] for r in train if _is_number(r.get("tokens_per_second"))]
    least = min(losses, default=None)
    return Overview(
        style,
        str(run.directory),
        run.state,
        _ago(run.touched, now),
        {
            "step": f"{step:,}" + (f" of {run.steps:,}" if run.steps else ""),
            "tokens": short(last["tokens"]) if isinstance(last.get("tokens"), int) else _DASH,
            "training loss": _shown(last, "loss"),
            "best validation loss": (
                _DASH if least is None else f"{number(least[0])} @ {least[1]:,}"
            ),
            "tokens/s, median": short(round(float(np.median(speeds)))) if speeds else _DASH,
            "skipped steps": _shown(last, "skipped"),
            "attempts": f"{len(run.attempts):,}",
        },
    )


def _shown(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        return _DASH
    value = record[key]
    return number(value) if _is_number(value) else "not finite"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _ago(touched: datetime | None, now: datetime) -> str:
    """When the run last wrote, and how long ago that was."""
    if touched is None:
        return "nothing logged yet"
    seconds = max((now - touched).total_seconds(), 0)
    units = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
    unit, size = next((one for one in units if seconds >= 2 * one[1]), units[-1])
    return f"last wrote {touched:%Y-%m-%d %H:%M UTC}, {seconds / size:.0f} {unit} before this page"


def _names(directories: Sequence[Path]) -> list[str]:
    """The directories' names, with as many of their parents as tell them apart."""
    resolved = [directory.resolve() for directory in directories]
    for parts in range(1, max(len(path.parts) for path in resolved) + 1):
        names = [str(Path(*path.parts[-parts:])) for path in resolved]
        if len(set(names)) == len(names):
            break
    return names


def _differences(found: Sequence[Run]) -> list[tuple[str, ...]]:
    """(setting, value of each run) where runs differ; of one run (setting, value, default)."""
    columns = [runs.flat(run.configuration) for run in found]
    if not any(columns):
        return []
    if len(columns) == 1:
        columns.append(runs.flat(settings.to_plain(Config())))
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [(key, *(_value(column, key) for column in columns)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _value(column: Mapping[str, Any], key: str) -> str:
    if key not in column:
        return _DASH
    value = column[key]
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
    text = text.strip().removesuffix("\n...")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\N{HORIZONTAL ELLIPSIS}"


def _yaml(configuration: Mapping[str, Any]) -> str:
    """As in config.yaml; empty where nothing could be read."""
    if not configuration:
        return ""
    return yaml.safe_dump(dict(configuration), sort_keys=False, allow_unicode=True)[:50_000]
