"""The paper's Table 4 and Figure 4 on pairs made of novels: from raw text to table and plot.

    python tools/recipes/summaries.py CORPUS OUT [key=value ...]

CORPUS holds novels as configs/data/novels_train.yaml and novels_val.yaml name them. A language
model is trained on them, and then on pairs of a passage and its most frequent names (data-prep
pairs). It is evaluated on passages of validation books, and on whole validation books by the share
of the book it reads. Baselines: the same model before training on pairs, the names most frequent
in the training answers (the same answer for every passage), and the first words of the passage.

After an interruption, the same command continues with what is not finished.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import commands
import evidence
from commands import CONFIGS

from data_prep.dataset.settings import SettingsError
from pretrain.config import root as configuration
from pretrain.evaluate import rouge
from pretrain.evaluate.results import Report

CONFIG = CONFIGS / "summaries_cpu.yaml"
PASSAGES = {"train": 26_000, "passages": 200}
# The model before it sees a pair.
BASE = ("train.start_from=", "train.steps=300", "optim.warmup_steps=30")
NAMES = 5
ASKED = ("--max-tokens", "64")
SHARES = "0.1,0.25,0.5,1"


def main(words: Sequence[str] | None = None) -> None:
    """Prepare, train and evaluate whatever is missing, then write the table."""
    parser = commands.parser(
        __doc__,
        ("corpus", "directory of the novels"),
        ("out", "directory of data, pairs, runs and the table"),
        of="both runs",
    )
    parsed = parser.parse_intermixed_args(words)
    out: Path = parsed.out
    base, tuned = out / "runs" / "base", out / "runs" / "tuned"
    of_base = [*BASE, f"run.directory={base}", *parsed.settings]
    of_tuned = [f"train.start_from={base}", f"run.directory={tuned}", *parsed.settings]
    try:
        for own in (of_base, of_tuned):
            configuration.load(CONFIG, own)
    except SettingsError as error:
        sys.exit(str(error))
    evidence.begin(out, evidence.made_by(CONFIG, parsed.settings))
    novels, pairs = _prepare(parsed.corpus, out)
    commands.run("pretrain", "train", CONFIG, f"data.train={novels}", *of_base)
    commands.run("pretrain", "train", CONFIG, f"data.train={pairs}", *of_tuned)
    question = ("--question", "\n\nNames:")
    before = _evaluated(base, out / "pairs" / "passages.jsonl", *question)
    after = _evaluated(tuned, out / "pairs" / "passages.jsonl")
    books = _evaluated(tuned, out / "pairs" / "books.jsonl", "--shares", SHARES)
    commands.conclude(out / "summaries", table(before, after, frequent(out / "pairs"), books))


def _prepare(corpus: Path, out: Path) -> tuple[Path, Path]:
    """The training sets of novels and of pairs; also writes the pairs for evaluation."""
    train, validation = commands.prepare_both("novels", corpus, out / "data")
    pairs = out / "pairs"
    for name, books, counts in (
        ("train.jsonl.gz", train, (PASSAGES["train"], 32, 256)),
        ("passages.jsonl", validation, (PASSAGES["passages"], 256, 256)),
        ("books.jsonl", validation, ()),
    ):
        options = zip(("--passages", "--min-tokens", "--max-tokens"), counts, strict=False)
        words = ["--names", str(NAMES), *(str(word) for pair in options for word in pair)]
        commands.run("data-prep", "pairs", pairs / name, "--books", books, *words)
    own = f"tokenizer.path={train / 'tokenizer.model'}"
    return train, commands.prepare("pairs_train", pairs, out / "data" / "pairs_train", own)


def _evaluated(run: Path, pairs: Path, *words: str) -> Report:
    """The run's report on the pairs, evaluated if it is missing."""
    if not list(run.glob(f"summaries-*-{pairs.stem}.json")):
        commands.run("pretrain", "eval", "summaries", run, pairs, *ASKED, *words)
    (path,) = run.glob(f"summaries-*-{pairs.stem}.json")
    found: Report = json.loads(path.read_text(encoding="utf-8"))
    return found


def frequent(pairs: Path) -> dict[str, Any]:
    """Rouge of one answer for all passages: the names most frequent in the training answers."""
    with gzip.open(pairs / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in file]
    counted = Counter(name for answer in answers for name in answer.strip().split(", "))
    answer = ", ".join(name for name, _ in counted.most_common(NAMES))
    asked = (pairs / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    references = [json.loads(line)["answer"] for line in asked]
    scores = rouge.scores(references, [answer] * len(references))
    return {"answer": answer, "rouge": rouge.means(scores)}


def table(before: Report, after: Report, constant: dict[str, Any], books: Report) -> str:
    """Both evaluations in Markdown."""
    heading = ["R-1 | R-2 | R-L | Overall |", "|---|---|---|---|---|"]
    rows = {
        f"the first {after['lead']['words']} words": after["lead"]["rouge"],
        f"the same for all: {constant['answer']}": constant["rouge"],
        "before any pair was seen": before["rows"][0]["rouge"],
        f"after {after['step']} steps on pairs": after["rows"][0]["rouge"],
    }
    read = after["rows"][0]["read"]
    lines = [
        f"{after['documents']} passages of {read:,.0f} tokens on average, of validation books",
        "",
        f"| names by | {heading[0]}",
        heading[1],
        *(f"| {name} | {_cells(values)} |" for name, values in rows.items()),
        "",
        f"{books['documents']} whole validation books",
        "",
        f"| share of the book (tokens) | {heading[0]}",
        heading[1],
        *(
            f"| {row['share']:.0%} ({row['read']:,.0f}) | {_cells(row['rouge'])} |"
            for row in books["rows"]
        ),
    ]
    return "\n".join(lines) + "\n"


def _cells(values: dict[str, Any]) -> str:
    cells = []
    for kind in (*rouge.KINDS, "overall"):
        low, high = values[kind]["interval"]
        cells.append(f"{values[kind]['value']:.1f} ({low:.1f} to {high:.1f})")
    return " | ".join(cells)


if __name__ == "__main__":
    main()
