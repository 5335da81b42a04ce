"""The paper's Table 2 on whole books: memory against none, and against attention over the window.

    python tools/recipes/language_modelling.py CORPUS OUT [--steps N] [--seeds 3] [key=value ...]

CORPUS holds novels as configs/data/novels_train.yaml and novels_val.yaml name them. The models have
the same size, data and tokens per step; each is trained with every seed and evaluated on whole
validation books. After an interruption, the same command continues with what is not finished. Use
a new OUT for a larger budget.

Intervals are bootstrap intervals over books: 10,000 resamples, the same for every model, of each
book's nats averaged over seeds. Differences between models are therefore paired by book.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import commands
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data_prep.dataset.settings import SettingsError
from pretrain import config as configuration
from pretrain.config import Config
from pretrain.evaluate import perplexity
from pretrain.evaluate.progress import to_stderr
from pretrain.evaluate.results import Report, write_figure
from pretrain.trained import default_device, load
from pretrain.training.metrics import METRICS_FILE, read_records

CONFIG = commands.CONFIGS / "language_modelling_cpu.yaml"
DRAWS = 10_000
# Earlier positions are few tokens, mostly the books' titles.
_FIRST = 32


@dataclass(frozen=True)
class Model:
    """One of the compared models and its settings."""

    name: str
    title: str
    settings: tuple[str, ...]


def models(config: Config) -> list[Model]:
    """The rows of the table; all see the same number of tokens per step."""
    lanes, segments, window = config.data.lanes, config.train.window_segments, config.window
    shorter = max(segments // 4, 1)
    none = "model.memory.kind=none"
    return [
        Model("none", "local attention alone", (none,)),
        Model("linear", "Infini Linear", ("model.memory.kind=linear",)),
        Model("delta", "Infini Linear + Delta", ("model.memory.kind=delta",)),
        Model(
            "delta_short",
            f"Infini Linear + Delta, windows of {shorter * config.model.segment:,}",
            (
                "model.memory.kind=delta",
                f"train.window_segments={shorter}",
                f"data.lanes={lanes * segments // shorter}",
            ),
        ),
        Model(
            "full",
            f"full attention over {window:,}",
            (none, f"model.segment={window}", "train.window_segments=1"),
        ),
    ]


@dataclass(frozen=True)
class Scores:
    """A model's nats by seed and book, and the books' bytes; books are ordered by id."""

    nats: np.ndarray  # [seeds, books]
    bytes: np.ndarray  # [books]

    @property
    def bits(self) -> float:
        """Bits per byte over all books, averaged over seeds."""
        return float(self.nats.mean(axis=0).sum() / self.bytes.sum() / math.log(2))

    @property
    def of_seeds(self) -> list[float]:
        """Bits per byte over all books, for each seed."""
        return [float(one) for one in self.nats.sum(axis=1) / self.bytes.sum() / math.log(2)]

    def drawn(self, draws: np.ndarray) -> np.ndarray:
        """Bits per byte [draws] for each resample of books [draws, books]."""
        nats = self.nats.mean(axis=0)[draws].sum(axis=1)
        bits: np.ndarray = nats / self.bytes[draws].sum(axis=1) / math.log(2)
        return bits


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def compare(scores: dict[str, Scores], base: str = "none") -> list[dict[str, Any]]:
    """Bits per byte of each model and its gain over `base`, with intervals."""
    books = len(scores[base].bytes)
    draws = np.random.default_rng(0).integers(books, size=(DRAWS, books))
    reference = scores[base].drawn(draws)
    rows = []
    for name, score in scores.items():
        drawn = score.drawn(draws)
        rows.append(
            {
                "model": name,
                "bits": score.bits,
                "interval": interval(drawn),
                "seeds": score.of_seeds,
                "gain": scores[base].bits - score.bits,
                "gain_interval": interval(reference - drawn),
            }
        )
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Prepare, train and evaluate whatever is missing, then write tables and plots."""
    parser = commands.parser(
        __doc__,
        ("corpus", "directory of the novels"),
        ("out", "directory of data, runs, tables and plots"),
        of="all runs",
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="recipe of the models")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps; 0: the recipe's")
    parser.add_argument("--books", type=int, default=0, help="whole validation books; 0: all")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    parsed = parser.parse_intermixed_args(words)
    out: Path = parsed.out
    overrides = [f"data.train={out / 'data' / 'novels_train'}", *parsed.settings]
    if parsed.steps:
        overrides.append(f"train.steps={parsed.steps}")
    try:
        config = configuration.load(parsed.config, [*overrides, f"run.directory={out / 'runs'}"])
    except SettingsError as error:
        sys.exit(str(error))
    _, validation = commands.prepare_novels(parsed.corpus, out / "data")
    reports: dict[str, list[Report]] = {}
    # Seed by seed, so that a run that is stopped early already has a comparison.
    for seed in range(1, parsed.seeds + 1):
        for model in models(config):
            run = out / "runs" / f"{model.name}-{seed}"
            own = [*overrides, *model.settings, f"run.seed={seed}", f"run.directory={run}"]
            commands.run("pretrain", "train", parsed.config, *own)
            report = _evaluated(run, validation, config.train.steps, parsed.books)
            reports.setdefault(model.name, []).append(report)
        _write(out, config, reports)


def _evaluated(run: Path, validation: Path, steps: int, books: int) -> Report:
    """The run's report by book, evaluated if it is missing."""
    path = run / f"books-{steps}-{books or 'all'}.json"
    report: Report = commands.once(
        path,
        lambda: perplexity.evaluate(
            load(run, default_device()),
            validation,
            window_segments=None,
            max_documents=books or None,
            batch=4,
            report=to_stderr,
            by_document=True,
            masked=False,
        ),
    )
    return {**report, "gates": _gates(run)}


def _gates(run: Path) -> list[list[float]]:
    records = [one for one in read_records(run / METRICS_FILE) if one["kind"] == "train"]
    gates: list[list[float]] = records[-1]["gates"]
    return gates


def scores_of(reports: Sequence[Report], end: int | None = None) -> Scores:
    """The scores in a model's reports, one per seed; with `end`, only of the range ending there."""
    nats, sizes = [], []
    for report in reports:
        books = sorted(report["by_document"], key=lambda book: book["id"])
        parts = [_part(book, end) for book in books]
        nats.append([_nats(part) for part in parts])
        sizes = [part["bytes"] for part in parts]
    return Scores(np.array(nats), np.array(sizes))


def _part(book: dict[str, Any], end: int | None) -> dict[str, Any]:
    part: dict[str, Any] = book["total"]
    if end is not None:
        (part,) = (row for row in book["positions"] if row["end"] == end)
    return part


def _nats(part: dict[str, Any]) -> float:
    """Nats with memory, or without for a model that has none."""
    nats: dict[str, float] = part["nats"]
    return nats[perplexity.MEMORY if perplexity.MEMORY in nats else perplexity.NO_MEMORY]


def by_position(reports: dict[str, list[Report]]) -> list[dict[str, Any]]:
    """`compare` for each range of positions that all books have, except the very first tokens."""
    books = next(iter(reports.values()))[0]["by_document"]
    ends = [{row["end"] for row in book["positions"]} for book in books]
    return [
        {
            "end": end,
            "rows": compare({name: scores_of(found, end) for name, found in reports.items()}),
        }
        for end in sorted(set.intersection(*ends))
        if end > _FIRST
    ]


def _write(out: Path, config: Config, reports: dict[str, list[Report]]) -> None:
    rows = compare({name: scores_of(found) for name, found in reports.items()})
    positions = by_position(reports)
    titles = {model.name: model.title for model in models(config)}
    write_figure(out / "positions.png", _positions(titles, positions))
    write_figure(out / "gates.png", _gates_drawn(titles, reports))
    numbers = {"rows": rows, "positions": positions}
    commands.conclude(out / "comparison", _table(rows, titles, reports), numbers)


def _table(
    rows: Sequence[dict[str, Any]], titles: dict[str, str], reports: dict[str, list[Report]]
) -> str:
    """The comparison in Markdown."""
    first = next(iter(reports.values()))[0]
    lines = [
        f"{first['documents']} whole books, {first['text_bytes']:,} bytes, after step "
        f"{first['step']}; {len(rows[0]['seeds'])} seeds; 95 % intervals over books",
        "",
        "| Model | bits per byte | by seed | gain over local attention |",
        "|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        seeds = ", ".join(f"{one:.4f}" for one in row["seeds"])
        less, more = row["gain_interval"]
        gain = "" if row["model"] == "none" else f"{row['gain']:+.4f} ({less:+.4f} to {more:+.4f})"
        cells = [titles[row["model"]], f"{row['bits']:.4f} ({low:.4f} to {high:.4f})", seeds, gain]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _positions(titles: dict[str, str], positions: Sequence[dict[str, Any]]) -> Figure:
    """Each model's gain over local attention alone, with its interval, by position."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    ends = [row["end"] for row in positions]
    for index, name in enumerate(titles):
        rows = [one["rows"][index] for one in positions]
        if name != "none":
            low, high = zip(*(row["gain_interval"] for row in rows), strict=True)
            axes.fill_between(ends, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
            gains = [row["gain"] for row in rows]
            axes.plot(ends, gains, color=f"C{index}", marker="o", markersize=4, label=titles[name])
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the book, in text tokens (each range starts at half its end)")
    axes.set_ylabel("gain over local attention alone (bits per byte)")
    axes.legend(frameon=False)
    return figure


def _gates_drawn(titles: dict[str, str], reports: dict[str, list[Report]]) -> Figure:
    """Every head's gate by layer, all seeds; one panel per model with memory (Figure 3)."""
    found = {name: [r["gates"] for r in each] for name, each in reports.items() if each[0]["gates"]}
    figure = Figure(figsize=(3.5 * len(found), 4), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (name, seeds) in zip(panels, found.items(), strict=True):
        for seed, layers in enumerate(seeds):
            for layer, gates in enumerate(layers):
                place = layer + 0.2 * (seed - (len(seeds) - 1) / 2)
                axes.scatter([place] * len(gates), gates, s=14, color=f"C{seed}")
        axes.axhline(0.5, color="grey", linestyle=":", linewidth=1)
        axes.set_ylim(-0.03, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(titles[name], fontsize=9)
        axes.set_xlabel("layer (one dot per head, one colour per seed)", fontsize=8)
    panels[0].set_ylabel("sigmoid(β), share of the memory")
    return figure


if __name__ == "__main__":
    main()
