"""The texts of evaluation files, which training data must not share: every string in any field,
and the keys of an object that holds numbers alone.

They come by record, since a question and its answer may be found one behind the other.
"""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.dataset.parsing import json_value
from data_prep.sources import compression, contents
from data_prep.sources.compression import Compression, DamageError

_TABLES = {".csv": ",", ".tsv": "\t"}
_JSON = {".json", ".jsonl", ".ndjson"}
_PACKED: dict[str, Compression] = {"gzip data": "gzip", "zstd data": "zstd"}


def records(path: Path) -> Iterator[list[str]]:
    """The strings of each record of JSON, JSON lines, parquet, CSV and TSV.

    Another file is one text. JSON is recognised by its content, so that no escape is taken for
    text. Raises OSError, and ValueError where the file cannot be read as what it is.
    """
    with path.open("rb") as raw:
        head = raw.read(contents.HEAD_BYTES)
        raw.seek(0)
        kind = contents.binary(head)
        if kind == "a parquet table":
            yield from _of_parquet(path)
            return
        data = _data(raw, _PACKED.get(kind))
    if other := contents.binary(data[: contents.HEAD_BYTES]):
        raise ValueError(f"it is {other}, which is not read here")
    text = data.decode("utf-8-sig")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if text.lstrip()[:1] in ("{", "[") or _JSON & set(suffixes):
        yield from _of_json(text, is_sure=bool(_JSON & set(suffixes)))
    elif separators := [_TABLES[suffix] for suffix in suffixes if suffix in _TABLES]:
        yield from _of_table(text, separators[0])
    else:
        yield [text]


def problem(path: Path) -> str | None:
    """Why the evaluation file cannot be read; None if it can."""
    try:
        deque(records(path), maxlen=0)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror or error})"
    except (ValueError, DamageError, csv.Error, RecursionError) as error:
        is_json = bool(_JSON & {suffix.lower() for suffix in path.suffixes})
        what = f"UTF-8 {path.suffix[1:]}" if is_json else "what can be read as evaluation texts"
        return f"{path}: is not {what} ({error})"
    return None


def _data(raw: BinaryIO, kind: Compression) -> bytes:
    return b"".join(compression.blocks(raw, kind))


def _of_table(text: str, separator: str) -> Iterator[list[str]]:
    """The rows; a TSV has quotes around cells, or takes them for text, as its columns tell.

    Where the comma is the decimal point, semicolons stand between the cells of a CSV.
    """
    first = text.partition("\n")[0]
    if separator == "," and ";" in first and "," not in first:
        separator = ";"
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))

    def rows(quoting: Literal[0, 3]) -> list[list[str]]:
        lines = io.StringIO(text, newline="")
        return list(csv.reader(lines, delimiter=separator, quoting=quoting, strict=True))

    if separator != "\t":
        yield from rows(csv.QUOTE_MINIMAL)
        return
    plain = rows(csv.QUOTE_NONE)
    columns = {len(row) for row in plain if row}
    if len(columns) > 1 or columns == {1}:
        # A cell with line ends, or one column of such cells.
        with suppress(csv.Error):
            plain = rows(csv.QUOTE_MINIMAL)
    yield from plain


def _of_json(text: str, *, is_sure: bool) -> Iterator[list[str]]:
    """Of one JSON value, each item of a list, row of a table or the value, else one a line.

    The text if it is no JSON.
    """
    try:
        value = json_value(text)
        values = value if isinstance(value, list) else _rows(value)
    except ValueError:
        try:
            values = [json_value(line) for line in text.split("\n") if line.strip()]
        except ValueError:
            if is_sure:
                raise
            yield [text]
            return
    yield from (list(_texts(value)) for value in values)


def _rows(value: Any) -> list[Any]:
    """The rows of a table that is written by columns, as by pandas or datasets; else the value.

    A column is a list of its cells, or an object of them by the numbers of the rows.
    """
    columns = list(value.values()) if isinstance(value, dict) else []
    numbered = [column for column in columns if isinstance(column, dict)]
    if numbered == columns and all("".join(column).isdecimal() for column in numbered):
        is_table = len({tuple(column) for column in numbered}) == 1
        columns = [list(column.values()) for column in numbered]
    else:
        is_table = all(isinstance(column, list) for column in columns)
        is_table = is_table and len(set(map(len, columns))) == 1
    if len(columns) < 2 or not is_table:
        return [value]
    return [list(row) for row in zip(*columns, strict=True)]


def _of_parquet(path: Path) -> Iterator[list[str]]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(1024):
            yield from (list(_texts(row)) for row in batch.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None


def _texts(record: Any) -> Iterator[str]:
    """The strings of a record, whose own keys are the names of its fields."""
    for value in record.values() if isinstance(record, dict) else [record]:
        yield from _strings(value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        # Some programs write texts to parquet as bytes; others are images and the like.
        with suppress(UnicodeDecodeError):
            yield value.decode()
    elif isinstance(value, dict) and all(isinstance(one, int | float) for one in value.values()):
        # The answers are keys, of their scores (BIG-bench, TruthfulQA).
        yield from value
    elif isinstance(value, dict | list | tuple):  # a map of parquet has pairs
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
