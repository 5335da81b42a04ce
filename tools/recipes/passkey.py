"""Passkey retrieval far beyond the trained lengths (Table 3), from no data to tables and plots.

    python tools/recipes/passkey.py OUT [--kinds linear,delta] [--seeds 1] [--reports DIR]
        [--jobs 1] [key=value ...]

Makes documents and a tokenizer, trains a model of each kind of memory and seed stage by stage, asks
it for passkeys at every length and depth, and draws a heat map. After an interruption, the same
command continues with what is not finished.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import commands
import evidence
import gates
from commands import CONFIGS
from stages import SEARCHED, Stage, documents_needed, shortened

from data_prep.dataset import durable, shards
from data_prep.dataset.settings import SettingsError
from data_prep.recall.passkey import FILLER
from data_prep.recall.tasks import PASSKEY, Haystack, too_short
from data_prep.tokenizer.tokenizer import load as load_tokenizer
from pretrain.config import root as configuration
from pretrain.config.memory import MEMORY_KINDS
from pretrain.evaluate import recall
from pretrain.evaluate.progress import to_stderr
from pretrain.evaluate.questions import Questions
from pretrain.evaluate.results import Report, write_figure
from pretrain.trained import Trained, default_device, load

CONFIG = CONFIGS / "passkey_cpu.yaml"
# Full attention ends at its window, and windows grow from stage to stage.
KINDS = tuple(kind for kind in MEMORY_KINDS if kind != "full")
LENGTHS = tuple(2**power for power in (9, 11, 13, 15, 17, 18, 19, 20))
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_SAMPLES = 10
SEED_ASKED = 0  # the training documents have seed 1


@dataclass(frozen=True)
class Documents:
    """A set of documents with prompts of `low` to `high` tokens, log-uniform."""

    name: str
    low: int
    high: int

    @property
    def mean(self) -> float:
        """Mean tokens of a prompt."""
        return (self.high - self.low) / math.log(self.high / self.low)


FIRST = Documents("first", 400, 1600)  # in bytes, since the tokenizer is trained on it
_FIRST_COUNT = 1000
SHORT = Documents("short", 70, 160)
MIDDLE = Documents("middle", 96, 512)
LONGER = Documents("longer", 128, 2048)
WINDOW = Documents("window", 256, 8192)
CLOSE = Documents("close", 96, 512)
ALL = Documents("all", 96, 8192)
PREFACE = "preface"  # a set of filler alone, as preface of the passkey documents
_FAR = 3 * 2**19  # tokens of its longest document: 1.5 times the longest evaluated distance
# Others of a lane, so that one preface window in five is of them: after long prefaces alone, keys
# in short prompts are forgotten.
_CLOSE = (64, 8192)
_CLOSE_COUNT = 240


STAGES = (
    Stage("1_short", ((SHORT, 1.0),), 500, 16, 8, 1e-3, 0.02),
    Stage("2_middle", ((SHORT, 0.25), (MIDDLE, 0.75)), 400, 8, 16, 1e-3, 0.02),
    Stage("3_longer", ((MIDDLE, 0.3), (LONGER, 0.7)), 300, 4, 32, 1e-3, 0.02),
    Stage("4_window", ((MIDDLE, 0.2), (LONGER, 0.3), (WINDOW, 0.5)), 300, 1, 128, 7e-4, 0.02),
    Stage(
        *("5_preface", ((CLOSE, 0.2), (LONGER, 0.4), (WINDOW, 0.4)), 600, 1, 128, 3e-4, 0.0, 0.3),
        weight_decay=0.0,
        preface=PREFACE,
    ),
    Stage(
        *("6_settled", ((CLOSE, 0.2), (ALL, 0.8)), 300, 1, 128, 1e-4, 0.0, 0.5),
        weight_decay=0.0,
        preface=PREFACE,
    ),
)


def samples_at(length: int, longest: int, fewest: int) -> int:
    """Questions per depth: as many tokens as `fewest` have at the longest length, up to a limit."""
    return max(fewest, min(MOST_SAMPLES, fewest * longest // length))


def passkeys(lengths: Sequence[int], samples: int) -> list[Questions]:
    """The passkey questions, one part per length; shorter lengths have more questions."""
    return [
        Questions(
            (PASSKEY,), (length,), DEPTHS, samples_at(length, max(lengths), samples), SEED_ASKED
        )
        for length in sorted(lengths)
    ]


def check_lengths(tokenizer: Path, questions: Sequence[Questions]) -> None:
    """Exits where a length asked at is less than a task's own text has, which training must not
    be needed to find out."""
    model = load_tokenizer(tokenizer)
    short = [
        f"--lengths: {reason}"
        for asked in questions
        for task in asked.tasks
        for reason in too_short(
            *(task, model, asked.lengths),
            seed=asked.seed,
            samples=asked.samples,
            depths=asked.depths,
        )
    ]
    if short:
        sys.exit("\n".join(short))


def main(words: Sequence[str] | None = None, plan: Sequence[Stage[Documents]] = STAGES) -> None:
    """Prepare, train and evaluate whatever is missing, then write tables and heat maps."""
    parsed = _parser().parse_intermixed_args(words)
    out: Path = parsed.out
    plan = shortened(plan, parsed.steps_share)
    try:
        segment = _segment(parsed, plan)
    except SettingsError as error:
        sys.exit(str(error))
    seeds = range(1, parsed.seeds + 1)
    models = [Model(kind, seed) for seed in seeds for kind in parsed.kinds]
    work = _Work(parsed, plan, segment)
    if any(not work.has(model) for model in models):
        work.prepare()
    reports = commands.each(parsed.jobs, work.report, models)
    found = {model.name: report for model, report in zip(models, reports, strict=True)}
    for name, report in found.items():
        write_figure(out / f"passkey-{name}.png", recall.heat_map(report))
    tables = [table(name, report["rows"]) for name, report in found.items()]
    of = evidence.commits(report["commit"] for report in found.values())
    text = "\n".join([overview(found), *tables, of, ""])
    commands.conclude(out / "passkey", text, found)


def _parser() -> argparse.ArgumentParser:
    directory = ("out", "directory of documents, data, runs and results")
    parser = commands.parser(__doc__, directory, of="all stages")
    parser.add_argument("--config", type=Path, default=CONFIG, help="recipe of the models")
    parser.add_argument(
        "--kinds",
        type=commands.names(*KINDS),
        default=["linear", "delta"],
        help="kinds of memory (default linear,delta)",
    )
    parser.add_argument(
        "--seeds", type=commands.number(1), default=1, help="models of each kind (default 1)"
    )
    commands.add_steps_share(parser)
    parser.add_argument(
        "--lengths",
        type=commands.numbers(1),
        default=LENGTHS,
        help="prompt lengths to evaluate, in tokens (default 512 to 1,048,576)",
    )
    parser.add_argument(
        "--samples",
        type=commands.number(1),
        default=4,
        help="questions per depth at the longest (default 4)",
    )
    commands.add_jobs(parser)
    evidence.add_option(parser)
    parser.add_argument(
        "--workers", type=commands.number(1), default=1, help="processes making documents"
    )
    return parser


def _segment(parsed: argparse.Namespace, plan: Sequence[Stage[Documents]]) -> int:
    """Tokens per segment. Raises SettingsError with all mistakes in the settings."""
    loaded = [
        configuration.load(parsed.config, _words(parsed, stage, model))
        for model in (Model(kind, 1) for kind in parsed.kinds)
        for stage in model.stages(plan)
    ]
    return loaded[0].model.segment


def _words(parsed: argparse.Namespace, stage: Stage[Documents], model: Model) -> list[str]:
    """The settings of a stage's run; those of the command line override the stage's."""
    own = [*stage.settings(parsed.out / "data"), *model.settings]
    return [*own, *parsed.settings, f"run.directory={_run(parsed, stage, model)}"]


def _run(parsed: argparse.Namespace, stage: Stage[Documents], model: Model) -> Path:
    directory: Path = parsed.out / "runs" / model.name / stage.name
    return directory


def _documents(out: Path, one: Documents, count: int, workers: int) -> None:
    """Make a set, as text and as a data set, with the tokenizer of the first set."""
    directory, data = out / "documents" / one.name, out / "data" / one.name
    texts = directory / "passkey.jsonl.gz"
    known = ("--tokenizer", _tokenizer(out)) if one != FIRST else ()
    if not texts.exists():
        commands.run(
            *("data-prep", "recall", texts, "--documents", str(count), "--workers", str(workers)),
            *("--min-tokens", str(one.low), "--max-tokens", str(one.high)),
            *("--tasks", PASSKEY, *known),
        )
    _prepared("passkey_cpu", directory, data, *([] if one == FIRST else [_in_tokens_of(out)]))


def _preface(out: Path, lanes: int) -> None:
    """Make a data set of filler alone: for each lane a long document, and many short ones."""
    directory, data = out / "documents" / PREFACE, out / "data" / PREFACE
    texts, tokenizer = directory / "preface.jsonl", _tokenizer(out)
    if not texts.exists():
        pieces = FILLER.split()
        # Pieces a token.
        share = len(pieces) / len(load_tokenizer(tokenizer).encode(f" {FILLER}"))
        lines = []
        for number, tokens in enumerate(preface_lengths() * lanes):
            text = " ".join(itertools.islice(itertools.cycle(pieces), round(tokens * share)))
            lines.append(json.dumps({"id": number, "text": text}) + "\n")
        directory.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(texts, "".join(lines).encode())
    _prepared("my_texts", directory, data, f"shards.count={lanes}", _in_tokens_of(out))


def preface_lengths() -> list[int]:
    """Tokens of each document of filler that a lane reads: the longest, then short ones whose
    lengths are spread evenly over their logarithms."""
    low, high = _CLOSE
    steps = (number / (_CLOSE_COUNT - 1) for number in range(_CLOSE_COUNT))
    return [_FAR, *(round(low * (high / low) ** step) for step in steps)]


def _tokenizer(out: Path) -> Path:
    return out / "data" / FIRST.name / "tokenizer.model"


def _in_tokens_of(out: Path) -> str:
    return f"tokenizer.path={_tokenizer(out)}"


def _prepared(recipe: str, root: Path, data: Path, *settings: str) -> None:
    """Make a data set if it is missing."""
    if not (data / shards.MANIFEST).exists():
        commands.prepare(recipe, root, data, *settings)


@dataclass(frozen=True)
class Model:
    """A kind of memory and a seed."""

    kind: str
    seed: int

    @property
    def name(self) -> str:
        """Of its runs, reports and plot."""
        return f"{self.kind}-{self.seed}"

    @property
    def settings(self) -> list[str]:
        """As `key=value`."""
        own = {
            "memorizing": SEARCHED,
            # As many as RMT. Of the published 50, a segment of 64 tokens would read 800.
            "autocompressor": ("model.memory.autocompressor.vectors=10",),
        }
        kind = f"model.memory.kind={self.kind}"
        return [kind, f"run.seed={self.seed}", *own.get(self.kind, ())]

    def stages(self, plan: Sequence[Stage[Documents]]) -> list[Stage[Documents]]:
        """Those of the plan, without a preface where there is no memory to read it into."""
        if MEMORY_KINDS[self.kind].remembers:
            return [*plan]
        return [replace(stage, preface="") for stage in plan]


def _report_name(model: Model, asked: Questions) -> str:
    parts = (*asked.tasks, *asked.lengths, asked.samples)
    return f"{model.name}/{'-'.join(map(str, parts))}"


@dataclass(frozen=True)
class _Work:
    """What the command line asks for: documents, trainings and reports."""

    parsed: argparse.Namespace
    plan: Sequence[Stage[Documents]]
    segment: int

    @property
    def asked(self) -> list[Questions]:
        """What each report answers."""
        return passkeys(self.parsed.lengths, self.parsed.samples)

    def has(self, model: Model) -> bool:
        """Whether all reports of the model are there."""
        return all(_report_name(model, asked) in evidence.of(self.parsed) for asked in self.asked)

    def prepare(self) -> None:
        """Make the documents and data sets of all stages, the tokenizer with the first."""
        out, workers = self.parsed.out, self.parsed.workers
        settings = self.parsed.settings
        evidence.begin(out, evidence.made_by(self.parsed.config, settings, self.plan))
        _documents(out, FIRST, _FIRST_COUNT, workers)
        check_lengths(_tokenizer(out), self.asked)
        for one, count in documents_needed(self.plan, self.segment).items():
            _documents(out, one, count, workers)
        for stage in self.plan:
            if stage.preface == PREFACE:
                _preface(out, stage.lanes)

    def report(self, model: Model) -> Report:
        """One report of all lengths; what is missing of it is trained and asked for."""
        learned = functools.cache(lambda: self._trained(model))
        settings = [*model.settings, *self.parsed.settings]
        of_training = evidence.made_by(self.parsed.config, settings, model.stages(self.plan))
        reports = []
        for asked in self.asked:
            made_by = {**of_training, "asked": asdict(asked)}
            make = functools.partial(self._answered, learned, asked)
            name = _report_name(model, asked)
            reports.append(evidence.of(self.parsed).once(name, made_by, make))
        rows = [row for report in reports for row in report["rows"]]
        commits = ", ".join(sorted({report["commit"] for report in reports}))
        return {**reports[0], "commit": commits, "rows": rows}

    def _answered(self, learned: Callable[[], Trained], asked: Questions) -> Report:
        return answered(learned(), Haystack.repeated(), asked)

    def _trained(self, model: Model) -> Trained:
        """Train the stages, each from the weights of the one before."""
        run: Path | None = None
        for stage in model.stages(self.plan):
            before = [] if run is None else [f"train.start_from={run}"]
            words = [*_words(self.parsed, stage, model), *before]
            commands.run("pretrain", "train", self.parsed.config, *words)
            run = _run(self.parsed, stage, model)
        assert run is not None
        return load(run, default_device())


def answered(trained: Trained, haystack: Haystack, asked: Questions) -> Report:
    """The report with the model's `gates` and its memory's `state_bytes`; its rows with `seconds`,
    the time it took, and `resident_bytes`, the peak of the process so far."""
    began = time.perf_counter()
    report = recall.evaluate(trained, haystack, asked, to_stderr)
    # In KiB on Linux.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for row in report["rows"]:
        row |= {"seconds": time.perf_counter() - began, "resident_bytes": resident}
    state = trained.model.initial_state(1, trained.device)
    size = sum(tensor.nbytes for layer in state for tensor in layer)
    return {**report, "state_bytes": size, "gates": gates.of(trained.model)}


def overview(found: dict[str, Report]) -> str:
    """The passkey's token accuracy in % by model and length in Markdown: the mean over depths, and
    in brackets that of the worst depth."""
    shares: dict[str, dict[int, list[float]]] = {}
    for name, report in found.items():
        for row in report["rows"]:
            by_length = shares.setdefault(name, {}).setdefault(row["length"], [])
            by_length.append(100 * row["token_accuracy"])
    lengths = [f"{length:,}" for length in next(iter(shares.values()))]
    lines = [
        f"| memory and seed | bytes of state | {' | '.join(lengths)} |",
        f"|---|--:|{'--:|' * len(lengths)}",
    ]
    for name, found_at in shares.items():
        cells = [f"{sum(each) / len(each):.0f} ({min(each):.0f})" for each in found_at.values()]
        lines.append(f"| {name} | {found[name]['state_bytes']:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def table(kind: str, rows: Sequence[dict[str, Any]]) -> str:
    """Rows of all depths by length in Markdown: token accuracy and exact answers in %."""
    by_length: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_length.setdefault(row["length"], []).append(row)
    depths = [f"{cell['depth']:.0%}" for cell in next(iter(by_length.values()))]
    lines = [
        f"| memory {kind} | tokens | {' | '.join(depths)} | samples | seconds | resident MiB |",
        f"|---|--:|{'--:|' * (len(depths) + 3)}",
    ]
    for length, cells in by_length.items():
        shares = [f"{100 * c['token_accuracy']:.0f} ({100 * c['exact']:.0f})" for c in cells]
        first = cells[0]
        resident = f"{first['resident_bytes'] / 2**20:,.0f}"
        about = f"{first['samples']} | {first['seconds']:.0f} | {resident}"
        lines.append(f"| {first['task']} | {length:,} | {' | '.join(shares)} | {about} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
