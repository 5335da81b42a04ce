"""Parquet: rows are documents or rejects, row groups are what can be cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.config import SourceConfig
from data_prep.sources import parquet, readers
from data_prep.sources.documents import RawDocument, Reject
from data_prep.sources.inputs import InputFile

TEXTS = [f"row {n}: \u00fc\0\r\n" + "x" * (n * 7 % 50) for n in range(100)]


def write(path: Path, columns: dict[str, Any] | pa.Table, **options: Any) -> InputFile:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, **{"row_group_size": 30, **options})
    return InputFile(SourceConfig("src"), str(path), path.name, "parquet", None)


def read(file: InputFile, cut_bytes: int = 1 << 20) -> list[RawDocument | Reject]:
    found = readers.survey(file, cut_bytes)
    stops = [*(offset for offset, _ in found.cuts[1:]), found.size]
    made = [
        record
        for start, stop in zip(found.cuts, stops, strict=True)
        for record in readers.records(file, found, start, stop)
    ]
    assert sum(record.read for record in made) == found.size
    return made


def binary(values: list[bytes | None]) -> pa.Array:
    """Strings of any bytes, which Arrow itself would not make."""
    return pa.array(values, pa.binary()).view(pa.string())


KINDS = ["string", "large_string", "string_view", "dictionary", "binary", "large_binary"]


@pytest.mark.parametrize("kind", [*KINDS, "binary_view"])
@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_rows_are_documents_with_their_number(kind: str, codec: str, tmp_path: Path) -> None:
    texts = pa.array(TEXTS)
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(kind)
    file = write(tmp_path / "a.parquet", {"n": range(100), "text": texts}, compression=codec)
    made = read(file)
    assert [record.text for record in made if isinstance(record, RawDocument)] == TEXTS
    assert [record.line for record in made] == list(range(1, 101))
    assert made[6].id == "a.parquet:7" if isinstance(made[6], RawDocument) else False
    groups = pq.ParquetFile(file.path).metadata
    sizes = [groups.row_group(n).total_byte_size for n in range(4)]
    assert [made[n].offset for n in (0, 29, 30, 99)] == [0, 0, sizes[0], sum(sizes[:3])]


def test_any_cuts_give_the_same_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"text": TEXTS, "id": range(100)})
    assert len(readers.survey(file, 1).cuts) == 4
    assert readers.survey(file, 1).cuts[1][1] == 31
    whole = read(file, 1 << 30)
    assert read(file, 1) == read(file, 3000) == whole
    assert [record.id for record in whole if isinstance(record, RawDocument)] == [
        str(n) for n in range(100)
    ]


def test_a_bad_row_is_rejected_alone(tmp_path: Path) -> None:
    texts = binary([b"one", None, b"", b"a\xff", b"x" * 101, b"six", b"seven"])
    ids = binary([b"1", b"2", b"3", b"4", b"5", b"\xfe", None])
    file = write(tmp_path / "a.parquet", {"text": texts, "id": ids})
    file = replace(file, config=replace(file.config, max_record_bytes=100))
    made = read(file)
    assert [record.line for record in made] == [1, 2, 3, 4, 5, 6, 7]
    assert [record.reason for record in made if isinstance(record, Reject)] == [
        *("text not a string", "empty text", "invalid UTF-8", "record too large"),
        "invalid UTF-8",
    ]
    assert [record.id for record in made if isinstance(record, RawDocument)] == [
        "1",
        "a.parquet:7",
    ]


@pytest.mark.parametrize(
    ("columns", "reason", "detail"),
    [
        ({"txt": ["a"] * 70}, "text missing", "no column 'text'"),
        (
            pa.Table.from_arrays([pa.array(["a"] * 70)] * 2, ["text", "text"]),
            "text missing",
            "2 columns are called 'text'",
        ),
        ({"text": [1] * 70}, "text not a string", "column 'text' is int64"),
        (
            {"text": pa.array([b"a"] * 70, pa.binary(1))},
            "text not a string",
            "is fixed_size_binary",
        ),
        ({"text": [["a"]] * 70}, "text not a string", "is list"),
    ],
)
def test_of_a_wrong_column_each_row_is_a_reject(
    columns: dict[str, Any] | pa.Table, reason: str, detail: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.parquet", columns)
    made = read(file, 1)
    rejects = [record for record in made if isinstance(record, Reject)]
    assert [reject.line for reject in rejects] == [*range(1, 71)] and rejects == made
    assert {reject.reason for reject in rejects} == {reason}
    assert detail in rejects[69].detail
    found = readers.survey(file, 1)
    assert found.records == 70 and sum(reject.read for reject in rejects) == found.size


def test_of_bytes_that_are_not_said_to_be_text_those_in_utf8_are_texts(tmp_path: Path) -> None:
    texts = [b"caf\xc3\xa9", None, b"caf\xe9", b"", b"two"]
    made = read(write(tmp_path / "a.parquet", {"text": pa.array(texts, pa.binary())}))
    assert [record.text for record in made if isinstance(record, RawDocument)] == [
        "caf\u00e9",
        "two",
    ]
    assert [(record.line, record.reason) for record in made if isinstance(record, Reject)] == [
        (2, "text not a string"),
        (3, "invalid UTF-8"),
        (4, "empty text"),
    ]
    # Bytes of ids are often no text, and cost no document.
    file = write(tmp_path / "b.parquet", {"text": ["a"], "id": [b"\xff\xfe"]})
    (made,) = read(file)
    assert isinstance(made, RawDocument) and made.id == "b.parquet:1"


def test_an_empty_table_holds_nothing(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})) == []


def test_a_file_without_its_end_is_one_reject(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"text": TEXTS})
    whole = Path(file.path).read_bytes()
    for size in (0, 4, 8, len(whole) // 2, len(whole) - 1):
        Path(file.path).write_bytes(whole[:size])
        (reject,) = read(file, 1)
        assert isinstance(reject, Reject)
        assert reject.reason == "truncated file"
        assert "its footer cannot be read" in reject.detail
    Path(file.path).write_bytes(whole[: len(whole) // 2] + b"PAR1")
    (reject,) = read(file, 1)
    assert isinstance(reject, Reject)
    assert reject.reason == "damaged file"


def test_a_flipped_bit_in_a_page_costs_its_row_group_alone(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.parquet", {"text": TEXTS}, write_page_checksum=True, compression="none"
    )
    column = pq.ParquetFile(file.path).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(Path(file.path).read_bytes())
    data[start + column.total_compressed_size // 2] ^= 4
    Path(file.path).write_bytes(data)
    made = read(file, 1)
    rejects = [record for record in made if isinstance(record, Reject)]
    # Each row is a record, and counts as one.
    assert [reject.line for reject in rejects] == [*range(31, 61)]
    assert {reject.reason for reject in rejects} == {"damaged file"}
    assert "30 rows of row group 1 are lost" in rejects[0].detail
    texts = [record.text for record in made if isinstance(record, RawDocument)]
    assert texts == TEXTS[:30] + TEXTS[60:]


def test_no_flipped_bit_of_the_footer_ends_the_process(tmp_path: Path) -> None:
    # Arrow's own exceptions end a process where its Python does not expect them.
    file = write(tmp_path / "a.parquet", {"text": [*TEXTS[:9], None], "id": range(10)})
    whole = Path(file.path).read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    for at in range(len(whole) - footer, len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        Path(file.path).write_bytes(data)
        assert len(read(file, 1)) in (1, 10), at


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
def test_encodings_that_arrow_reads_in_one_way_only_are_read(encoding: str, tmp_path: Path) -> None:
    options = {"use_dictionary": False, "column_encoding": {"text": encoding}}
    file = write(tmp_path / "a.parquet", {"text": TEXTS, "n": range(100)}, **options)
    assert [record.text for record in read(file) if isinstance(record, RawDocument)] == TEXTS


def test_a_large_group_is_read_in_batches_and_a_repeated_value_held_once(tmp_path: Path) -> None:
    texts = [f"{n} " + "x" * 300_000 for n in range(900)]
    path, options = tmp_path / "a.parquet", {"row_group_size": 1000, "compression": "zstd"}
    file = write(path, {"text": texts, "more": range(900)}, **options)
    with parquet._opened(file) as opened:
        (group,) = opened.groups
        assert group.span > parquet._BATCH_BYTES
        assert parquet._batch_rows(opened.shared, group, ["text"]) == 1024
        assert parquet._batch_rows(opened.plain, group, ["text"]) == 1
    assert [record.text for record in read(file) if isinstance(record, RawDocument)] == texts


def test_what_is_encrypted_or_of_another_format_is_not_damaged(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"text": TEXTS})
    whole = Path(file.path).read_bytes()
    for data, detail in (
        (whole[:-4] + b"PARE", "it is encrypted"),
        (b"PARE" + whole[4:-4] + b"PARE", "it is encrypted"),
        (b"PK\3\4" + bytes(99), "it is a zip archive"),
        (b'{"text": "caf\xe9"}\n' * 9, "it is no parquet file, as its name or `format` says: it"),
    ):
        Path(file.path).write_bytes(data)
        (reject,) = read(file, 1)
        assert isinstance(reject, Reject)
        assert reject.reason == "unsupported file" and detail in reject.detail
