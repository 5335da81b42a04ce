"""How many pairs each kind of memory holds, by the bytes of its state, from no data to plots.

    python tools/recipes/recall_capacity.py OUT [--kinds linear,delta] [--widths 64,128] [--seeds 3]
        [--reports DIR] [--jobs 1] [key=value ...]

Multi-query associative recall (after Zoology, arXiv 2312.04927): pairs of a key and a value, and
after a gap the question for every key. Models of two layers, of each kind of memory and each width,
are trained with one budget on documents whose pairs and gaps grow from stage to stage,
and are asked by number of pairs and by distance in segments. After an interruption, the same
command continues with what is not finished.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import commands
import evidence
import numpy as np
from commands import CONFIGS
from matplotlib.figure import Figure
from stages import SEARCHED, Stage, documents_needed, shortened

from data_prep.dataset import shards
from data_prep.dataset.settings import SettingsError
from data_prep.recall.mqar import MOST_PAIRS, Answers
from pretrain.config import root as configuration
from pretrain.config.memory import MEMORY_KINDS
from pretrain.evaluate import mqar
from pretrain.evaluate.progress import to_stderr
from pretrain.evaluate.questions import Associations
from pretrain.evaluate.results import Report, write_figure
from pretrain.trained import default_device, load

CONFIG = CONFIGS / "recall_capacity_cpu.yaml"
INFINI = ("linear", "delta")
RECURRENT = ("rmt", "autocompressor")
PAIRS = tuple(2**power for power in range(2, 10))
DISTANCES = (0, 1, 4, 16, 64)
ANSWERS = 256
SEED_ASKED = 0  # the training documents have seed 1


@dataclass(frozen=True)
class Documents:
    """A set of documents with these numbers of pairs, and gaps of 0 to `gap` tokens.

    Keys and values are drawn from `symbols` of each; the loss is of `answers`.
    """

    name: str
    pairs: tuple[int, ...]
    gap: int
    symbols: int = MOST_PAIRS
    answers: Answers = "values"

    @property
    def mean(self) -> float:
        """Mean tokens of a document."""
        return 4 * sum(self.pairs) / len(self.pairs) + self.gap / float(np.log(self.gap + 1))


NEAR = Documents("near", (3, 5, 7), 2, symbols=32, answers="pairs")
FEW = Documents("few", (4, 8, 14), 64, symbols=32, answers="pairs")
MORE = Documents("more", (4, 8, 14), 64, symbols=128)
ALL = Documents("all", (4, 8, 14), 64)
MANY = Documents("many", (16, 32, 64, 128), 1024)
MOST = Documents("most", (4, 16, 64, 128, 256, 512), 4096)
NEAR_VALUES = replace(NEAR, name="near_values", answers="values")
NEAR_TWICE = replace(NEAR_VALUES, name="near_twice", symbols=64)
NEAR_MORE = replace(NEAR_VALUES, name="near_more", symbols=128)
NEAR_MOST = replace(NEAR_VALUES, name="near_most", symbols=256)
NEAR_ALL = replace(NEAR_VALUES, name="near_all", symbols=MOST_PAIRS)
FEW_VALUES = replace(FEW, name="few_values", answers="values")
# A set has as many documents as its stages read: this one more.
ALL_LONGER = replace(ALL, name="all_longer")


def _last_stages(few_pairs: Documents) -> tuple[Stage[Documents], ...]:
    return (
        Stage("5_many", ((few_pairs, 0.2), (MANY, 0.8)), 300, 4, 32, 2e-3, 0.0),
        Stage("6_most", ((few_pairs, 0.1), (MANY, 0.5), (MOST, 0.4)), 150, 2, 64, 1e-3, 0.0, 0.5),
    )


# Few pairs of few symbols first, and all of them near. Then through the memory, which
# Infini-attention learns after 200 to 400 steps, and was seen to learn only from a loss of keys
# and values: it has to read its memory at all first, and keys are read from it too. A model that
# can do so takes four times the symbols within 300 steps, and then more pairs, with a loss of the
# values alone (docs/trials.md).
INFINI_STAGES = (
    Stage("1_near", ((NEAR, 1.0),), 400, 8, 1, 3e-3, 0.0, 0.3, segment=512),
    Stage("2_few", ((FEW, 1.0),), 1200, 8, 8, 3e-3, 0.0, 0.3),
    Stage("3_more", ((MORE, 1.0),), 300, 8, 8, 3e-3, 0.0, 0.3),
    Stage("4_all", ((ALL, 1.0),), 300, 8, 8, 3e-3, 0.0, 0.3),
    *_last_stages(ALL),
)
# Other kinds learn to match keys from the values alone, and at once; keys, which nothing predicts,
# are a noise that grows with the pairs. They take more symbols while all is near, and not always
# later: so all symbols come before the memory does. As many tokens in all.
NEAR_STAGES = (
    Stage("1_near", ((NEAR_VALUES, 1.0),), 400, 8, 1, 3e-3, 0.0, segment=512),
    Stage("2_near_more", ((NEAR_MORE, 1.0),), 200, 8, 1, 3e-3, 0.0, segment=512),
    Stage("3_near_all", ((NEAR_ALL, 1.0),), 300, 8, 1, 3e-3, 0.0, segment=512),
)
# Not every seed takes four times as many symbols. Every one that was tried takes twice as many
# where each number of them is learned to its end, the rate falling (docs/trials.md).
NEAR_STAGES_DOUBLING = tuple(
    Stage(f"1_{documents.name}", ((documents, 1.0),), steps, 8, 1, 3e-3, 0.0, 0.3, segment=512)
    for documents, steps in (
        (NEAR_VALUES, 300),
        (NEAR_TWICE, 100),
        (NEAR_MORE, 120),
        (NEAR_MOST, 150),
        (NEAR_ALL, 230),
    )
)
STAGES = (
    *NEAR_STAGES_DOUBLING,
    Stage("4_all", ((ALL_LONGER, 1.0),), 1300, 8, 8, 3e-3, 0.0),
    *_last_stages(ALL_LONGER),
)
# A recurrence learns more slowly: in as many steps it gets further with four times the symbols at
# once and a constant rate. It has yet to learn to write, and does so from few symbols.
RECURRENT_STAGES = (
    *NEAR_STAGES,
    Stage("4_few", ((FEW_VALUES, 1.0),), 400, 8, 8, 3e-3, 0.0),
    Stage("4_all", ((ALL_LONGER, 1.0),), 900, 8, 8, 3e-3, 0.0),
    *_last_stages(ALL_LONGER),
)


Plan = Sequence[Stage[Documents]]


@dataclass(frozen=True)
class Plans:
    """The stages of Infini-attention, of the recurrences, and of all other kinds."""

    infini: Plan = INFINI_STAGES
    recurrent: Plan = RECURRENT_STAGES
    others: Plan = STAGES

    def of(self, kind: str) -> Plan:
        """The stages of this kind of memory."""
        if kind in INFINI:
            return self.infini
        return self.recurrent if kind in RECURRENT else self.others

    def shortened(self, share: float) -> Plans:
        """With `share` of the steps."""
        return Plans(*(shortened(plan, share) for plan in self._all))

    def documents(self, segment: int) -> dict[Documents, int]:
        """All sets, each with as many documents as the stages that read most of it need."""
        found: dict[Documents, int] = {}
        for plan in self._all:
            for one, count in documents_needed(plan, segment).items():
                found[one] = max(count, found.get(one, 0))
        return found

    @property
    def stages(self) -> Plan:
        """Those of all kinds, one after the other."""
        return list(itertools.chain(*self._all))

    @property
    def _all(self) -> tuple[Plan, Plan, Plan]:
        return self.infini, self.recurrent, self.others


@dataclass(frozen=True)
class Model:
    """A kind of memory and a width."""

    kind: str
    width: int

    @property
    def name(self) -> str:
        """Of its runs, without the seed."""
        return f"{self.kind}-{self.width}"

    def settings(self, segments: int) -> list[str]:
        """Its settings in windows of `segments` segments, as `key=value`."""
        own = {
            "full": [f"model.memory.full.segments={segments}"],
            "memorizing": ["model.memory.memorizing.capacity=2048", *SEARCHED],
        }
        return [
            f"model.d_model={self.width}",
            # One head per layer: what it retrieves passes on every value.
            "model.n_heads=1",
            "model.n_kv_heads=1",
            f"model.d_head={self.width}",
            f"model.d_ff={self.width * 8 // 3 // 8 * 8}",
            f"model.memory.kind={self.kind}",
            *own.get(self.kind, []),
        ]


def main(words: Sequence[str] | None = None, plans: Plans = Plans()) -> None:
    """Prepare, train and evaluate whatever is missing, then write tables, curves and heat maps."""
    parsed = _parser().parse_intermixed_args(words)
    plans = plans.shortened(parsed.steps_share)
    models = [Model(*pair) for pair in itertools.product(parsed.kinds, parsed.widths)]
    try:
        segment = _segment(parsed, plans, models)
    except SettingsError as error:
        sys.exit(str(error))
    seeds, kept = range(1, parsed.seeds + 1), evidence.of(parsed)
    missing = {seed: [one for one in models if run_name(one, seed) not in kept] for seed in seeds}
    if any(missing.values()):
        evidence.begin(parsed.out, evidence.made_by(parsed.config, parsed.settings, plans.stages))
    untrained = {model for each in missing.values() for model in each}
    read = {one for model in untrained for s in plans.of(model.kind) for one, _ in s.shares}
    for documents, count in plans.documents(segment).items():
        if documents in read:
            _documents(parsed.out, documents, count, parsed.workers)
    found: dict[str, list[Report]] = {}
    # Seed by seed, so that a run that is stopped early already has a comparison.
    for seed in seeds:
        answered = commands.each(
            parsed.jobs, functools.partial(_answered, parsed, plans, seed), models
        )
        for model, report in zip(models, answered, strict=True):
            found.setdefault(model.name, []).append(report)
        if missing[seed] or seed == seeds[-1]:
            _write(parsed.out, models, found)


def _parser() -> argparse.ArgumentParser:
    directory = ("out", "directory of documents, data, runs and results")
    parser = commands.parser(__doc__, directory, of="all stages")

    parser.add_argument("--config", type=Path, default=CONFIG, help="recipe of the models")
    parser.add_argument(
        "--kinds",
        type=commands.names(*MEMORY_KINDS),
        default=list(MEMORY_KINDS),
        help="kinds of memory (default: all)",
    )
    some, one = commands.numbers, commands.number
    for name, kind, default, about in (
        ("--widths", some(1), (64, 128), "widths of the models (default 64,128)"),
        ("--pairs", some(1, MOST_PAIRS), PAIRS, "numbers of pairs to ask for (default 4 to 512)"),
        ("--distances", some(0), DISTANCES, "distances in segments (default 0,1,4,16,64)"),
        ("--seeds", one(1), 3, "runs of each model (default 3)"),
        ("--answers", one(1), ANSWERS, "values asked for per cell (default 256)"),
        ("--workers", one(1), 1, "processes making documents"),
    ):
        parser.add_argument(name, type=kind, default=default, help=about)
    commands.add_steps_share(parser)
    commands.add_jobs(parser)
    evidence.add_option(parser)
    return parser


def _segment(parsed: argparse.Namespace, plans: Plans, models: Sequence[Model]) -> int:
    """Tokens per segment. Raises SettingsError with all mistakes in the settings."""
    loaded = [
        configuration.load(parsed.config, _words(parsed, stage, model, 1))
        for model in models
        for stage in plans.of(model.kind)
    ]
    return loaded[0].model.segment


def _words(
    parsed: argparse.Namespace, stage: Stage[Documents], model: Model, seed: int
) -> list[str]:
    """The settings of a stage's run; those of the command line override the recipe's."""
    own = [*stage.settings(parsed.out / "data"), *model.settings(stage.segments)]
    directory = _runs(parsed, model, seed) / stage.name
    return [*own, *parsed.settings, f"run.seed={seed}", f"run.directory={directory}"]


def _runs(parsed: argparse.Namespace, model: Model, seed: int) -> Path:
    directory: Path = parsed.out / "runs" / run_name(model, seed)
    return directory


def run_name(model: Model, seed: int) -> str:
    """The name of a model's runs and report."""
    return f"{model.name}-{seed}"


def _documents(out: Path, one: Documents, count: int, workers: int) -> None:
    """Make a set, as text and as a data set, if it is missing."""
    directory, data = out / "documents" / one.name, out / "data" / one.name
    texts, tokenizer = directory / "mqar.jsonl.gz", directory / "mqar.tokenizer.json"
    if not tokenizer.exists():  # which is written after the texts
        commands.run(
            *("data-prep", "mqar", texts, "--documents", str(count), "--workers", str(workers)),
            *("--pairs", ",".join(map(str, one.pairs)), "--gap", str(one.gap)),
            *("--symbols", str(one.symbols), "--answers", one.answers),
        )
    if not (data / shards.MANIFEST).exists():
        commands.prepare("mqar", directory, data, f"tokenizer.path={tokenizer}")


def _trained(parsed: argparse.Namespace, plans: Plans, model: Model, seed: int) -> Path:
    """Train all stages, each from the weights of the one before it; returns the last run."""
    last: Path | None = None
    for stage in plans.of(model.kind):
        before = [] if last is None else [f"train.start_from={last}"]
        words = [*_words(parsed, stage, model, seed), *before]
        commands.run("pretrain", "train", parsed.config, *words)
        last = _runs(parsed, model, seed) / stage.name
    assert last is not None
    return last


def _answered(parsed: argparse.Namespace, plans: Plans, seed: int, model: Model) -> Report:
    """The model's report; trained and asked if it is missing."""
    asked = Associations(parsed.pairs, parsed.distances, parsed.answers, SEED_ASKED)

    def make() -> Report:
        trained = load(_trained(parsed, plans, model, seed), default_device())
        return mqar.evaluate(trained, asked, to_stderr)

    settings = [*model.settings(plans.of(model.kind)[-1].segments), *parsed.settings]
    made_by = {
        **evidence.made_by(parsed.config, settings, plans.of(model.kind)),
        "asked": asdict(asked),
    }
    return evidence.of(parsed).once(run_name(model, seed), made_by, make)


def _write(out: Path, models: Sequence[Model], found: dict[str, list[Report]]) -> None:
    """Tables, the curve, and a heat map of each model, over the seeds there are."""
    rows = [summary(model, found[model.name]) for model in models if model.name in found]
    for model in models:
        if model.name in found:
            write_figure(out / f"capacity-{model.name}.png", mqar.heat_map(mean(found[model.name])))
    write_figure(out / "capacity.png", curves(rows))
    of = evidence.commits(one["commit"] for one in itertools.chain(*found.values()))
    commands.conclude(out / "capacity", f"{table(rows)}\n{of}\n", {"rows": rows})


def mean(reports: Sequence[Report]) -> Report:
    """A report with the mean accuracies of several seeds."""
    rows = [
        {**first, "accuracy": float(np.mean([row["accuracy"] for row in (first, *others)]))}
        for first, *others in zip(*(report["rows"] for report in reports), strict=True)
    ]
    return {**reports[0], "rows": rows}


def summary(model: Model, reports: Sequence[Report]) -> dict[str, Any]:
    """A model's bytes of state, and its accuracy by number of pairs for each seed.

    The accuracy is the mean over distances of at least a segment, which only a memory bridges. By
    distance, it is that of the fewest pairs.
    """
    first = reports[0]
    far = [distance > 0 for distance in first["distances"]]
    # [seeds, distances, pairs]
    found = np.stack([mqar.accuracies(report) for report in reports])
    return {
        "kind": model.kind,
        "width": model.width,
        "state_bytes": first["state_bytes"],
        "pairs": first["pairs"],
        "accuracies": found[:, far].mean(axis=1).tolist(),
        "distances": first["distances"],
        "by_distance": found[:, :, 0].tolist(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summaries in Markdown: means over seeds, and their range where there are several."""
    first = rows[0]
    return "\n".join(
        [
            *_rows(rows, "accuracies", first["pairs"]),
            "",
            f"Of {first['pairs'][0]} pairs, by distance in segments:",
            "",
            *_rows(rows, "by_distance", first["distances"]),
            "",
        ]
    )


def _rows(rows: Sequence[dict[str, Any]], shares: str, columns: Sequence[int]) -> Iterator[str]:
    """The lines of a table of `shares`, [seeds, columns] in each row, in %."""
    yield f"| memory | width | bytes of state | {' | '.join(map(str, columns))} | seeds |"
    yield f"|---|--:|--:|{'--:|' * len(columns)}--:|"
    for row in rows:
        seeds = 100 * np.array(row[shares])
        cells = [
            f"{each.mean():.0f}"
            + (f" ({each.min():.0f} to {each.max():.0f})" if each.size > 1 else "")
            for each in seeds.T
        ]
        about = f"| {row['kind']} | {row['width']} | {row['state_bytes']:,} "
        yield f"{about}| {' | '.join(cells)} | {len(seeds)} |"


def curves(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy against bytes of state: a panel per number of pairs, a line per kind."""
    pairs = rows[0]["pairs"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    columns = min(4, len(pairs))
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for index, (axes, count) in enumerate(zip(panels, pairs, strict=False)):
        for number, kind in enumerate(kinds):
            own = [row for row in rows if row["kind"] == kind]
            means = [np.mean(row["accuracies"], axis=0)[index] for row in own]
            sizes = [row["state_bytes"] for row in own]
            axes.plot(sizes, means, marker="o", markersize=4, color=f"C{number}", label=kind)
        # Linear up to a KiB: kinds without a memory have no bytes.
        axes.set_xscale("symlog", base=2, linthresh=1024)
        axes.set_xticks([0, 1 << 10, 1 << 15, 1 << 20], ["0", "1 Ki", "32 Ki", "1 Mi"])
        axes.minorticks_off()
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(f"{count} pairs", fontsize=9)
    figure.supxlabel("bytes of state")
    figure.supylabel("mean accuracy beyond a segment")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


if __name__ == "__main__":
    main()
