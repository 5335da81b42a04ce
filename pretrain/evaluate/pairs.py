"""What an evaluation of summaries reads; free of torch, so that mistakes are reported at once.

A *pair* is a document and its answer, a line of a jsonl file. The *question* is the text between
the two, as in training.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.dataset.parsing import json_value
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import DataError
from data_prep.dataset.wording import counted
from pretrain.config import root as configuration
from pretrain.config.run import CONFIG_FILE
from pretrain.data.files import manifest_of

_BOM = b"\xef\xbb\xbf"
_REPORTED = 10  # lines of a file whose mistakes are reported one by one


@dataclass(frozen=True)
class Pair:
    """A document and the reference answer."""

    id: str
    document: str
    answer: str


@dataclass(frozen=True)
class Fields:
    """Keys of a record's document and answer, and the text between the two."""

    prompt: str
    answer: str
    question: str


def fields(
    path: Path, prompt: str | None, answer: str | None, question: str | None
) -> tuple[Fields, list[str]]:
    """What was given, else what the run at `path` was trained with; and what is missing then.

    The keys are "prompt" and "answer" where neither says otherwise.
    """
    known = _trained_with(path)
    problems = []
    if known is None and question is None:
        problems.append(
            f"--question: not given, and not known from {path}: the data sets of its config.yaml "
            "do not exist, hold no pairs, or differ in their question; give the text between a "
            "document and its answer, which may be empty"
        )
    own = known or Fields("prompt", "answer", "")
    return Fields(
        own.prompt if prompt is None else prompt,
        own.answer if answer is None else answer,
        own.question if question is None else question,
    ), problems


def _trained_with(path: Path) -> Fields | None:
    """The fields of the pairs that a run, or a checkpoint of one, was trained on, if all agree."""
    sources: list[dict[str, Any]] = []
    try:
        resolved = path.resolve()
        run = resolved if (resolved / CONFIG_FILE).is_file() else resolved.parent.parent
        config = configuration.load(run / CONFIG_FILE, [])
        for data in config.data.sources.values():
            sources += manifest_of(data.data).configuration.get("sources", [])
    except (SettingsError, DataError):
        return None
    found = {
        Fields(source["prompt_field"], source["answer_field"], source.get("question", ""))
        for source in sources
        if "prompt_field" in source
    }
    return found.pop() if len(found) == 1 else None


def read(paths: Sequence[Path], fields: Fields) -> tuple[list[Pair], list[str]]:
    """The pairs of jsonl files, plain or gz, in order; and every mistake in them."""
    pairs: list[Pair] = []
    seen: set[str] = set()
    problems = []
    for path in paths:
        place = os.path.realpath(path)
        if place in seen:
            problems.append(f"{path}: is given twice, and each pair is to count once; leave it out")
            continue
        seen.add(place)
        wrong = []
        try:
            if packed := _packed(path):
                problems.append(f"{path}: is {packed}; expected JSON lines, plain or named .gz")
                continue
            for number, line in enumerate(_lines(path), 1):
                text = line.removeprefix(_BOM) if number == 1 else line
                pair = _pair(text, fields, f"{path.name}:{number}")
                if isinstance(pair, Pair):
                    pairs.append(pair)
                else:
                    wrong.append(f"{path}: line {number}: {pair}")
        except OSError as error:
            wrong.append(f"{path}: cannot be read ({error.strerror or error})")
        except (EOFError, zlib.error) as error:
            wrong.append(f"{path}: is a damaged gz file ({error})")
        more = len(wrong) - _REPORTED
        problems += [
            *wrong[:_REPORTED],
            *([f"{path}: and {counted(more, 'more line')}"] if more > 0 else []),
        ]
    if not pairs and not problems:
        problems.append(f"{', '.join(map(str, paths))}: holds no pair; expected one a line")
    return pairs, problems


def _packed(path: Path) -> str:
    """What a file is that is compressed, and by its name is not; empty: it is none of these."""
    with path.open("rb") as file:
        head = file.read(4)
    kinds = {b"\x1f\x8b": "gzip data", b"\x28\xb5\x2f\xfd": "zstd data", b"BZh": "bzip2 data"}
    found = next((kind for magic, kind in kinds.items() if head.startswith(magic)), "")
    return "" if (found, path.suffix) == ("gzip data", ".gz") else found


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        yield from file


def _pair(line: bytes, fields: Fields, place: str) -> Pair | str:
    """The pair of a line, or what is wrong with it."""
    try:
        record = json_value(line.decode())
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start + 1})"
    except ValueError as error:
        return f"is not JSON ({error})"
    if not isinstance(record, dict):
        return f"is a {type(record).__name__}, expected an object"
    for key in (fields.prompt, fields.answer):
        if isinstance(record.get(key), list):
            return f"has a list under {key!r}; expected a document and its one answer"
        if not isinstance(record.get(key), str) or not record[key].strip():
            return f"has no text under {key!r}; it has {', '.join(map(repr, record)) or 'no key'}"
        try:
            record[key].encode()
        except UnicodeEncodeError:
            return f"has a lone surrogate under {key!r}"
    return Pair(str(record.get("id", place)), record[fields.prompt], record[fields.answer])
