"""Which of several numbers in a book belongs to a key: from novels to a table.

    python tools/recipes/needles.py NOVELS OUT [--kinds delta] [--seeds 1] [--reports DIR]
        [--jobs 1] [key=value ...]

NOVELS holds novels as configs/data/novels_train.yaml and novels_val.yaml name them. A model of each
kind of memory is trained stage by stage: pairs of words first, then through the memory, then all
symbols, then the wording of the needles, and last needles in the training novels. It is
asked for needles in the validation novels. After an interruption, the same command continues with
what is not finished.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import commands
import evidence
import needle_texts
import passkey
from commands import CONFIGS
from needle_texts import APART, FURTHER, KEYS, PAIRS, SHORT, WHOLE, Facts
from passkey import Model
from stages import Stage, documents_needed, shortened

from data_prep.dataset import shards
from data_prep.dataset.settings import SettingsError
from data_prep.recall import generate
from data_prep.recall.tasks import Haystack
from pretrain.config import root as configuration
from pretrain.config.memory import MEMORY_KINDS
from pretrain.evaluate.questions import Questions
from pretrain.evaluate.results import Report
from pretrain.trained import default_device, load

CONFIG = CONFIGS / "needles_cpu.yaml"
TASKS = ("single", "multikey", "multiquery")
LENGTHS = (1024, 4096, 16384)
SAMPLES = 32
SEED_ASKED = 0  # the training documents have seed 1
BOOKS, BOOKS_ASKED = "novels_train", "novels_val"
_TOKENIZER_CHARACTERS = 8_000_000
_TRAINING_NOVELS = "novels-train-*.jsonl.gz"


@dataclass(frozen=True)
class Prompts(passkey.Documents):
    """A set of prompts of these tasks, hidden in the training books."""

    tasks: tuple[str, ...] = TASKS


Documents = Facts | Prompts

FEW_SYMBOLS = Facts("few_symbols", (PAIRS,), (3, 5, 7), 0, 32, 32, (3,), "pairs")
MEMORY = Facts("memory", (PAIRS,), (4, 8, 14), 150, 32, 32, (3,), "pairs")
MORE = Facts("more", (PAIRS,), (4, 8, 14), 150, groups=128, digits=(3,))
ALL = Facts("all", (PAIRS,), (4, 8, 14), 150, digits=(3,))
DIGITS = Facts("digits", (PAIRS,), (2, 4, 7), 300)
ONE_APART = Facts("one_apart", (PAIRS, APART, APART, APART), (2, 4, 7), 300, digits=(3, 7))
THREE_APART = Facts("three_apart", (APART, *3 * (FURTHER,)), (2, 4, 7), 300, digits=(3, 7))
TWO_WORDS = Facts("two_words", (FURTHER, *3 * (KEYS,)), (2, 4, 7), 300, digits=(3, 7))
WORDED = Facts("worded", (KEYS, SHORT, SHORT, WHOLE), (2, 4, 6), 300, scattered=True)
SCATTERED = Facts("scattered", (SHORT, *3 * (WHOLE,)), (3, 4, 6), 1500, scattered=True)
# Of `data-prep recall`; an answer with four numbers (multiquery) was not learned: docs/trials.md.
NEAR = Prompts("near", 300, 1024, TASKS[:2])
FAR = Prompts("far", 512, 8192, TASKS[:2])

STAGES: tuple[Stage[Documents], ...] = (
    Stage("01_pairs", ((FEW_SYMBOLS, 1.0),), 500, 8, 1, 3e-3, 0.0, 0.5, segment=512),
    Stage("02_memory", ((MEMORY, 1.0),), 1200, 8, 8, 3e-3, 0.0, 0.2, segment=64),
    Stage("03_more", ((MORE, 1.0),), 300, 8, 8, 3e-3, 0.0, segment=64),
    Stage("04_all", ((ALL, 1.0),), 400, 8, 8, 3e-3, 0.0, segment=64),
    Stage("05_digits", ((DIGITS, 1.0),), 400, 8, 8, 3e-3, 0.0, segment=64),
    Stage("06_one_apart", ((ONE_APART, 1.0),), 300, 8, 4, 3e-3, 0.0),
    Stage("07_three_apart", ((THREE_APART, 1.0),), 300, 8, 4, 3e-3, 0.0),
    Stage("08_two_words", ((TWO_WORDS, 1.0),), 400, 8, 4, 3e-3, 0.0),
    Stage("09_worded", ((WORDED, 1.0),), 400, 8, 4, 3e-3, 0.0),
    Stage("10_near", ((SCATTERED, 0.6), (NEAR, 0.4)), 500, 8, 4, 1.5e-3, 0.0),
    Stage(
        *("11_far", ((SCATTERED, 0.3), (NEAR, 0.3), (FAR, 0.4)), 500, 2, 32, 1e-3, 0.0, 0.5),
        weight_decay=0.0,
        preface=BOOKS,
    ),
)


def main(words: Sequence[str] | None = None, plan: Sequence[Stage[Documents]] = STAGES) -> None:
    """Prepare, train and ask whatever is missing, then write the table."""
    parsed = _parser().parse_intermixed_args(words)
    plan = shortened(plan, parsed.steps_share)
    models = [Model(kind, seed) for seed in range(1, parsed.seeds + 1) for kind in parsed.kinds]
    try:
        segment = _segment(parsed, plan, models)
    except SettingsError as error:
        sys.exit(str(error))
    if any(model.name not in evidence.of(parsed) for model in models):
        if not _training_novels(parsed.novels):
            sys.exit(
                f"{parsed.novels}: has no {_TRAINING_NOVELS}; give the directory of the novels"
            )
        evidence.begin(parsed.out, evidence.made_by(parsed.config, parsed.settings, plan))
        prepare(parsed.novels, parsed.out, documents_needed(plan, segment), _questions(parsed))
    reports = commands.each(parsed.jobs, functools.partial(_asked, parsed, plan), models)
    found = {model.name: report for model, report in zip(models, reports, strict=True)}
    of = evidence.commits(report["commit"] for report in reports)
    commands.conclude(parsed.out / "needles", f"{table(found)}\n{of}\n", found)


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser(
        __doc__,
        ("novels", "directory of the novels"),
        ("out", "directory of documents, data, runs and results"),
        of="all stages",
    )
    add = parser.add_argument
    add("--config", type=Path, default=CONFIG, help="recipe of the models")
    kinds = commands.names(*MEMORY_KINDS)
    add("--kinds", type=kinds, default=["delta"], help="kinds of memory (default delta)")
    add("--seeds", type=commands.number(1), default=1, help="models of each kind (default 1)")
    commands.add_steps_share(parser)
    add(
        "--lengths",
        type=commands.numbers(1),
        default=LENGTHS,
        help="prompt lengths to ask at, in tokens (default 1,024, 4,096 and 16,384)",
    )
    add(
        "--samples",
        type=commands.number(1),
        default=SAMPLES,
        help=f"questions per cell (default {SAMPLES})",
    )
    commands.add_jobs(parser)
    evidence.add_option(parser)
    return parser


def _segment(
    parsed: argparse.Namespace, plan: Sequence[Stage[Documents]], models: Sequence[Model]
) -> int:
    """Tokens per segment. Raises SettingsError with all mistakes in the settings."""
    loaded = [
        configuration.load(parsed.config, _words(parsed, stage, model))
        for model in models
        for stage in plan
    ]
    return loaded[-1].model.segment


def _words(parsed: argparse.Namespace, stage: Stage[Documents], model: Model) -> list[str]:
    """The settings of a stage's run; those of the command line override the stage's."""
    own = [*stage.settings(parsed.out / "data"), *model.settings]
    return [*own, *parsed.settings, f"run.directory={_run(parsed, stage, model)}"]


def _run(parsed: argparse.Namespace, stage: Stage[Documents], model: Model) -> Path:
    directory: Path = parsed.out / "runs" / model.name / stage.name
    return directory


def prepare(novels: Path, out: Path, needed: dict[Documents, int], asked: Questions) -> None:
    """Make what is missing of the tokenizer, the books, and so many documents of each set; exits
    where the tokenizer says that lengths are too short for what is asked."""
    tokenizer = out / "tokenizer.model"
    if not tokenizer.exists():
        needle_texts.train_tokenizer(tokenizer, _paragraphs(novels))
    passkey.check_lengths(tokenizer, [asked])
    in_tokens = f"tokenizer.path={tokenizer}"
    for name in (BOOKS, BOOKS_ASKED):
        if not (out / "data" / name / shards.MANIFEST).exists():
            commands.prepare(name, novels, out / "data" / name, in_tokens)
    books = functools.cache(lambda: Haystack.of_books(out / "data" / BOOKS))
    for one, count in needed.items():
        directory, data = out / "documents" / one.name, out / "data" / one.name
        texts = directory / "mqar.jsonl.gz"
        if not texts.exists():
            if isinstance(one, Facts):
                generate.write(texts, count, functools.partial(one.line, books()))
            else:
                _needles(texts, one, count, out / "data" / BOOKS)
        if not (data / shards.MANIFEST).exists():
            commands.prepare("mqar", directory, data, in_tokens)


def _needles(texts: Path, one: Prompts, count: int, books: Path) -> None:
    commands.run(
        *("data-prep", "recall", texts, "--documents", str(count), "--filler", books),
        *("--min-tokens", str(one.low), "--max-tokens", str(one.high)),
        *("--tasks", ",".join(one.tasks)),
    )


def _paragraphs(novels: Path) -> Iterator[str]:
    """The paragraphs of some of the training novels, for the tokenizer."""
    left = _TOKENIZER_CHARACTERS
    for path in _training_novels(novels):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for paragraph in itertools.chain.from_iterable(
                json.loads(line)["text"].split("\n") for line in lines
            ):
                if left <= 0:
                    return
                left -= len(paragraph)
                yield paragraph


def _training_novels(novels: Path) -> list[Path]:
    return sorted(novels.glob(_TRAINING_NOVELS))


def _questions(parsed: argparse.Namespace) -> Questions:
    return Questions(TASKS, parsed.lengths, (None,), parsed.samples, SEED_ASKED)


def _asked(parsed: argparse.Namespace, plan: Sequence[Stage[Documents]], model: Model) -> Report:
    """The model's report; trained and asked if it is missing."""
    asked = _questions(parsed)

    def make() -> Report:
        trained = load(_trained(parsed, plan, model), default_device())
        haystack = Haystack.of_books(parsed.out / "data" / BOOKS_ASKED)
        return passkey.answered(trained, haystack, asked)

    settings = [*model.settings, *parsed.settings]
    made_by = {**evidence.made_by(parsed.config, settings, plan), "asked": asdict(asked)}
    return evidence.of(parsed).once(model.name, made_by, make)


def _trained(parsed: argparse.Namespace, plan: Sequence[Stage[Documents]], model: Model) -> Path:
    """Train all stages, each from the weights of the one before it; returns the last run."""
    last: Path | None = None
    for stage in plan:
        before = [] if last is None else [f"train.start_from={last}"]
        words = [*_words(parsed, stage, model), *before]
        commands.run("pretrain", "train", parsed.config, *words)
        last = _run(parsed, stage, model)
    assert last is not None
    return last


def table(found: dict[str, Report]) -> str:
    """In %, by task and length: answers by RULER's rule, and in brackets tokens that are right."""
    first = next(iter(found.values()))
    lengths = list(dict.fromkeys(row["length"] for row in first["rows"]))
    lines = [
        f"| memory and seed | bytes of state | task | {' | '.join(f'{n:,}' for n in lengths)} |",
        f"|---|--:|---|{'--:|' * len(lengths)}",
    ]
    for name, report in found.items():
        for task in dict.fromkeys(row["task"] for row in report["rows"]):
            rows = [row for row in report["rows"] if row["task"] == task]
            cells = [f"{100 * r['ruler']:.0f} ({100 * r['token_accuracy']:.0f})" for r in rows]
            about = f"| {name} | {report['state_bytes']:,} | {task} "
            lines.append(f"{about}| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
