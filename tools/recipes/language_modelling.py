"""The paper's Table 2 on whole documents: every kind of memory, none, and full attention.

    python tools/recipes/language_modelling.py NOVELS OUT [--corpora novels,repositories]
        [--kinds none,linear,...] [--whole-windows] [--steps N] [--seeds 3] [--reports DIR]
        [--jobs 1] [key=value ...]

NOVELS holds novels as configs/data/novels_train.yaml and novels_val.yaml name them; repositories
are the Python packages of this environment (configs/data/repositories_train.yaml). All models have
the same size, but for what a kind adds of its own, and the same data and number of tokens. Those
without memory and with Linear + Delta are also trained on windows a quarter as long: once with as
many tokens per step, in more lanes, and once with as many lanes, in more steps. Each is trained
with every seed and evaluated on whole held-out documents. After an interruption, the same command
continues with what is not finished.

Intervals are bootstrap intervals over documents, with differences paired (tools/recipes/scores.py).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import commands
import evidence
import gates
import scores
from matplotlib.figure import Figure

from data_prep.dataset.settings import SettingsError
from data_prep.dataset.wording import counted
from pretrain.config import root as configuration
from pretrain.config.root import Config
from pretrain.evaluate import perplexity
from pretrain.evaluate.progress import to_stderr
from pretrain.evaluate.results import Report, write_figure
from pretrain.trained import default_device, load
from pretrain.training.metrics import METRICS_FILE, read_records

CONFIG = commands.CONFIGS / "language_modelling_cpu.yaml"
CORPORA = ("novels", "repositories")
BASE = "none"
FAR = 1024  # positions from which a document's earlier text lies several segments back
TITLES = {
    "none": "local attention alone",
    "full": "full attention over the window",
    "linear": "Infini Linear",
    "delta": "Infini Linear + Delta",
    "transformer_xl": "Transformer-XL",
    "compressive": "Compressive Transformer",
    "memorizing": "Memorizing Transformer",
    "rmt": "RMT",
    "autocompressor": "AutoCompressor",
}
SHORTENED = ("none", "delta")
# Gates that begin at one half stay too high in the upper layers, which want local attention, and
# the memory is a loss (docs/trials.md).
NEAR_LOCAL = ("initial_gate=-3", "when_empty=local")


@dataclass(frozen=True)
class Model:
    """One of the compared models and its settings."""

    name: str
    title: str
    settings: tuple[str, ...]


def models(config: Config, kinds: Sequence[str], *, shortened: bool = True) -> list[Model]:
    """The rows of the table, the base first; all see the same number of tokens.

    `shortened`: those on shorter windows, too.
    """
    segments, steps, warmup = (
        config.train.window_segments, config.train.steps, config.optim.warmup_steps
    )  # fmt: skip
    quarter = max(segments // 4, 1)
    times = segments // quarter
    lanes = times * config.data.lanes
    window = f"windows of {quarter * config.model.segment:,}"
    asked = (BASE, *(kind for kind in kinds if kind != BASE))
    found = [Model(kind, TITLES[kind], _kind(kind, segments)) for kind in asked]
    for kind in SHORTENED if shortened else ():
        if kind in asked:
            own = (*_kind(kind, quarter), f"train.window_segments={quarter}")
            wide = (*own, f"data.lanes={lanes}")
            long = (*own, f"train.steps={times * steps}", f"optim.warmup_steps={times * warmup}")
            found += [
                Model(f"{kind}_lanes", f"{TITLES[kind]}, {window}, {lanes} lanes", wide),
                Model(f"{kind}_steps", f"{TITLES[kind]}, {window}, {times} times the steps", long),
            ]
    return found


def _kind(kind: str, segments: int) -> tuple[str, ...]:
    """The settings of a kind of memory in windows of `segments` segments."""
    own = {
        "linear": NEAR_LOCAL,
        "delta": NEAR_LOCAL,
        "full": (f"full.segments={segments}",),
        # As many as RMT. The published 50 are of segments of 2,048 tokens; with segments of 64 the
        # summaries of 16 of them would be twelve times the segment, at every layer.
        "autocompressor": ("autocompressor.vectors=10",),
    }
    chosen = (f"kind={kind}", *own.get(kind, ()))
    return tuple(f"model.memory.{setting}" for setting in chosen)


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser(
        __doc__,
        ("novels", "directory of the novels"),
        ("out", "directory of data, runs, tables and plots"),
        of="all runs",
    )
    add = parser.add_argument
    add("--corpora", type=commands.names(*CORPORA), default=list(CORPORA), help="default: both")
    add(
        "--kinds",
        type=commands.names(*TITLES),
        default=list(TITLES),
        help="of memory (default: all)",
    )
    add("--whole-windows", action="store_true", help="no models on shorter windows")
    add("--config", type=Path, default=CONFIG, help="recipe of the models")
    add("--steps", type=commands.number(0), default=0, help="optimizer steps; 0: the recipe's")
    add("--documents", type=commands.number(0), default=0, help="whole held-out documents; 0: all")
    add("--seeds", type=commands.number(1), default=3, help="runs of each model (default 3)")
    commands.add_jobs(parser)
    evidence.add_option(parser)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Prepare, train and evaluate whatever is missing, then write tables and plots."""
    parsed = _parser().parse_intermixed_args(words)
    out: Path = parsed.out
    settings = list(parsed.settings)
    if parsed.steps:
        settings.append(f"train.steps={parsed.steps}")
    try:
        common = [f"data.train={out}", f"run.directory={out}", *settings]
        config = configuration.load(parsed.config, common)
        compared = models(config, parsed.kinds, shortened=not parsed.whole_windows)
        for model in compared:
            configuration.load(parsed.config, [*common, *model.settings])
    except SettingsError as error:
        sys.exit(str(error))
    roots = {"novels": parsed.novels, "repositories": Path(sysconfig.get_path("purelib"))}
    for corpus in parsed.corpora:
        _compare(_Corpus(corpus, roots[corpus], parsed, settings), compared)


@dataclass(frozen=True)
class _Corpus:
    """The texts and the name of a corpus, and what its models are trained with."""

    name: str
    root: Path
    parsed: argparse.Namespace
    settings: list[str]

    @property
    def out(self) -> Path:
        """The directory of the runs, tables and plots."""
        out: Path = self.parsed.out
        return out / self.name

    @property
    def seeds(self) -> range:
        """Of the runs of each model."""
        return range(1, self.parsed.seeds + 1)

    def has_all(self, compared: Sequence[Model], seed: int) -> bool:
        """Whether the reports of all models with this seed are there."""
        return all(self._name(model, seed) in evidence.of(self.parsed) for model in compared)

    def prepare(self) -> None:
        """Make the data sets, where they are missing."""
        made_by = evidence.made_by(self.parsed.config, self.settings)
        evidence.begin(self.parsed.out, made_by)
        commands.prepare_both(self.name, self.root, self._data)

    def report(self, model: Model, seed: int) -> Report:
        """The model's report; trained and evaluated if it is missing."""
        documents = self.parsed.documents or None
        settings = [*self.settings, *model.settings, f"run.seed={seed}"]
        made_by = {**evidence.made_by(self.parsed.config, settings), "documents": documents}

        def make() -> Report:
            run = self.out / "runs" / f"{model.name}-{seed}"
            places = [f"data.train={self._data / f'{self.name}_train'}", f"run.directory={run}"]
            commands.run("pretrain", "train", self.parsed.config, *settings, *places)
            return _evaluated(run, self._data / f"{self.name}_val", documents)

        return evidence.of(self.parsed).once(self._name(model, seed), made_by, make)

    @property
    def _data(self) -> Path:
        data: Path = self.parsed.out / "data"
        return data

    def _name(self, model: Model, seed: int) -> str:
        return f"{self.name}/{model.name}-{seed}"


def _compare(corpus: _Corpus, compared: Sequence[Model]) -> None:
    """Train and evaluate on a corpus, and write its table and plots."""
    finished = {seed: corpus.has_all(compared, seed) for seed in corpus.seeds}
    if not all(finished.values()):
        corpus.prepare()
    reports: dict[str, list[Report]] = {model.name: [] for model in compared}
    # Seed by seed, so that a run that is stopped early already has a comparison.
    for seed in corpus.seeds:
        make = functools.partial(corpus.report, seed=seed)
        found = commands.each(corpus.parsed.jobs, make, compared)
        for model, report in zip(compared, found, strict=True):
            reports[model.name].append(report)
        if not finished[seed] or seed == corpus.seeds[-1]:
            _write(corpus.out, compared, reports)


def _evaluated(run: Path, validation: Path, documents: int | None) -> Report:
    """The run's report by document, with its gates, sizes and time."""
    learned = load(run, default_device())
    found = perplexity.evaluate(
        learned,
        validation,
        window_segments=None,
        max_documents=documents,
        batch=8,
        report=to_stderr,
        by_document=True,
        masked=False,
    )
    records = [one for one in read_records(run / METRICS_FILE) if one["kind"] == "train"]
    state = learned.model.initial_state(1, learned.device)
    return {
        **found,
        "gates": records[-1]["gates"],
        "tokens": records[-1]["tokens"],
        "seconds": found["step"] * median(record["seconds_per_step"] for record in records),
        "parameters": sum(one.numel() for one in learned.model.parameters()),
        "state_bytes": sum(tensor.nbytes for layer in state for tensor in layer),
    }


def _write(out: Path, compared: Sequence[Model], reports: dict[str, list[Report]]) -> None:
    titles = {model.name: model.title for model in compared}
    rows = scores.compare({name: scores.scores_of(r) for name, r in reports.items()}, BASE)
    far = scores.compare({name: scores.scores_of(r, FAR) for name, r in reports.items()}, BASE)
    positions = scores.by_position(reports, BASE)
    write_figure(out / "positions.png", _positions(titles, positions))
    if any(found[0]["gates"] for found in reports.values()):
        write_figure(out / "gates.png", _gates(titles, reports))
    numbers = {"rows": rows, "far": far, "positions": positions}
    of = evidence.commits(one["commit"] for one in itertools.chain(*reports.values()))
    text = f"{table(rows, far, titles, reports)}\n{of}\n"
    commands.conclude(out / "comparison", text, numbers)


def table(
    rows: Sequence[dict[str, Any]],
    far: Sequence[dict[str, Any]],
    titles: dict[str, str],
    reports: dict[str, list[Report]],
) -> str:
    """The comparison in Markdown; `far` are the rows of positions from `FAR` on."""
    first = reports[BASE][0]
    lines = [
        f"{first['documents']} whole documents, {first['text_bytes']:,} bytes, after "
        f"{first['tokens']:,} tokens; {counted(len(rows[0]['seeds']), 'seed')}; bits per byte, "
        "95 % intervals over documents; gains are over local attention alone",
        "",
        f"| Model | all positions | by seed | gain | gain from position {FAR:,} on | parameters | "
        "bytes of state | minutes |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row, beyond in zip(rows, far, strict=True):
        found = reports[row["model"]]
        low, high = row["interval"]
        cells = [
            titles[row["model"]],
            f"{row['bits']:.4f} ({low:.4f} to {high:.4f})",
            ", ".join(f"{one:.4f}" for one in row["seeds"]),
            *("" if row["model"] == BASE else _gain(one) for one in (row, beyond)),
            f"{found[0]['parameters']:,}",
            f"{found[0]['state_bytes']:,}",
            f"{median(one['seconds'] for one in found) / 60:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _gain(row: dict[str, Any]) -> str:
    low, high = row["gain_interval"]
    return f"{row['gain']:+.4f} ({low:+.4f} to {high:+.4f})"


def _positions(titles: dict[str, str], positions: Sequence[dict[str, Any]]) -> Figure:
    """Each model's gain over the base, with its interval, by position."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    ends = [row["end"] for row in positions]
    for index, name in enumerate(titles):
        rows = [one["rows"][index] for one in positions]
        if name != BASE:
            low, high = zip(*(row["gain_interval"] for row in rows), strict=True)
            color = f"C{index % 10}"
            axes.fill_between(ends, low, high, color=color, alpha=0.1, linewidth=0)
            gains, line = [row["gain"] for row in rows], "-" if index <= 10 else "--"
            axes.plot(ends, gains, line, color=color, marker="o", markersize=4, label=titles[name])
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the document, in tokens (each range starts at half its end)")
    axes.set_ylabel(f"gain over {titles[BASE]} (bits per byte)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _gates(titles: dict[str, str], reports: dict[str, list[Report]]) -> Figure:
    """The gates of every model that has some, of all seeds."""
    return gates.figure(
        {
            titles[name]: {seed: one["gates"] for seed, one in enumerate(each, 1)}
            for name, each in reports.items()
            if each[0]["gates"]
        }
    )


if __name__ == "__main__":
    main()
