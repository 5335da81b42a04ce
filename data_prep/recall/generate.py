"""Documents of recall as a jsonl file of prompts and answers.

A document depends only on the tasks, bounds, filler, tokenizer, seed and its number: the bytes of
the file are the same for any number of workers.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_prep.dataset import durable
from data_prep.dataset.settings import SettingsError
from data_prep.recall import tasks
from data_prep.recall.tasks import Haystack
from data_prep.tokenizer.contract import Tokenizer

_AT_ONCE = 16  # documents that a worker makes at a time


@dataclass(frozen=True)
class Wanted:
    """How many documents, of alternating tasks, with prompts of `low` to `high` tokens."""

    tasks: Sequence[str]
    documents: int
    low: int
    high: int
    seed: int


def write(path: Path, documents: int, line: Callable[[int], bytes], workers: int = 1) -> None:
    """Write the `line` of each document in the order of their numbers, from 0.

    gzip where the name ends in .gz. Raises what `line` raises, OSError where it cannot be written.
    """
    global _maker
    _maker = line
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context) as pool:
        write_lines(path, pool.map(_made, range(documents), chunksize=_AT_ONCE))


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write the lines, whole or not at all; gzip where the name ends in .gz. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replacing(path) as out:
        # Without time and name, so that the same documents give the same bytes.
        packed = gzip.GzipFile("", "wb", fileobj=out, mtime=0) if path.suffix == ".gz" else out
        for line in lines:
            packed.write(line)
        if packed is not out:
            packed.close()


def record(id: str, prompt: str | list[str], answer: str | list[str]) -> bytes:
    """A line of the file."""
    plain = {"id": id, "prompt": prompt, "answer": answer}
    return json.dumps(plain, ensure_ascii=False).encode() + b"\n"


# Forked workers inherit the books in it, which are too long to be sent with every document.
_maker: Callable[[int], bytes] | None = None


def _made(number: int) -> bytes:
    assert _maker is not None
    return _maker(number)


def document(wanted: Wanted, haystack: Haystack, model: Tokenizer | None, number: int) -> bytes:
    """The line of the document of this number.

    The prompt is measured in tokens of the model, or in bytes without one. Raises SettingsError
    where the task has no room.
    """

    def least(number: int) -> int:
        task = wanted.tasks[number % len(wanted.tasks)]
        return tasks.least(task, model, seed=seed, number=number)

    task, seed = wanted.tasks[number % len(wanted.tasks)], wanted.seed
    if least(number) > wanted.high:
        most, unit = (
            max(map(least, range(wanted.documents))),
            "bytes" if model is None else "tokens",
        )
        problem = (
            f"--max-tokens: {wanted.high} {unit} are fewer than {task} has without filler; give "
            f"at least {most}, which is enough for every document"
        )
        raise SettingsError([problem])
    length = tasks.length(seed, task, number, wanted.low, wanted.high)
    pair = tasks.document(task, haystack, model, length, seed=seed, number=number)
    return record(f"{task}-{seed}-{number}", pair.prompt, pair.answer)
