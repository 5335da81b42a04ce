"""Documents of recall as a jsonl file of prompts and answers.

A document depends only on the tasks, bounds, filler, tokenizer, seed and its number: the bytes of
the file are the same for any number of workers.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import multiprocessing
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_prep.dataset import durable
from data_prep.dataset.settings import MistakeError, SettingsError
from data_prep.recall import tasks
from data_prep.recall.tasks import Haystack
from data_prep.tokenizer.contract import Tokenizer

_AT_ONCE = 16  # documents that a worker makes at a time
# Batches of these for each worker that are made ahead of the writing, which compresses: all of them
# would be held in memory.
_AHEAD = 2


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

    Raises what `line` and `write_lines` raise.
    """
    global _maker
    _maker = line
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context) as pool:
        try:
            write_lines(path, _in_order(pool, documents, _AHEAD * workers))
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, documents: int, most: int) -> Iterator[bytes]:
    """The lines in order; at most so many batches of _AT_ONCE are made, or wait for their turn."""
    ahead: deque[Future[list[bytes]]] = deque()
    for first in range(0, documents, _AT_ONCE):
        if len(ahead) == most:
            yield from ahead.popleft().result()
        ahead.append(pool.submit(_made, range(first, min(first + _AT_ONCE, documents))))
    while ahead:
        yield from ahead.popleft().result()


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write the lines, whole or not at all; gzip where the name ends in .gz.

    A file that is there and holds others is kept. Raises MistakeError then, OSError where it cannot
    be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    there = _lines(path) if path.exists() else None
    with durable.replacing(path) as out:
        # Without time and name, so that the same documents give the same bytes.
        packed = gzip.GzipFile("", "wb", fileobj=out, mtime=0) if path.suffix == ".gz" else out
        for line in itertools.chain(lines, [b""]):
            if there is not None and next(there, b"") != line:
                raise MistakeError(
                    f"{path} is there and holds something else; give another name, or remove it"
                )
            packed.write(line)
        if packed is not out:
            packed.close()


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, up to where it is damaged."""
    with (
        contextlib.suppress(EOFError, zlib.error, OSError),
        gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file,
    ):
        yield from file


def record(id: str, prompt: str | list[str], answer: str | list[str]) -> bytes:
    """A line of the file."""
    plain = {"id": id, "prompt": prompt, "answer": answer}
    return json.dumps(plain, ensure_ascii=False).encode() + b"\n"


# Forked workers inherit the books in it, which are too long to be sent with every document.
_maker: Callable[[int], bytes] | None = None


def _made(numbers: range) -> list[bytes]:
    assert _maker is not None
    return [_maker(number) for number in numbers]


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
