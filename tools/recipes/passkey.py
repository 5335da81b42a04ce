"""Passkey retrieval far beyond the trained lengths (Table 3), from no data to tables and plots.

    python tools/recipes/passkey.py OUT [--kinds linear,delta] [--corpus NOVELS] [key=value ...]

Makes documents and a tokenizer, trains a model of each kind of memory stage by stage, asks it for
passkeys at every length and depth, and draws a heat map. After an interruption, the same command
continues with what is not finished. Use a new OUT for other settings.

With `--corpus`, the novels that configs/data/novels_train.yaml and novels_val.yaml name, each model
is then fine-tuned on needles in the training novels and evaluated on all tasks of `pretrain eval
needles` in the validation novels.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import commands
from commands import CONFIGS
from stages import Stage, documents_needed, shortened

from data_prep.dataset import durable, shards
from data_prep.dataset.settings import SettingsError
from data_prep.recall.passkey import FILLER
from data_prep.recall.tasks import PASSKEY, TASKS, Haystack
from data_prep.tokenizer.tokenizer import load as load_tokenizer
from pretrain import config as configuration
from pretrain.config import MEMORY_KINDS
from pretrain.evaluate import recall
from pretrain.evaluate.progress import to_stderr
from pretrain.evaluate.questions import Questions
from pretrain.evaluate.results import Report, write_figure
from pretrain.trained import Trained, default_device, load

CONFIG = CONFIGS / "passkey_cpu.yaml"
LENGTHS = tuple(2**power for power in (9, 11, 13, 15, 17, 18, 19, 20))
NEEDLE_LENGTHS = tuple(2**power for power in (12, 14, 16, 17))
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_SAMPLES = 10
SEED_ASKED = 0  # the training documents have seed 1


@dataclass(frozen=True)
class Documents:
    """A set of documents with prompts of `low` to `high` tokens, log-uniform.

    Tasks other than the passkey are hidden in the training books.
    """

    name: str
    low: int
    high: int
    tasks: tuple[str, ...] = (PASSKEY,)

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
ALL = Documents("all", 96, 8192)
PREFACE = "preface"  # a set of filler alone, as preface of the passkey documents
_FAR = 3 * 2**19  # tokens of its documents: 1.5 times the longest evaluated distance

NEEDLES = ("single", "multikey", "multivalue", "multiquery")
ONE_NEEDLE = Documents("one_needle", 260, 600, NEEDLES[:1])
NEEDLES_NEAR = Documents("needles_near", 640, 2048, NEEDLES)
NEEDLES_WINDOW = Documents("needles_window", 640, 8192, NEEDLES)
BOOKS, BOOKS_ASKED = "novels_train", "novels_val"


STAGES = (
    Stage("1_short", ((SHORT, 1.0),), 500, 16, 8, 1e-3, 0.02),
    Stage("2_middle", ((SHORT, 0.25), (MIDDLE, 0.75)), 400, 8, 16, 1e-3, 0.02),
    Stage("3_longer", ((MIDDLE, 0.3), (LONGER, 0.7)), 300, 4, 32, 1e-3, 0.02),
    Stage("4_window", ((MIDDLE, 0.2), (LONGER, 0.3), (WINDOW, 0.5)), 300, 1, 128, 7e-4, 0.02),
    Stage(
        *("5_preface", ((LONGER, 0.5), (WINDOW, 0.5)), 800, 1, 128, 3e-4, 0.0, 0.3),
        weight_decay=0.0,
        preface=PREFACE,
    ),
    Stage(
        *("6_settled", ((ALL, 1.0),), 400, 1, 128, 1e-4, 0.0, 0.5),
        weight_decay=0.0,
        preface=PREFACE,
    ),
)
# These continue from the last stage above.
NEEDLE_STAGES = (
    Stage("7_books", ((ONE_NEEDLE, 0.8), (NEEDLES_NEAR, 0.2)), 300, 8, 16, 1e-3, 0.02),
    Stage("8_needle", ((ONE_NEEDLE, 1.0),), 200, 16, 10, 1e-3, 0.0),
    Stage("9_needles", ((ONE_NEEDLE, 0.3), (NEEDLES_NEAR, 0.7)), 400, 4, 32, 1e-3, 0.0),
    Stage(
        *("10_far", ((NEEDLES_NEAR, 0.3), (NEEDLES_WINDOW, 0.7)), 400, 1, 128, 3e-4, 0.0, 0.3),
        weight_decay=0.0,
        preface=BOOKS,
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


def needles(samples: int) -> list[Questions]:
    """The harder tasks, one part per task, at random depths."""
    tasks = [task for task in TASKS if task != PASSKEY]
    return [Questions((task,), NEEDLE_LENGTHS, (None,), samples, SEED_ASKED) for task in tasks]


def main(
    words: Sequence[str] | None = None,
    plan: Sequence[Stage[Documents]] = STAGES,
    needle_plan: Sequence[Stage[Documents]] = NEEDLE_STAGES,
) -> None:
    """Prepare, train and evaluate whatever is missing, then write tables and heat maps."""
    parsed = _parser().parse_intermixed_args(words)
    out: Path = parsed.out
    plan = shortened(plan, parsed.steps_share)
    needle_plan = shortened(needle_plan, parsed.steps_share) if parsed.corpus else []
    try:
        segment = _segment(parsed, [*plan, *needle_plan])
    except SettingsError as error:
        sys.exit(str(error))
    _documents(out, FIRST, _FIRST_COUNT, parsed.workers)
    # Before half an hour of training, so that a missing corpus is reported at once.
    for books in (BOOKS, BOOKS_ASKED) if parsed.corpus else ():
        _prepared(books, parsed.corpus, out / "data" / books, _in_tokens_of(out))
    needed = documents_needed([*plan, *needle_plan], segment)
    found: dict[str, Report] = {}
    for kind in parsed.kinds:
        run = _trained(parsed, plan, kind, needed)
        asked = passkeys(parsed.lengths, parsed.samples)
        found[kind] = _answered(run, Haystack.repeated(), asked)
        write_figure(out / f"passkey-{kind}.png", recall.heat_map(found[kind]))
        if parsed.corpus:
            run = _trained(parsed, needle_plan, kind, needed, run)
            haystack = Haystack.of_books(out / "data" / BOOKS_ASKED)
            harder = _answered(run, haystack, needles(parsed.samples))
            found[kind]["rows"] += harder["rows"]
    text = "\n".join(table(kind, report["rows"]) for kind, report in found.items())
    commands.conclude(out / "passkey", text, found)


def _parser() -> argparse.ArgumentParser:
    directory = ("out", "directory of documents, data, runs and results")
    parser = commands.parser(__doc__, directory, of="all stages")
    parser.add_argument("--config", type=Path, default=CONFIG, help="recipe of the models")
    parser.add_argument(
        "--kinds",
        type=commands.names(*MEMORY_KINDS),
        default=["linear", "delta"],
        help="kinds of memory, one model each (default linear,delta)",
    )
    parser.add_argument(
        "--steps-share", type=float, default=1.0, help="share of each stage's steps (default 1)"
    )
    parser.add_argument(
        "--lengths",
        type=commands.numbers,
        default=LENGTHS,
        help="prompt lengths to evaluate, in tokens (default 512 to 1,048,576)",
    )
    parser.add_argument(
        "--samples", type=int, default=4, help="questions per depth at the longest (default 4)"
    )
    parser.add_argument("--corpus", type=Path, help="novels, to also train and evaluate needles")
    parser.add_argument("--workers", type=int, default=1, help="processes making documents")
    return parser


def _segment(parsed: argparse.Namespace, plan: Sequence[Stage[Documents]]) -> int:
    """Tokens per segment. Raises SettingsError with all mistakes in the settings."""
    loaded = [
        configuration.load(parsed.config, _words(parsed, stage, kind))
        for kind in parsed.kinds
        for stage in plan
    ]
    return loaded[0].model.segment


def _words(parsed: argparse.Namespace, stage: Stage[Documents], kind: str) -> list[str]:
    """The settings of a stage's run; those of the command line override the stage's."""
    directory = parsed.out / "runs" / kind / stage.name
    own = [*stage.settings(parsed.out / "data"), f"model.memory.kind={kind}"]
    return [*own, *parsed.settings, f"run.directory={directory}"]


def _documents(out: Path, one: Documents, count: int, workers: int) -> None:
    """Make a set, as text and as a data set, with the tokenizer of the first set."""
    directory, data = out / "documents" / one.name, out / "data" / one.name
    texts, tokenizer = directory / "passkey.jsonl.gz", _tokenizer(out)
    hidden_in: tuple[str | Path, ...] = ("--tokenizer", tokenizer)
    if one == FIRST:
        hidden_in = ()
    elif one.tasks != (PASSKEY,):
        hidden_in = ("--filler", out / "data" / BOOKS)
    if not texts.exists():
        commands.run(
            *("data-prep", "recall", texts, "--documents", str(count), "--workers", str(workers)),
            *("--min-tokens", str(one.low), "--max-tokens", str(one.high)),
            *("--tasks", ",".join(one.tasks), *hidden_in),
        )
    _prepared("passkey_cpu", directory, data, *([] if one == FIRST else [_in_tokens_of(out)]))


def _preface(out: Path, tokens: int, lanes: int) -> None:
    """Make a data set of filler alone: one document of about `tokens` tokens per lane."""
    directory, data = out / "documents" / PREFACE, out / "data" / PREFACE
    texts, tokenizer = directory / "preface.jsonl", _tokenizer(out)
    if not texts.exists():
        pieces = FILLER.split()
        repeated = tokens * len(pieces) // len(load_tokenizer(tokenizer).encode(f" {FILLER}"))
        text = " ".join(itertools.islice(itertools.cycle(pieces), repeated))
        lines = [json.dumps({"id": number, "text": text}) + "\n" for number in range(lanes)]
        directory.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(texts, "".join(lines).encode())
    _prepared("my_texts", directory, data, f"shards.count={lanes}", _in_tokens_of(out))


def _tokenizer(out: Path) -> Path:
    return out / "data" / FIRST.name / "tokenizer.model"


def _in_tokens_of(out: Path) -> str:
    return f"tokenizer.path={_tokenizer(out)}"


def _prepared(recipe: str, root: Path, data: Path, *settings: str) -> None:
    """Make a data set if it is missing."""
    if not (data / shards.MANIFEST).exists():
        commands.prepare(recipe, root, data, *settings)


def _trained(
    parsed: argparse.Namespace,
    plan: Sequence[Stage[Documents]],
    kind: str,
    needed: dict[Documents, int],
    run: Path | None = None,
) -> Path:
    """Train all stages; returns the run of the last one.

    Each stage starts from the weights of the previous one, the first from `run` if given.
    """
    for stage in plan:
        for one, _ in stage.shares:
            _documents(parsed.out, one, needed[one], parsed.workers)
        if stage.preface == PREFACE:
            _preface(parsed.out, _FAR, stage.lanes)
        before = [] if run is None else [f"train.start_from={run}"]
        commands.run("pretrain", "train", parsed.config, *_words(parsed, stage, kind), *before)
        run = parsed.out / "runs" / kind / stage.name
    assert run is not None
    return run


def _answered(run: Path, haystack: Haystack, parts: Sequence[Questions]) -> Report:
    """One report of all parts; parts already evaluated are read from the run directory."""
    trained = load(run, default_device())
    reports = []
    for asked in parts:
        what = "-".join(map(str, (*asked.tasks, *asked.lengths, asked.samples)))
        path = run / "asked" / f"{trained.step}-{what}.json"
        reports.append(commands.once(path, functools.partial(_asked, trained, haystack, asked)))
    return {**reports[0], "rows": [row for report in reports for row in report["rows"]]}


def _asked(trained: Trained, haystack: Haystack, asked: Questions) -> Report:
    """The report, its rows with `seconds`, the time it took, and `resident_bytes`, the peak of the
    process so far."""
    began = time.perf_counter()
    report = recall.evaluate(trained, haystack, asked, to_stderr)
    # In KiB on Linux.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for row in report["rows"]:
        row |= {"seconds": time.perf_counter() - began, "resident_bytes": resident}
    return report


def table(kind: str, rows: Sequence[dict[str, Any]]) -> str:
    """Rows by task and length in Markdown, with a column per depth, and RULER's for its tasks."""
    lines: list[str] = []
    for depths, found in _by_depths(rows):
        names = ["drawn" if depth is None else f"{depth:.0%}" for depth in depths]
        names += ["RULER's rule"] if "ruler" in found[0][0] else []
        lines += [
            f"| memory {kind} | tokens | {' | '.join(names)} | samples | seconds | resident MiB |",
            f"|---|--:|{'--:|' * (len(names) + 3)}",
        ]
        for cells in found:
            shares = [f"{100 * c['token_accuracy']:.0f} ({100 * c['exact']:.0f})" for c in cells]
            first = cells[0]
            if "ruler" in first:
                shares.append(f"{100 * sum(cell['ruler'] for cell in cells) / len(cells):.0f}")
            about = f"{first['samples']} | {first['seconds']:.0f}"
            resident = f"{first['resident_bytes'] / 2**20:,.0f}"
            lines.append(
                f"| {first['task']} | {first['length']:,} | {' | '.join(shares)} | {about} "
                f"| {resident} |"
            )
        lines.append("")
    return "\n".join(lines)


def _by_depths(
    rows: Sequence[dict[str, Any]],
) -> list[tuple[list[float | None], list[list[dict[str, Any]]]]]:
    """The rows as cells by task and length, grouped into one table per tuple of depths."""
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["task"], row["length"]), []).append(row)
    tables: dict[tuple[float | None, ...], list[list[dict[str, Any]]]] = {}
    for cells in lines.values():
        tables.setdefault(tuple(cell["depth"] for cell in cells), []).append(cells)
    return [(list(depths), found) for depths, found in tables.items()]


if __name__ == "__main__":
    main()
