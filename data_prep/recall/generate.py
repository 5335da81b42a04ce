"""Documents of recall as a jsonl file of prompts and answers.

Each document is a function of the tasks, bounds, filler, tokenizer, seed and its number alone, so
the file's bytes are the same for any number of workers.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_prep.dataset import durable
from data_prep.dataset.settings import SettingsError
from data_prep.recall import tasks
from data_prep.recall.tasks import Haystack
from data_prep.tokenizer.tokenizer import Tokenizer

_AT_ONCE = 16  # documents that a worker makes at a time


@dataclass(frozen=True)
class Wanted:
    """So many documents, of the tasks in turn, with prompts of `low` to `high` tokens."""

    tasks: Sequence[str]
    documents: int
    low: int
    high: int
    seed: int


@dataclass(frozen=True)
class _Maker:
    """Makes a line of the file."""

    wanted: Wanted
    haystack: Haystack
    model: Tokenizer | None

    def line(self, number: int) -> bytes:
        """The document of this number. Raises SettingsError where it has no room."""
        wanted = self.wanted
        task = wanted.tasks[number % len(wanted.tasks)]
        length = tasks.length(wanted.seed, task, number, wanted.low, wanted.high)
        pair = tasks.document(
            task, self.haystack, self.model, length, seed=wanted.seed, number=number
        )
        if pair is None:
            problem = f"--min-tokens: {length} tokens are fewer than {task} has without filler"
            raise SettingsError([problem])
        record = {"id": f"{task}-{wanted.seed}-{number}", **pair._asdict()}
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def write(
    path: Path, wanted: Wanted, haystack: Haystack, model: Tokenizer | None, workers: int = 1
) -> None:
    """Write the documents in the order of their numbers; gzip where the name ends in .gz.

    Prompts are measured in tokens of the model, without one in bytes.
    Raises SettingsError where a task has no room, OSError where it cannot be written.
    """
    global _maker
    _maker = _Maker(wanted, haystack, model)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context) as pool:
        write_lines(path, pool.map(_line, range(wanted.documents), chunksize=_AT_ONCE))


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write the lines, whole or not at all; gzip where the name ends in .gz. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replacing(path) as out:
        # No time and no name in it: the same documents, the same bytes.
        packed = gzip.GzipFile("", "wb", fileobj=out, mtime=0) if path.suffix == ".gz" else out
        for line in lines:
            packed.write(line)
        if packed is not out:
            packed.close()


# Of the forked workers: books are long, and a process inherits them as they are.
_maker: _Maker | None = None


def _line(number: int) -> bytes:
    assert _maker is not None
    return _maker.line(number)
