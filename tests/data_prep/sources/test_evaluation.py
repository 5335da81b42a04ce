"""Every string of an evaluation file is found, however the file is written."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.sources import evaluation

QUESTION = (
    "It\u2019s said that seven ships \u2014 or eight \u2014 passed\nthe lighthouse, and "
    '"he" wrote, 1 & 2.'
)
VALUE = [{"question": QUESTION, "choices": ["one", {"two": "deep"}], "n": 3}, {"question": "x"}]
STRINGS = [QUESTION, "one", "deep", "x"]
LINES = "".join(json.dumps(row) + "\n" for row in VALUE).encode()


@pytest.mark.parametrize(
    ("name", "data", "strings"),
    [
        ("a.json", json.dumps(VALUE).encode(), STRINGS),
        ("a.json", json.dumps(VALUE, indent=2).encode("utf-8-sig"), STRINGS),
        ("a.json", LINES, STRINGS),
        ("a.jsonl", LINES, STRINGS),
        ("a.JSONL", LINES, STRINGS),
        ("a.ndjson", LINES, STRINGS),
        ("a.jsonl.gz", gzip.compress(LINES), STRINGS),
        ("a.jsonl.zst", zstandard.compress(LINES), STRINGS),
        ("a.jsonl", gzip.compress(LINES), STRINGS),
        ("tasks", LINES, STRINGS),
        ("tasks.txt", LINES, STRINGS),
        ("a.txt", QUESTION.encode(), [QUESTION]),
        ("a.txt.gz", gzip.compress(QUESTION.encode()), [QUESTION]),
        ("a.md", b"[1] a note", ["[1] a note"]),
    ],
)
def test_the_strings_of_a_file_are_told_by_what_it_holds(
    name: str, data: bytes, strings: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    assert list(evaluation.texts(tmp_path / name)) == strings
    assert evaluation.problem(tmp_path / name) is None


def test_tables_are_read(tmp_path: Path) -> None:
    for name, separator in (("a.csv", ","), ("a.tsv", "\t"), ("a.CSV", ",")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as out:
            csv.writer(out, delimiter=separator).writerows([["id", "question"], ["1", QUESTION]])
        assert list(evaluation.texts(tmp_path / name)) == ["id", "question", "1", QUESTION]
    table = pa.table({"q": [QUESTION, None], "more": [[{"a": "one"}], []], "n": [1, 2]})
    for name in ("a.parquet", "b"):
        pq.write_table(table, tmp_path / name)
        assert list(evaluation.texts(tmp_path / name)) == [QUESTION, "one"]


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.zip", b"PK\3\4", "it is a zip archive or office document, which is not read here"),
        ("a.jsonl", b'{"a": \n', "a.jsonl: is not UTF-8 jsonl (Expecting value"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], "truncated file"),
        ("a.txt", b"caf\xe9", "can't decode"),
        ("a.parquet", b"PAR1\x15\x04junkPAR1", "is not what can be read as evaluation texts"),
    ],
)
def test_what_cannot_be_read_says_so(name: str, data: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert why in str(evaluation.problem(tmp_path / name))
