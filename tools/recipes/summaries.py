"""The paper's Table 4 and Figure 4 on pairs made of novels: from raw text to table and plot.

    python tools/recipes/summaries.py CORPUS OUT [key=value ...]

CORPUS holds novels as configs/data/novels_train.yaml and novels_val.yaml name them. A language
model is trained on them, and then on passages with the names that they have most often (data-prep
pairs). It is asked for the names in passages of validation books and, by the share that is given,
in whole ones. Beside it stand the same model before it saw any pair, the names that most passages
of training have, whatever is asked, and the first words of the passage.

What is finished is not done again: the same command continues.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import commands

from data_prep.dataset import durable
from pretrain.evaluate import rouge

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
PASSAGES = {"train": 26_000, "passages": 200}
NAMES = 5
ASKED = ("--max-tokens", "64")
SHARES = "0.1,0.25,0.5,1"


def main(words: Sequence[str] | None = None) -> None:
    """Prepare, train and evaluate what is not there yet, then write the table."""
    parsed = _parser().parse_intermixed_args(words)
    out: Path = parsed.out
    _prepare(parsed.corpus, out)
    base, tuned = out / "runs" / "base", out / "runs" / "tuned"
    data = out / "data"
    commands.run(
        *("pretrain", "train", CONFIGS / "language_modelling_cpu.yaml"),
        *(f"data.train={data / 'novels_train'}", f"run.directory={base}", *parsed.settings),
    )
    commands.run(
        *("pretrain", "train", CONFIGS / "summaries_cpu.yaml"),
        *(f"data.train={data / 'pairs_train'}", f"run.directory={tuned}"),
        *(f"train.start_from={base}", *parsed.settings),
    )
    question = ("--question", "\n\nNames:")
    before = _evaluated(base, out / "pairs" / "passages.jsonl", *question)
    after = _evaluated(tuned, out / "pairs" / "passages.jsonl")
    books = _evaluated(tuned, out / "pairs" / "books.jsonl", "--shares", SHARES)
    text = table(before, after, frequent(out / "pairs"), books)
    durable.write_bytes(out / "summaries.md", text.encode())
    print(text)


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser(
        __doc__,
        ("corpus", "directory of the novels"),
        ("out", "directory of data, pairs, runs and the table"),
    )
    parser.add_argument("settings", nargs="*", help="key=value for both runs")
    return parser


def _prepare(corpus: Path, out: Path) -> None:
    data, pairs = out / "data", out / "pairs"
    train, validation = data / "novels_train", data / "novels_val"
    model = f"tokenizer.path={train / 'tokenizer.model'}"
    recipes = CONFIGS / "data"
    commands.run(
        "data-prep", "run", recipes / "novels_train.yaml", f"root={corpus}", f"output={train}"
    )
    commands.run(
        *("data-prep", "run", recipes / "novels_val.yaml"),
        *(f"root={corpus}", f"output={validation}", model),
    )
    names = ("--names", str(NAMES))
    commands.run(
        *("data-prep", "pairs", pairs / "train.jsonl.gz", "--books", train, *names),
        *("--passages", str(PASSAGES["train"]), "--min-tokens", "32", "--max-tokens", "256"),
    )
    commands.run(
        *("data-prep", "pairs", pairs / "passages.jsonl", "--books", validation, *names),
        *("--passages", str(PASSAGES["passages"]), "--min-tokens", "256", "--max-tokens", "256"),
    )
    commands.run("data-prep", "pairs", pairs / "books.jsonl", "--books", validation, *names)
    commands.run(
        *("data-prep", "run", recipes / "pairs_train.yaml"),
        *(f"root={pairs}", f"output={data / 'pairs_train'}", model),
    )


def _evaluated(run: Path, pairs: Path, *words: str) -> dict[str, Any]:
    """The run's report of the pairs, made unless it lies there."""
    if not list(run.glob(f"summaries-*-{pairs.stem}.json")):
        commands.run("pretrain", "eval", "summaries", run, pairs, *ASKED, *words)
    (path,) = run.glob(f"summaries-*-{pairs.stem}.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def frequent(pairs: Path) -> dict[str, Any]:
    """Rouge of one answer to all passages: the names that most answers of training have."""
    with gzip.open(pairs / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in file]
    counted = Counter(name for answer in answers for name in answer.strip().split(", "))
    said = ", ".join(name for name, _ in counted.most_common(NAMES))
    asked = (pairs / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    references = [json.loads(line)["answer"] for line in asked]
    scores = rouge.scores(references, [said] * len(references))
    return {"said": said, "rouge": rouge.means(scores)}


def table(
    before: dict[str, Any], after: dict[str, Any], constant: dict[str, Any], books: dict[str, Any]
) -> str:
    """Both evaluations in Markdown."""
    heading = ["R-1 | R-2 | R-L | Overall |", "|---|---|---|---|---|"]
    rows = {
        f"the first {after['lead']['words']} words": after["lead"]["rouge"],
        f"the same for all: {constant['said']}": constant["rouge"],
        "before any pair was seen": before["rows"][0]["rouge"],
        f"after {after['step']} steps on pairs": after["rows"][0]["rouge"],
    }
    read = after["rows"][0]["read"]
    lines = [
        f"{after['documents']} passages of {read:,.0f} tokens on the average, of validation books",
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
