"""Passkey retrieval at lengths that nobody trained on (Table 3), from nothing to tables and maps.

    python tools/recipes/passkey.py OUT [--kinds linear,delta] [--corpus NOVELS] [key=value ...]

Makes documents and a tokenizer, trains a model of each kind of memory stage by stage, asks it for
passkeys at every length and depth, and draws a heat map. The same command continues after an
interruption: what is finished is not done again. Other settings are another OUT.

`--corpus` has novels as configs/data/novels_train.yaml and novels_val.yaml name them: from the
weights of each model another is then trained on needles in the first, and asked for all tasks of
`pretrain eval needles` in the second.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import commands
from commands import CONFIGS

from data_prep.dataset import durable, shards
from data_prep.dataset.settings import SettingsError
from data_prep.recall.passkey import FILLER
from data_prep.recall.tasks import PASSKEY, TASKS, Haystack
from data_prep.tokenizer.tokenizer import load as load_tokenizer
from pretrain import config as configuration
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
TIMES = 2  # that a document is read, on average
_LEAST = 16  # documents of a set, one a shard
GATES = 20  # their rate, in that of the weights
SEED_ASKED = 0  # the documents that are trained on have 1


@dataclass(frozen=True)
class Documents:
    """A set of documents with prompts of `low` to `high` tokens, their logarithm uniform.

    Other tasks than the passkey are hidden in the books to train on.
    """

    name: str
    low: int
    high: int
    tasks: tuple[str, ...] = (PASSKEY,)

    @property
    def mean(self) -> float:
        """Mean tokens of a prompt."""
        return (self.high - self.low) / math.log(self.high / self.low)


FIRST = Documents("first", 400, 1600)  # in bytes: it trains the tokenizer
_FIRST_COUNT = 1000
SHORT = Documents("short", 70, 160)
MIDDLE = Documents("middle", 96, 512)
LONGER = Documents("longer", 128, 2048)
WINDOW = Documents("window", 256, 8192)
ALL = Documents("all", 96, 8192)
PREFACE = "preface"  # filler alone, a set for passkey documents to begin after
_FAR = 3 * 2**19  # its documents' tokens, half as far again as is asked

NEEDLES = ("single", "multikey", "multivalue", "multiquery")
ONE_NEEDLE = Documents("one_needle", 260, 600, NEEDLES[:1])
NEEDLES_NEAR = Documents("needles_near", 640, 2048, NEEDLES)
NEEDLES_WINDOW = Documents("needles_window", 640, 8192, NEEDLES)
BOOKS, BOOKS_ASKED = "novels_train", "novels_val"


@dataclass(frozen=True)
class Stage:
    """A run of `pretrain train`, from the weights of the stage before it.

    `shares` are the sets with their shares of the tokens; a step has `lanes` windows of `segments`.
    """

    name: str
    shares: tuple[tuple[Documents, float], ...]
    steps: int
    lanes: int
    segments: int
    lr: float
    prompt_weight: float
    decay: float = 0.0
    """The share of the steps, the last ones, in which the rate falls to a tenth."""
    weight_decay: float = 0.1
    preface: str = ""
    """The set that lanes read beside the others, for their documents to begin after: at all
    distances up to its documents' lengths."""

    def settings(self, data: Path) -> list[str]:
        """What sets the stage apart, as `key=value`; `data` holds the sets."""
        mix = [{"data": str(data / one.name), "weight": share} for one, share in self.shares]
        warmup = min(20, self.steps // 2)
        decay = min(round(self.decay * self.steps), self.steps - warmup)
        return [
            f"data.mix={json.dumps(mix)}",
            f"data.lanes={self.lanes}",
            f"data.prompt_weight={self.prompt_weight}",
            f"train.window_segments={self.segments}",
            f"train.steps={self.steps}",
            f"optim.lr={self.lr}",
            f"optim.gate_lr={GATES * self.lr}",
            f"optim.weight_decay={self.weight_decay}",
            f"optim.warmup_steps={warmup}",
            f"optim.decay_steps={decay}",
            *([f"data.preface={data / self.preface}"] if self.preface else []),
        ]


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
# From the last of those.
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


def shortened(plan: Sequence[Stage], share: float) -> list[Stage]:
    """The stages with a share of their steps, at least two."""
    return [replace(stage, steps=max(2, round(share * stage.steps))) for stage in plan]


def documents_needed(plan: Sequence[Stage], segment: int) -> dict[Documents, int]:
    """How many documents of each set there must be for each to be read `TIMES` times."""
    tokens: dict[Documents, float] = {}
    for stage in plan:
        read = stage.steps * stage.lanes * stage.segments * segment
        whole = sum(share for _, share in stage.shares)
        for one, share in stage.shares:
            tokens[one] = tokens.get(one, 0.0) + read * share / whole
    return {one: max(_LEAST, math.ceil(count / one.mean / TIMES)) for one, count in tokens.items()}


def samples_at(length: int, longest: int, fewest: int) -> int:
    """Questions a depth: as many tokens as `fewest` have at the longest length, up to a limit."""
    return max(fewest, min(MOST_SAMPLES, fewest * longest // length))


def passkeys(lengths: Sequence[int], samples: int) -> list[Questions]:
    """What is asked of a model, a part a length: more questions where they are short."""
    return [
        Questions(
            (PASSKEY,), (length,), DEPTHS, samples_at(length, max(lengths), samples), SEED_ASKED
        )
        for length in sorted(lengths)
    ]


def needles(samples: int) -> list[Questions]:
    """The harder tasks, a part each, with all places drawn."""
    tasks = [task for task in TASKS if task != PASSKEY]
    return [Questions((task,), NEEDLE_LENGTHS, (None,), samples, SEED_ASKED) for task in tasks]


def main(
    words: Sequence[str] | None = None,
    plan: Sequence[Stage] = STAGES,
    needle_plan: Sequence[Stage] = NEEDLE_STAGES,
) -> None:
    """Prepare, train and evaluate what is not there yet, then write tables and heat maps."""
    parsed = _parser().parse_intermixed_args(words)
    out: Path = parsed.out
    plan = shortened(plan, parsed.steps_share)
    needle_plan = shortened(needle_plan, parsed.steps_share) if parsed.corpus else []
    try:
        segment = _segment(parsed, [*plan, *needle_plan])
    except SettingsError as error:
        sys.exit(str(error))
    _documents(out, FIRST, _FIRST_COUNT, parsed.workers)
    # Before half an hour of training: a corpus that is not there is reported at once.
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
        type=lambda word: word.split(","),
        default=["linear", "delta"],
        help="of memory, one model each (default linear,delta)",
    )
    parser.add_argument(
        "--steps-share", type=float, default=1.0, help="share of each stage's steps (default 1)"
    )
    parser.add_argument(
        "--lengths",
        type=lambda word: tuple(map(int, word.split(","))),
        default=LENGTHS,
        help="tokens of the prompts asked (default 512 to 1,048,576)",
    )
    parser.add_argument(
        "--samples", type=int, default=4, help="questions a depth, of the longest (default 4)"
    )
    parser.add_argument("--corpus", type=Path, help="novels, to train on needles and ask them too")
    parser.add_argument("--workers", type=int, default=1, help="processes that make documents")
    return parser


def _segment(parsed: argparse.Namespace, plan: Sequence[Stage]) -> int:
    """Tokens of a segment. Raises SettingsError with the mistakes of the settings."""
    loaded = [
        configuration.load(parsed.config, _words(parsed, stage, kind))
        for kind in parsed.kinds
        for stage in plan
    ]
    return loaded[0].model.segment


def _words(parsed: argparse.Namespace, stage: Stage, kind: str) -> list[str]:
    """The settings of a stage's run, those given after the stage's own."""
    directory = parsed.out / "runs" / kind / stage.name
    own = [*stage.settings(parsed.out / "data"), f"model.memory.kind={kind}"]
    return [*own, *parsed.settings, f"run.directory={directory}"]


def _documents(out: Path, one: Documents, count: int, workers: int) -> None:
    """A set as text and as a data set, in tokens of the first set's tokenizer."""
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
    """Filler alone as a data set: a document of about so many tokens for each lane."""
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
    """A data set, made unless it is there."""
    if not (data / shards.MANIFEST).exists():
        commands.prepare(recipe, root, data, *settings)


def _trained(
    parsed: argparse.Namespace,
    plan: Sequence[Stage],
    kind: str,
    needed: dict[Documents, int],
    run: Path | None = None,
) -> Path:
    """The run of the last stage, after all of them.

    A stage begins with the weights before it, the first with those of `run` if there is one.
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
    """One report of all parts; what was asked before, the run has the answers of."""
    trained = load(run, default_device())
    reports = []
    for asked in parts:
        what = "-".join(map(str, (*asked.tasks, *asked.lengths, asked.samples)))
        path = run / "asked" / f"{trained.step}-{what}.json"
        reports.append(commands.once(path, functools.partial(_asked, trained, haystack, asked)))
    return {**reports[0], "rows": [row for report in reports for row in report["rows"]]}


def _asked(trained: Trained, haystack: Haystack, asked: Questions) -> Report:
    """The report; its rows with the `seconds` that it took and `resident_bytes`, the most that the
    process ever held up to its end."""
    began = time.perf_counter()
    report = recall.evaluate(trained, haystack, asked, to_stderr)
    # Linux counts it in KiB.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for row in report["rows"]:
        row |= {"seconds": time.perf_counter() - began, "resident_bytes": resident}
    return report


def table(kind: str, rows: Sequence[dict[str, Any]]) -> str:
    """Rows by task and length in Markdown; a column a depth, where there are any."""
    lines: list[str] = []
    for depths, found in _by_depths(rows):
        names = ["drawn" if depth is None else f"{depth:.0%}" for depth in depths]
        lines += [
            f"| memory {kind} | tokens | {' | '.join(names)} | samples | seconds | resident MiB |",
            f"|---|--:|{'--:|' * (len(names) + 3)}",
        ]
        for cells in found:
            shares = [f"{100 * c['token_accuracy']:.0f} ({100 * c['exact']:.0f})" for c in cells]
            first = cells[0]
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
    """(depths, the cells of each task and length), those of the same depths together."""
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["task"], row["length"]), []).append(row)
    tables: dict[tuple[float | None, ...], list[list[dict[str, Any]]]] = {}
    for cells in lines.values():
        tables.setdefault(tuple(cell["depth"] for cell in cells), []).append(cells)
    return [(list(depths), found) for depths, found in tables.items()]


if __name__ == "__main__":
    main()
