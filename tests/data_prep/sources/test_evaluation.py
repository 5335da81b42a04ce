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
RECORDS = [[QUESTION, "one", "deep"], ["x"]]
LINES = "".join(json.dumps(row) + "\n" for row in VALUE).encode()


@pytest.mark.parametrize(
    ("name", "data", "records"),
    [
        ("a.json", json.dumps(VALUE).encode(), RECORDS),
        ("a.json", json.dumps(VALUE, indent=2).encode("utf-8-sig"), RECORDS),
        ("a.json", LINES, RECORDS),
        ("a.jsonl", LINES, RECORDS),
        ("a.JSONL", LINES, RECORDS),
        ("a.ndjson", LINES, RECORDS),
        ("a.jsonl.gz", gzip.compress(LINES), RECORDS),
        ("a.jsonl.zst", zstandard.compress(LINES), RECORDS),
        ("a.jsonl", gzip.compress(LINES), RECORDS),
        ("tasks", LINES, RECORDS),
        ("tasks.txt", LINES, RECORDS),
        ("a.txt", QUESTION.encode(), [[QUESTION]]),
        ("a.txt.gz", gzip.compress(QUESTION.encode()), [[QUESTION]]),
        ("a.md", b"[1] a note", [["[1] a note"]]),
    ],
)
def test_the_strings_of_a_file_are_told_by_what_it_holds(
    name: str, data: bytes, records: list[list[str]], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    assert list(evaluation.records(tmp_path / name)) == records
    assert evaluation.problem(tmp_path / name) is None


def test_answers_that_are_the_keys_of_their_scores_are_found(tmp_path: Path) -> None:
    rows = [
        {"input": QUESTION, "target_scores": {"the eighth one": 1, "none at all": 0.5}, "n": 3},
        {"question": "x", "mc1_targets": {"it was": True, "it was not": False}, "more": {}},
    ]
    (tmp_path / "task.json").write_text(json.dumps({"name": "ships", "examples": rows}))
    assert list(evaluation.records(tmp_path / "task.json")) == [
        [
            *("ships", QUESTION, "the eighth one", "none at all"),
            *("x", "it was", "it was not"),
        ]
    ]


def test_a_table_that_is_written_by_columns_has_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [[QUESTION, "yes", "no"], ["x", "y"]]
    table = {"question": [QUESTION, "x"], "choices": [["yes", "no"], ["y"]], "n": [1, 2]}
    numbered = {name: dict(enumerate(cells)) for name, cells in table.items()}
    for value in (table, numbered, {**table, "scores": [{"a": 1}, {"b": 0.5}]}):
        path.write_text(json.dumps(value))
        more = [["a"], ["b"]] if "scores" in value else [[], []]
        found = [row + extra for row, extra in zip(rows, more, strict=True)]
        assert list(evaluation.records(path)) == found
    # These are no columns: records by their ids, a single record, parts of another length.
    others = {"id1": {"q": "a", "r": "b"}, "id2": {"q": "c", "r": "d"}}
    for other in (others, {"q": "a", "r": ["b", "c", "d"]}, {"q": ["a"], "r": ["b", "c", "d"]}):
        path.write_text(json.dumps(other))
        assert list(evaluation.records(path)) == [["a", "b", "c", "d"]]
    path.write_text(json.dumps({"q": ["a", "b"]}))
    assert list(evaluation.records(path)) == [["a", "b"]]


def test_tables_are_read(tmp_path: Path) -> None:
    for name, separator in (("a.csv", ","), ("a.tsv", "\t"), ("a.CSV", ",")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as out:
            csv.writer(out, delimiter=separator).writerows([["id", "question"], ["1", QUESTION]])
        rows = [["id", "question"], ["1", QUESTION]]
        assert list(evaluation.records(tmp_path / name)) == rows
    table = pa.table({"q": [QUESTION, None], "more": [[{"a": "one"}], []], "n": [1, 2]})
    for name in ("a.parquet", "b"):
        pq.write_table(table, tmp_path / name)
        assert list(evaluation.records(tmp_path / name)) == [[QUESTION, "one"], []]


def test_strings_of_any_column_of_a_table_are_read(tmp_path: Path) -> None:
    columns = {
        "map": pa.array([[("key", "one"), ("other", None)]], pa.map_(pa.string(), pa.string())),
        # As written without the note that the bytes are text.
        "binary": pa.array([QUESTION.encode()]),
        "image": pa.array([b"\x89PNG\xff"]),
        "repeated": pa.array(["two"]).dictionary_encode(),
        "large": pa.array(["three"], pa.large_string()),
        "deep": pa.array([{"a": [{"b": "four"}]}]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (record,) = evaluation.records(tmp_path / "a.parquet")
    assert record == ["key", "one", "other", QUESTION, "two", "three", "four"]


def test_cells_of_any_length_are_read(tmp_path: Path) -> None:
    long = "word " * 30_000
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_text(f"context{separator}q\n{long}{separator}who?\n")
        assert list(evaluation.records(tmp_path / name)) == [["context", "q"], [long, "who?"]]


def test_cells_of_a_csv_may_be_separated_by_semicolons(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('q;n\n"ships; or, not";1,5\nships, or not;2\n')
    rows = [["q", "n"], ["ships; or, not", "1,5"], ["ships, or not", "2"]]
    assert list(evaluation.records(tmp_path / "a.csv")) == rows
    (tmp_path / "a.csv").write_text("q,n\nships; or not,2\n")
    assert list(evaluation.records(tmp_path / "a.csv")) == [["q", "n"], ["ships; or not", "2"]]


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        ('1\t"Yes" he said\n0\tplain\n', [["1", '"Yes" he said'], ["0", "plain"]]),
        # Quotes around a cell would make one row of these three.
        (
            '1\t"seven ships\n0\tand\n1\tmore"\n',
            [["1", '"seven ships'], ["0", "and"], ["1", 'more"']],
        ),
        ('1\t"seven\nships"\n', [["1", "seven\nships"]]),
        ('"seven\nships"\n"two"\n', [["seven\nships"], ["two"]]),
        ('1\t"Yes" he said\n0\ta\tb\n', [["1", '"Yes" he said'], ["0", "a", "b"]]),
    ],
)
def test_quotes_of_a_tsv_are_around_cells_or_text_as_its_columns_tell(
    data: str, rows: list[list[str]], tmp_path: Path
) -> None:
    (tmp_path / "a.tsv").write_text(data)
    assert list(evaluation.records(tmp_path / "a.tsv")) == rows
    assert evaluation.problem(tmp_path / "a.tsv") is None


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
