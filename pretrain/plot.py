"""A run's curves as PNGs, from what the trainer and the evaluation recorded."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from data_prep.dataset import durable
from data_prep.dataset.parsing import json_value
from data_prep.dataset.settings import MistakeError
from data_prep.dataset.wording import any_of
from pretrain.evaluate.perplexity import MASKED, MEMORY, NO_MEMORY, range_of
from pretrain.evaluate.results import step_of, write_figure
from pretrain.training.metrics import METRICS_FILE, read_records

PLOTS = "plots"

_EVALUATION = re.compile(r"eval-(\d+)-.*\.json")
# Okabe and Ito's palette, which the colour-blind can distinguish.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_OF_AN_EVALUATION = {"positions", "total", "data", "segment", "step"}
_COLUMNS = {
    MEMORY: ("with memory", _BLUE, "o"),
    MASKED: ("memory read masked", _ORANGE, "s"),
    NO_MEMORY: ("model without memory", _GREY, "o"),
}

_AUXILIARY, _Z, _AVERAGED = "auxiliary_loss", "z_loss", "ema_loss"

_log = logging.getLogger("pretrain.plot")

Records = list[dict[str, Any]]


class PlotError(MistakeError):
    """A directory with nothing to draw, or that no plot can be written into."""


def plot(run_directory: Path) -> list[Path]:
    """Draw what the run has into its `plots/`; the files written.

    loss.png: losses, z-loss and learning rates; speed.png: tokens/s; memory.png: what the memory
    reports, and its auxiliary loss; gates.png: gates by layer; positions.png: bits per byte by
    position, of the newest step's evaluation (of several the one written last).
    What the run has no numbers for is skipped, and logged. Raises PlotError for a run without a
    training record, or where a plot cannot be written.
    """
    records = read_records(run_directory / METRICS_FILE)
    train = [record for record in records if record.get("kind") == "train"]
    if not train:
        raise PlotError(
            f"{run_directory}: no training record in {METRICS_FILE}; expected the directory of a "
            "run that has reached train.log_every steps"
        )
    if reason := durable.obstacle(run_directory / PLOTS, directory=True):
        raise PlotError(reason)
    validation = [record for record in records if record.get("kind") == "validation"]
    figures = {
        "loss.png": _loss(train, validation),
        "speed.png": _speed(train),
        "memory.png": _memory(train),
        "gates.png": _gates(train[-1]),
        "positions.png": _positions(run_directory),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(run_directory / PLOTS / name)
            write_figure(written[-1], figure)
    return written


def _loss(train: Records, validation: Records) -> Figure:
    with_z = any(_Z in record for record in train)
    heights = [3, 1.5, 2] if with_z else [3, 2]
    figure = Figure(figsize=(8, 1.5 + sum(heights)), layout="constrained")
    upper, *middle, lower = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _draw(upper, train, "loss", _BLUE, "training")
    if validation:
        _draw(upper, validation, "loss", _ORANGE, "validation")
    if any(_AVERAGED in record for record in validation):
        _draw(upper, validation, _AVERAGED, _GREEN, "validation, average of the weights")
    _finish(upper, "Loss", "loss (nats per token)")
    upper.legend(frameon=False)
    for axes in middle:
        _draw(axes, train, _Z, _BLUE, "z-loss")
        _finish(axes, "z-loss, added to the loss", "per token")
    _draw(lower, train, "lr", _BLUE, "weights")
    if any(record.get("gates") for record in train):
        _draw(lower, train, "gate_lr", _GREEN, "gates")
        lower.set_yscale("log")
        lower.legend(frameon=False)
    _finish(lower, "Learning rate", "learning rate (per step)")
    _count_steps(lower)
    return figure


def _speed(train: Records) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    _draw(axes, train, "tokens_per_second", _BLUE, "between log lines")
    rates = [r["tokens_per_second"] for r in train if _is_number(r.get("tokens_per_second"))]
    median = float(np.median(rates)) if rates else math.nan
    axes.axhline(median, color=_GREY, linestyle="--", linewidth=1, label=f"median {median:,.0f}")
    axes.legend(frameon=False, loc="lower right")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter())
    _count_steps(axes)
    _finish(axes, "Training speed, all ranks together", "tokens per second")
    return figure


def _memory(records: Records) -> Figure | None:
    """The memory's numbers, means over the layers that report them, and its auxiliary loss."""
    metrics = [key for key, x in records[-1].items() if key != "gates" and isinstance(x, list)]
    names = metrics + [_AUXILIARY] * (_AUXILIARY in records[-1])
    if not names:
        _log.warning("memory.png is skipped: the model has no memory")
        return None
    figure = Figure(figsize=(8, 1.5 + 2.5 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        means = [{"step": record["step"], name: _mean(record.get(name))} for record in records]
        _draw(axes, means, name, _BLUE, name)
        unit = "mean of lanes and layers" if name in metrics else "per token"
        _finish(axes, name.replace("_", " ").capitalize(), unit)
    _count_steps(panels[-1])
    return figure


def _mean(values: Any) -> float:
    """Of a number, or one per layer; NaN if one is missing or was not finite."""
    of_layers = values if isinstance(values, list) else [values]
    return float(np.mean([value if _is_number(value) else math.nan for value in of_layers]))


def _gates(record: dict[str, Any]) -> Figure | None:
    """The paper's Figure 3: each head between local attention and memory."""
    given = record.get("gates")
    layers = [
        [gate for gate in heads if _is_number(gate)]
        for heads in (given if isinstance(given, list) else [])
        if isinstance(heads, list)
    ]
    if not any(layers):
        _log.warning("gates.png is skipped: the model has no gates")
        return None
    figure = Figure(figsize=(max(7.0, 3.5 + 0.3 * len(layers)), 4.5), layout="constrained")
    axes, shares = figure.subplots(1, 2, sharey=True, width_ratios=[4, 1])
    for layer, gates in enumerate(layers, 1):
        # By height, side by side, so that equal heads do not hide each other.
        ordered = np.sort(gates)
        across = np.zeros(1) if len(ordered) == 1 else np.linspace(-0.3, 0.3, len(ordered))
        axes.axvspan(layer - 0.4, layer + 0.4, color=_GREY, alpha=0.08, linewidth=0)
        axes.scatter(
            layer + across, ordered, s=22, c=ordered, cmap="viridis", vmin=0, vmax=1, zorder=3
        )
    axes.axhline(0.5, color=_GREY, linestyle=":", linewidth=1)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(0.3, len(layers) + 0.7)
    axes.set_yticks(
        [0, 0.25, 0.5, 0.75, 1], ["local only  0", "0.25", "mixer  0.5", "0.75", "memory only  1"]
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer, from 1 (a dot per head)")
    _finish(axes, f"Gates by layer after step {record['step']}", "sigmoid(β), share of the memory")
    every = np.concatenate([np.asarray(gates) for gates in layers])
    shares.hist(every, bins=20, range=(0, 1), orientation="horizontal", color=_GREY)
    shares.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    shares.set_xlabel("heads")
    _finish(shares, "All layers", "")
    return figure


def _positions(run_directory: Path) -> Figure | None:
    report = newest_evaluation(run_directory)
    if report is None:
        _log.warning(
            "positions.png is skipped: %s has no evaluation; "
            "run `pretrain eval perplexity %s --data DIR`",
            run_directory, run_directory,
        )  # fmt: skip
        return None
    rows = [row for row in report["positions"] if row["bytes"]]
    columns = _columns_of(report)
    compared = {MEMORY, MASKED} <= set(columns)
    figure = Figure(figsize=(8, 6.5 if compared else 4.5), layout="constrained")
    if compared:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        _draw_gain(lower, rows)
    else:
        upper = lower = figure.subplots()
    for column in columns:
        _draw_bits(upper, rows, column, report["total"]["bits_per_byte"][column])
    upper.legend(frameon=False)
    _finish(upper, f"{report['data']}, model after {step_of(report)}", "bits per byte")
    if report["segment"] < rows[-1]["end"]:
        _mark_segment(figure.axes, report["segment"])
    lower.set_xticks(
        _places(rows), [range_of(row) for row in rows], rotation=45, ha="right", fontsize=8
    )
    lower.set_xlabel("position in the document (text tokens before the target)")
    return figure


def newest_evaluation(run_directory: Path) -> dict[str, Any] | None:
    """The run's evaluation of the highest step, of several the one written last.

    A file that is no evaluation, as one that was copied in part, is passed over, and logged.
    """
    found = [
        (int(match[1]), path.stat().st_mtime_ns, path)
        for path in run_directory.glob("eval-*.json")
        if (match := _EVALUATION.fullmatch(path.name))
    ]
    for *_, path in sorted(found, reverse=True):
        try:
            report = json_value(path.read_bytes())
        except ValueError:
            report = None
        fault = _fault(report)
        if isinstance(report, dict) and not fault:
            return report
        _log.warning(
            "%s is passed over: %s; expected what `pretrain eval perplexity` writes", path, fault
        )
    return None


def _fault(report: Any) -> str:
    """Why this is no evaluation that can be drawn; empty: it is one."""
    if not isinstance(report, dict):
        return "it is no JSON object that can be read"
    if lacking := sorted(_OF_AN_EVALUATION - report.keys()):
        return f"it has no {', '.join(lacking)}"
    columns = _columns_of(report)
    if not columns:
        return f"its total has no bits_per_byte of {any_of(list(_COLUMNS))}"
    if not isinstance(report["segment"], int) or report["segment"] < 1:
        return f"its segment is {report['segment']!r}, expected a number of tokens"
    rows = report["positions"] if isinstance(report["positions"], list) else []
    wrong = [place for place, row in enumerate(rows) if not _is_row(row, columns)]
    if wrong:
        return (
            f"positions[{wrong[0]}] lacks first, end or bytes, or its bits_per_byte "
            f"of {', '.join(columns)}"
        )
    return "" if any(row["bytes"] for row in rows) else "no range of its positions has bytes"


def _columns_of(report: dict[str, Any]) -> list[str]:
    """The columns of an evaluation that have a number in its total."""
    total = report["total"]
    bits = total.get("bits_per_byte") if isinstance(total, dict) else None
    return [one for one in _COLUMNS if isinstance(bits, dict) and _is_number(bits.get(one))]


def _is_row(row: Any, columns: Sequence[str]) -> bool:
    """Whether it is a range of positions, with all numbers if it has bytes."""
    if not isinstance(row, dict) or not all(_is_number(row.get(k)) for k in ("first", "bytes")):
        return False
    if not isinstance(row.get("end"), int) or row["end"] < 1:
        return False
    bits = row.get("bits_per_byte")
    return not row["bytes"] or (
        isinstance(bits, dict) and all(_is_number(bits.get(column)) for column in columns)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _draw_bits(axes: Axes, rows: Records, column: str, total: float) -> None:
    label, colour, marker = _COLUMNS[column]
    bits = [row["bits_per_byte"][column] for row in rows]
    axes.plot(
        _places(rows), bits, color=colour, marker=marker, markersize=5,
        label=f"{label}: {total:.4f} over all",
    )  # fmt: skip


def _draw_gain(axes: Axes, rows: Records) -> None:
    gains = [row["bits_per_byte"][MASKED] - row["bits_per_byte"][MEMORY] for row in rows]
    axes.bar(_places(rows), gains, color=_GREEN, width=0.7)
    axes.axhline(0, color=_GREY, linewidth=1)
    _finish(axes, "What reading the memory saves", "bits per byte")


def _mark_segment(panels: Sequence[Axes], segment: int) -> None:
    """A line where a document's first segment ends: before it the memory is empty."""
    place = math.log2(segment) + 0.5
    for axes in panels:
        axes.axvline(place, color=_GREY, linestyle=":", linewidth=1)
    panels[0].annotate(
        f"first segment ends ({segment:,})", (place, 0.97), xycoords=("data", "axes fraction"),
        xytext=(-4, 0), textcoords="offset points", ha="right", va="top", rotation=90, fontsize=8,
        color=_GREY,
    )  # fmt: skip


def _places(rows: Records) -> list[int]:
    """The place of a bucket: powers of two at even distances, position 0 before them."""
    return [row["end"].bit_length() - 1 for row in rows]


def _draw(axes: Axes, records: Records, key: str, colour: str, label: str) -> None:
    """A value by step; one that is missing or was not finite is a gap."""
    steps = [record["step"] for record in records]
    values = [record[key] if _is_number(record.get(key)) else math.nan for record in records]
    # A curve of few points, or of one, must be seen too.
    marker = "o" if len(steps) <= 20 else ""
    axes.plot(steps, values, color=colour, linewidth=1.2, marker=marker, markersize=4, label=label)


def _count_steps(axes: Axes) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylabel(unit)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
