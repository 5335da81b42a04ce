"""Speed of data-prep against bare SentencePiece, datatrove and Megatron-LM on the same text.

    python tools/bench/preprocessing.py corpus --megatron ../Megatron-LM --json out.json

The whole pipeline with an existing tokenizer (read, tokenize, shuffle, write, checksum) takes turns
with bare SentencePiece on texts in memory, on the same cores. Three corpora: the `*.jsonl.gz` of a
directory, the standard library's sources, and paragraphs of the first, each a document, about as
short as the texts of conversations. SentencePiece divides long texts among threads
(`ParallelEncode`), and many short ones (`Encode`). datatrove's DocumentTokenizer does
not support SentencePiece models, so it gets a byte-level BPE of the same size and training text.
Megatron-LM is a clone that you provide (core_v0.12.0 runs without a GPU); its time includes process
start-up, so compare it with the command `data-prep run`.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import machine
import sentencepiece
import tokenizers
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.utils.logging import logger

from data_prep import config
from data_prep.pipeline import pipeline
from data_prep.tokenizer import training

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "novels": "sources=[{name: novels, paths: ['*.jsonl.gz']}]",
    "stdlib": "sources=[{name: stdlib, paths: ['{stdlib}/**/*.py'], "
    "exclude: ['{stdlib}/site-packages/**', '{stdlib}/**/test/**', '{stdlib}/**/tests/**']}]",
    "paragraphs": "sources=[{name: paragraphs, paths: ['*.jsonl.gz']}]",
}
_PARAGRAPHS = 20_000
BARE = "SentencePiece"
_CHUNK = 1024
_MB = 1e6

Texts = list[str]


def main() -> None:
    """Measure, print a table, write the JSON."""
    parsed = _parser().parse_args()
    if parsed.megatron and not (parsed.megatron / "tools/preprocess_data.py").is_file():
        sys.exit(f"--megatron: {parsed.megatron} holds no tools/preprocess_data.py; give a clone")
    rows = []
    for name in parsed.corpora:
        with tempfile.TemporaryDirectory(dir=parsed.scratch) as scratch:
            rows += _measure(name, parsed, Path(scratch))
    found = {"machine": _machine(parsed), "rows": rows}
    machine.report(found, _table(found), parsed.json)


def _parser() -> argparse.ArgumentParser:
    parser = machine.parser(__doc__)
    parser.add_argument("corpus", type=Path, help="directory of *.jsonl.gz with a `text` field")
    parser.add_argument(
        "--corpora", nargs="+", choices=SOURCES, default=list(SOURCES), help="default: all"
    )
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--megatron", type=Path, help="a clone of Megatron-LM (default: not measured)"
    )
    parser.add_argument("--scratch", type=Path, help="where outputs are written and removed")
    return parser


def _measure(name: str, parsed: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    root = parsed.corpus
    if name == "paragraphs":
        root = _paragraphs(root, scratch / "paragraphs")
    texts = _texts(name, root)
    model = scratch / "m.model"
    sample = [text[: 20_000_000 // len(texts)] for text in texts]
    training.train(sample, model, parsed.vocab_size)
    size = sum(len(text.encode()) for text in texts)
    contestants: dict[str, Callable[[], object]] = {
        BARE: _bare(name, texts, model, parsed.cores),
        "data-prep": _ours(_words(name, root, parsed, model, scratch / "ours")),
        "data-prep, its start included": _command(name, root, parsed, model, scratch),
        "datatrove": _datatrove(texts, sample, parsed, scratch),
    }
    if parsed.megatron:
        contestants["Megatron-LM"] = _megatron(texts, model, parsed, scratch)
    seconds: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    for _ in range(parsed.rounds):
        for contestant, act in contestants.items():
            for path in (scratch / "ours", scratch / "theirs"):
                shutil.rmtree(path, ignore_errors=True)
            begun = time.perf_counter()
            act()
            seconds[contestant].append(time.perf_counter() - begun)
            print(f"{name}: {contestant}: {seconds[contestant][-1]:.2f} s", file=sys.stderr)
    bare = seconds[BARE]
    return [
        {
            "corpus": name,
            "what": contestant,
            "megabytes": size / _MB,
            "documents": len(texts),
            "seconds": taken,
            "megabytes_per_second": size / _MB / statistics.median(taken),
            # Of runs next to each other in time, so that other load on the machine affects both.
            "of_bare": statistics.median(b / t for b, t in zip(bare, taken, strict=True)),
        }
        for contestant, taken in seconds.items()
    ]


def _paragraphs(corpus: Path, root: Path) -> Path:
    """Write the first paragraphs of the corpus, each a document, and return their directory."""
    found = (
        paragraph
        for text in _texts("novels", corpus)
        for paragraph in re.split(r"\n\s*\n", text)
        if paragraph.strip()
    )
    root.mkdir()
    with gzip.open(root / "paragraphs.jsonl.gz", "wt", encoding="utf-8", newline="\n") as lines:
        for paragraph in itertools.islice(found, _PARAGRAPHS):
            lines.write(json.dumps({"text": paragraph}) + "\n")
    return root


def _texts(name: str, corpus: Path) -> Texts:
    wanted = config.load(None, [f"root={corpus}", "output=unused", SOURCES[name]])
    texts = []
    for file in pipeline.open_work(wanted).files:
        if file.format == "text":
            texts.append(Path(file.path).read_bytes().decode(errors="ignore"))
        else:
            with gzip.open(file.path, "rt", encoding="utf-8", newline="\n") as lines:
                texts += [json.loads(line)["text"] for line in lines]
    return [text for text in texts if text]


def _bare(name: str, texts: Texts, model: Path, cores: int) -> Callable[[], object]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    if name == "paragraphs":
        return lambda: processor.Encode(texts, num_threads=cores, return_type="numpy")

    def encode() -> None:
        for text in texts:
            processor.ParallelEncode(text, chunk_len=_CHUNK, num_threads=cores, return_type="numpy")

    return encode


def _ours(words: list[str]) -> Callable[[], object]:
    return lambda: pipeline.run(config.load(None, words))


def _words(
    name: str, root: Path, parsed: argparse.Namespace, model: Path, output: Path
) -> list[str]:
    words = [f"root={root}", f"output={output}", SOURCES[name]]
    return [
        *words,
        *(f"tokenizer.path={model}", f"workers={parsed.cores}", "shards.tokens=1_000_000"),
    ]


def _command(
    name: str, root: Path, parsed: argparse.Namespace, model: Path, scratch: Path
) -> Callable[[], object]:
    empty = scratch / "empty.yaml"
    empty.touch()
    command: list[str | Path] = [sys.executable, "-m", "data_prep.cli", "run", empty]
    command += _words(name, root, parsed, model, scratch / "ours")
    return lambda: _ran(command, ROOT, "data-prep run")


def _datatrove(
    texts: Texts, sample: Texts, parsed: argparse.Namespace, scratch: Path
) -> Callable[[], object]:
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(sample, vocab_size=parsed.vocab_size, show_progress=False)
    trained.save(str(scratch / "bpe.json"))

    def documents(data: Any, rank: int, world_size: int) -> Iterator[Document]:
        for number in range(rank, len(texts), world_size):
            yield Document(text=texts[number], id=str(number))

    def tokenize() -> None:
        writer = DocumentTokenizer(
            str(scratch / "theirs"), str(scratch / "bpe.json"), batch_size=64, seed=1
        )
        LocalPipelineExecutor(
            [documents, writer],
            tasks=parsed.cores,
            workers=parsed.cores,
            start_method="fork",
            logging_dir=str(scratch / "theirs/logs"),
        ).run()

    # Each of its processes uses a core already, without threads of its own.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logger.disable("datatrove")
    return tokenize


def _megatron(
    texts: Texts, model: Path, parsed: argparse.Namespace, scratch: Path
) -> Callable[[], object]:
    plain = scratch / "plain.jsonl"
    with plain.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    command: list[str | Path] = [sys.executable, "tools/preprocess_data.py"]
    command += ["--input", plain, "--output-prefix", scratch / "theirs/megatron", "--append-eod"]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    command += ["--workers", str(parsed.cores)]

    def preprocess() -> None:
        (scratch / "theirs").mkdir()
        _ran(command, parsed.megatron, "Megatron-LM's preprocess_data.py")

    return preprocess


def _ran(command: list[str | Path], directory: Path, what: str) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr[-2000:]}")


def _machine(parsed: argparse.Namespace) -> dict[str, Any]:
    trees = {"commit": ROOT, **({"megatron": parsed.megatron} if parsed.megatron else {})}
    commits = {
        name: subprocess.run(
            ["git", "-C", tree, "describe", "--always", "--dirty", "--tags"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        for name, tree in trees.items()
    }
    packages = ("sentencepiece", "datatrove", "tokenizers", "webdataset", "numpy")
    return {
        "cores": parsed.cores,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "machine": platform.machine(),
        "vocab_size": parsed.vocab_size,
        **commits,
        **{package: version(package) for package in packages},
    }


def _table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| corpus | what | MB | documents | s, median (least to most) | MB/s | of bare |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        taken = row["seconds"]
        spread = f"{statistics.median(taken):.1f} ({min(taken):.1f} to {max(taken):.1f})"
        lines.append(
            f"| {row['corpus']} | {row['what']} | {row['megabytes']:.1f} | {row['documents']:,} "
            f"| {spread} | {row['megabytes_per_second']:.2f} | {row['of_bare']:.0%} |"
        )
    return lines


if __name__ == "__main__":
    main()
