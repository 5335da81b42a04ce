"""The strict reader: every record is a document or a reject, at its line and offset."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import zstandard

from data_prep.config import SourceConfig
from data_prep.sources import compression as compression_module
from data_prep.sources import documents, readers
from data_prep.sources.documents import BadRecordError, LongDocument, RawDocument, Reject
from data_prep.sources.inputs import InputChangedError, InputFile

# Bad line, reason, and what its detail says.
BAD = [
    (b'{"text": "a\xff"}\n', "invalid UTF-8", "byte 12 of the record"),
    (b'{"text": "a"\n', "broken JSON", "at character"),
    (b'\xef\xbb\xbf{"text": "a"}\n', "broken JSON", "BOM"),
    (b"[" * 100_000 + b"\n", "broken JSON", "nested too deeply"),
    (b'["text"]\n', "not an object", "found list"),
    (b"null\n", "not an object", "found NoneType"),
    (b'{"Text": "a"}\n', "text missing", "no key 'text'"),
    (b'{"text": null}\n', "text not a string", "found NoneType"),
    (b'{"text": ["a"]}\n', "text not a string", "found list"),
    (b'{"text": ""}\n', "empty text", ""),
    (b'{"text": "a", "id": 1, "text": "b"}\n', "text twice", "the key 'text'"),
    (b'{"te\\u0078t": "a", "te\\u0078t": "b"}\n', "text twice", "the key 'text'"),
    (b'{"text": "a", "t\\u0065xt": "b"}\n', "text twice", "the key 'text'"),
    (b'{"meta": {"text": 1}, "text": "a", "text": "a"}\n', "text twice", "the key 'text'"),
    (b'{"text": "a\\ud800"}\n', "lone surrogate", "ud800"),
    (b'{"text": "a", "id": "\\udfff"}\n', "lone surrogate", "udfff"),
    (b"\n", "blank line", ""),
    (b" \r\n", "blank line", ""),
]


def input_file(
    path: Path,
    form: Literal["text", "jsonl"] = "jsonl",
    compression: Literal["gzip", "zstd"] | None = None,
    **settings: Any,
) -> InputFile:
    return InputFile(SourceConfig("src", **settings), str(path), path.name, form, compression)


def with_settings(file: InputFile, **settings: Any) -> InputFile:
    return replace(file, config=replace(file.config, **settings))


def read(file: InputFile, cut_bytes: int = 1 << 20) -> list[RawDocument | LongDocument | Reject]:
    found = readers.survey(file, cut_bytes)
    stops = [*(offset for offset, _ in found.cuts[1:]), found.size]
    return [
        record
        for start, stop in zip(found.cuts, stops, strict=True)
        for record in readers.records(file, found, start, stop)
    ]


def line(**record: Any) -> bytes:
    return json.dumps(record).encode() + b"\n"


def packed(data: bytes, compression: str | None) -> bytes:
    if compression == "gzip":
        return gzip.compress(data, mtime=0)
    if compression == "zstd":
        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return data


@pytest.mark.parametrize(("bad", "reason", "detail"), BAD)
def test_a_bad_record_is_rejected_at_its_place(
    bad: bytes, reason: str, detail: str, tmp_path: Path
) -> None:
    first, last = line(id="1", text="one"), line(id="3", text="three")
    path = tmp_path / "a.jsonl"
    path.write_bytes(first + bad + last)
    one, two, three = read(input_file(path))
    assert isinstance(one, RawDocument) and isinstance(three, RawDocument)
    assert (one.id, one.line, one.offset, one.text) == ("1", 1, 0, "one")
    assert (three.id, three.line, three.text) == ("3", 3, "three")
    assert three.offset == len(first) + len(bad)
    assert isinstance(two, Reject)
    assert (two.line, two.offset) == (2, len(first))
    assert two.reason == reason
    assert detail in two.detail


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
@pytest.mark.parametrize("cut_bytes", [1, 17, 1000, 1 << 20])
def test_any_cuts_give_the_same_records(
    compression: Literal["gzip", "zstd"] | None, cut_bytes: int, tmp_path: Path
) -> None:
    lines = [line(text=f"number {n} " + "x" * (n * 7 % 50)) for n in range(60)]
    data = b"".join(lines + [bad for bad, _, _ in BAD] + [line(text="y" * 300_000)])
    data += b'{"text": "no newline at the end"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(packed(data, compression))
    records = read(input_file(path, compression=compression), cut_bytes)
    assert records == read(input_file(path, compression=compression), 1 << 30)
    assert len(records) == 60 + len(BAD) + 2
    assert [record.line for record in records] == list(range(1, len(records) + 1))
    assert sum(record.read for record in records) == len(data)
    for record in records:
        assert data[: record.offset].count(b"\n") == record.line - 1


def test_text_is_kept_as_it_is(tmp_path: Path) -> None:
    text = "\ufeff\r\n a\0b\u2581\u2028\tc \r"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (document,) = read(input_file(tmp_path / "a.txt", "text"))
    assert isinstance(document, RawDocument)
    assert (document.id, document.line, document.text) == ("a.txt", 1, text)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line(text=text).replace(b"\n", b"\r\n"))
    (document,) = read(input_file(tmp_path / "a.jsonl"))
    assert isinstance(document, RawDocument)
    assert document.text == text


def test_ids_are_the_records_own_or_their_place(tmp_path: Path) -> None:
    ids: list[Any] = ["x", 7, "", None, True, 1.5, ["a"]]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(line(id=id, text="t") for id in ids) + line(text="t"))
    assert [record.id for record in read(input_file(path)) if isinstance(record, RawDocument)] == [
        *("x", "7"),
        *(f"a.jsonl:{number}" for number in range(3, 9)),
    ]


def test_other_fields_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(url="u", body="b"))
    file = input_file(path, text_field="body", id_field="url")
    (document,) = read(file)
    assert isinstance(document, RawDocument)
    assert (document.id, document.text) == ("u", "b")


@pytest.mark.parametrize("form", ["text", "jsonl"])
def test_an_empty_text_is_rejected_and_an_empty_jsonl_holds_nothing(
    form: Literal["text", "jsonl"], tmp_path: Path
) -> None:
    (tmp_path / "a").touch()
    records = read(input_file(tmp_path / "a", form))
    expected = [Reject(1, 0, "empty text", "", 0)]
    assert records == (expected if form == "text" else [])


def test_a_text_file_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc\xe9def")
    (reject,) = read(input_file(tmp_path / "a", "text"))
    assert reject == Reject(1, 0, "invalid UTF-8", "byte 4 of the record", 7)


@pytest.mark.parametrize(
    "text",
    [
        "0123456789 abc.\n" * 1000 + "end",
        "x" * 1001,
        "title\n" + "x" * 5000,
        "a " * 2001,
        ("short\n" + "y" * 997) * 5,
    ],
)
def test_no_passage_of_a_long_text_is_a_remnant(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rules judge each passage alone: one of a few words would drop the document.
    monkeypatch.setattr(documents, "_PASSAGE", 1000)
    for step in (1, 77, len(text)):
        parts = (text[start : start + step] for start in range(0, len(text), step))
        passages = list(documents.passages(parts))
        assert "".join(passages) == text
        assert all(500 <= len(passage) <= 1500 for passage in passages)


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
def test_a_text_that_is_too_large_to_be_held_comes_in_passages(
    compression: Literal["gzip", "zstd"] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_PASSAGE", 1000)
    monkeypatch.setattr(compression_module, "BLOCK_BYTES", 333)
    text = "".join(f"l\u00efne \U0001f600 {n}\n" for n in range(900))
    (tmp_path / "a").write_bytes(packed(text.encode(), compression))
    file = input_file(tmp_path / "a", "text", compression, max_held_bytes=999)
    (long,) = read(file)
    assert isinstance(long, LongDocument)
    assert (long.id, long.line, long.offset, long.read) == ("a", 1, 0, len(text.encode()))
    for _ in range(2):
        passages = list(long.passages())
        assert "".join(passages) == text and len(passages) > 5
        assert all(passage.endswith("\n") for passage in passages)
    (held,) = read(with_settings(file, max_held_bytes=long.read))
    assert isinstance(held, RawDocument) and held.text == text


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
def test_a_file_of_another_format_is_rejected_whatever_its_size(
    compression: Literal["gzip", "zstd"] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tar is known by bytes 257 to 262, which no single block holds.
    monkeypatch.setattr(compression_module, "BLOCK_BYTES", 100)
    tar = b"a.txt" + bytes(252) + b"ustar\0" + bytes(800)
    for data, detail in (
        (tar, "it is a tar archive, not text"),
        (line(text="one") * 90, "it is JSON lines; set format: jsonl, or format: text to take it"),
    ):
        (tmp_path / "a.txt").write_bytes(packed(data, compression))
        file = input_file(tmp_path / "a.txt", "text", compression)
        (held,) = read(file)
        assert isinstance(held, Reject) and held.detail.startswith(detail)
        assert (held.line, held.offset, held.reason) == (1, 0, "unsupported file")
        assert held.read == len(data)
        assert read(with_settings(file, max_held_bytes=99)) == [held]
    (text,) = read(with_settings(file, max_held_bytes=99, format="text"))
    assert isinstance(text, LongDocument) and "".join(text.passages()).encode() == data


def test_a_key_may_repeat_in_other_objects_and_in_texts(tmp_path: Path) -> None:
    text = 'a "text": "b", "text": "c"'
    spans = [{"text": "a"}, {"text": "b"}]
    (tmp_path / "a").write_bytes(line(text=text, spans=spans) + line(meta={"text": 1}, text=text))
    assert [record.text for record in read(input_file(tmp_path / "a"))] == [text, text]  # type: ignore[union-attr]


def test_a_number_of_any_length_beside_a_text_costs_nothing(tmp_path: Path) -> None:
    digits = b"-" + b"7" * 5000
    (tmp_path / "a").write_bytes(
        b'{"text": "a", "n": %b, "id": 1}\n{"text": "b", "id": %b}\n' % (digits, digits)
        + b'{"text": "c", "n": %b, "text": "d"}\n' % digits
    )
    one, two, three = read(input_file(tmp_path / "a"))
    assert isinstance(one, RawDocument) and (one.text, one.id) == ("a", "1")
    assert isinstance(two, RawDocument) and (two.text, two.id) == ("b", "a:2")
    assert isinstance(three, Reject) and three.reason == "text twice"


def test_a_long_line_is_cut_before_a_space_or_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_PASSAGE", 10)
    for text, wanted in (
        ("two words and more", ["two words", " and more"]),
        ("x" * 12 + "y" * 12, ["x" * 10, "xx" + "y" * 12]),
        ("a\nb" + "c" * 20, ["a\nb" + "c" * 7, "c" * 13]),
        (" " + "x" * 15, [" " + "x" * 9, "x" * 6]),
        ("123456789\n123456789\n", ["123456789\n", "123456789\n"]),
        ("short", ["short"]),
        ("", []),
    ):
        assert list(documents.passages([text])) == wanted
        assert list(documents.passages(text)) == wanted  # character by character


def test_a_long_text_that_is_held_is_cut_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_PASSAGE", 10)
    monkeypatch.setattr(documents, "_WHOLE", 20)
    whole, long = (RawDocument("", 1, 0, n, "one two\n three four five"[:n]) for n in (20, 21))
    assert list(whole.passages()) == [whole.text]
    assert list(long.passages()) == ["one two\n", " three four f"]


@pytest.mark.parametrize("bad", [b"\xff", b"\xed\xa0\x80", b"\xf0\x9f\x98"])
def test_a_long_text_says_where_it_is_not_utf8(
    bad: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression_module, "BLOCK_BYTES", 3)
    for before in range(8, 14):
        (tmp_path / "a").write_bytes(b"\xc3\xa9" * 3 + b"x" * (before - 6) + bad)
        file = input_file(tmp_path / "a", "text")
        (held,) = read(file)
        (long,) = read(with_settings(file, max_held_bytes=5))
        assert isinstance(held, Reject) and isinstance(long, LongDocument)
        with pytest.raises(BadRecordError) as caught:
            list(long.passages())
        assert (caught.value.reason, caught.value.detail) == (held.reason, held.detail)
        assert held.detail == f"byte {before + 1} of the record"


def test_a_record_beyond_either_limit_is_rejected_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(line(text="x" * 100))
    for limit in ("max_record_bytes", "max_held_bytes"):
        (reject,) = read(input_file(tmp_path / "a", **{limit: 50}))
        assert isinstance(reject, Reject)
        assert (reject.reason, reject.detail) == ("record too large", f"113 bytes; {limit} is 50")
    (reject,) = read(input_file(tmp_path / "a", "text", max_record_bytes=50))
    assert isinstance(reject, Reject)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_truncated_file_keeps_what_came_before(
    compression: Literal["gzip", "zstd"], tmp_path: Path
) -> None:
    noise = [hashlib.sha256(str(n).encode()).hexdigest() * 40 for n in range(400)]
    lines = [line(text=text) for text in noise]
    whole = packed(b"".join(lines), compression)
    path = tmp_path / "a.jsonl"
    for size in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 5, len(whole) - 1):
        path.write_bytes(whole[:size])
        *kept, last = read(input_file(path, compression=compression), 50_000)
        assert isinstance(last, Reject)
        assert last.reason == "truncated file"
        assert last.line == len(kept) + 1
        assert last.offset == sum(len(part) for part in lines[: len(kept)])
        assert [record.text for record in kept if isinstance(record, RawDocument)] == noise[
            : len(kept)
        ]
        assert len(kept) >= size / len(whole) * 400 - 100
    path.write_bytes(whole)
    assert len(read(input_file(path, compression=compression))) == 400


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_damaged_file_is_not_used_at_all(
    compression: Literal["gzip", "zstd"], tmp_path: Path
) -> None:
    # Long enough that records come out before the end, where the damage shows.
    noise = (hashlib.sha512(str(n).encode()).hexdigest() for n in range(20_000))
    data = bytearray(packed(b"".join(line(text=text) for text in noise), compression))
    # The checksum comes before gzip's length, and at the end of zstd's frame.
    data[-8 if compression == "gzip" else -1] ^= 1
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    (reject,) = read(input_file(path, compression=compression), 100_000)
    assert isinstance(reject, Reject)
    assert (reject.line, reject.offset, reject.reason) == (1, 0, "damaged file")


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_truncated_text_file_is_one_reject(
    compression: Literal["gzip", "zstd"], tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(packed(b"some text " * 1000, compression)[:-3])
    (reject,) = read(input_file(path, "text", compression))
    assert isinstance(reject, Reject)
    assert (reject.line, reject.offset, reject.reason) == (1, 0, "truncated file")


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_joined_compressed_files_are_read_on(
    compression: Literal["gzip", "zstd"], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    parts = [packed(line(text=f"part {n}"), compression) for n in range(3)]
    path.write_bytes(b"".join(parts))
    records = read(input_file(path, compression=compression))
    assert [record.line for record in records] == [1, 2, 3]
    assert all(isinstance(record, RawDocument) for record in records)


def test_gzip_padding_is_not_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(packed(line(text="a"), "gzip") + bytes(512))
    (record,) = read(input_file(path, compression="gzip"))
    assert isinstance(record, RawDocument)


def test_a_huge_line_is_a_document(tmp_path: Path) -> None:
    text = "long line " * 300_000
    path = tmp_path / "a.jsonl"
    path.write_bytes(packed(line(text="before") + line(text=text) + line(text="after"), "gzip"))
    before, huge, after = read(input_file(path, compression="gzip"))
    assert isinstance(huge, RawDocument)
    assert huge.text == text
    assert (before.line, huge.line, after.line) == (1, 2, 3)


def test_the_survey_is_of_the_file_on_disk(tmp_path: Path) -> None:
    data = b"".join(line(text=str(n)) for n in range(1000))
    path = tmp_path / "a.jsonl"
    path.write_bytes(packed(data, "gzip"))
    found = readers.survey(input_file(path, compression="gzip"), 4000)
    assert found.bytes == path.stat().st_size
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (found.size, found.damage) == (len(data), "")
    assert len(found.cuts) == 1 + len(data) // 4014
    for offset, number in found.cuts[1:]:
        assert data[offset - 1 : offset] == b"\n"
        assert data[:offset].count(b"\n") == number - 1


def test_a_file_that_changed_since_its_survey_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(text="a"))
    file = input_file(path)
    found = readers.survey(file, 100)
    path.write_bytes(line(text="ab"))
    with pytest.raises(InputChangedError, match=r"a\.jsonl: changed since"):
        list(readers.records(file, found, (0, 1), found.size))


def test_a_record_of_a_prompt_and_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(
        line(question="Who?", reply=" She.", id="x", text="not read")
        + line(question="Who?")
        + line(question="", reply="a")
        + line(question="Who?", reply=["She."])
        + line(question="Who?", reply="\ud800")
    )
    file = input_file(path, prompt_field="question", answer_field="reply")
    first, *rest = read(file)
    assert isinstance(first, RawDocument)
    assert (first.id, first.text, first.replies) == ("x", "Who?", [" She."])
    assert [record.reason for record in rest if isinstance(record, Reject)] == [
        "answer missing",
        "empty prompt",
        "not an answer to each prompt",
        "lone surrogate",
    ]


def test_a_record_of_several_prompts_and_their_answers(tmp_path: Path) -> None:
    path = tmp_path / "turns.jsonl"
    path.write_bytes(
        line(q=["Who?", " Where?"], a=[" She.", " There."])
        + line(q=["Who?"], a=[" She."])
        + line(q=["Who?", " Where?"], a=[" She."])
        + line(q=["Who?", 3], a=[" She.", " There."])
        + line(q=["Who?", " Where?"], a=[" She.", ""])
        + line(q=[], a=[])
        + line(q=["Who?"])
        + line(q=["Who?"], a=" She.")
        + line(q="Who?", a=[" She."])
        + line(q=["Who?"], a=["\ud800"])
    )
    first, second, *rest = read(input_file(path, prompt_field="q", answer_field="a"))
    assert isinstance(first, RawDocument) and isinstance(second, RawDocument)
    assert (first.text, first.replies) == ("Who?", [" She.", " Where?", " There."])
    assert (second.text, second.replies) == ("Who?", [" She."])
    found = [(record.reason, record.detail) for record in rest if isinstance(record, Reject)]
    assert found == [
        ("not an answer to each prompt", "2 prompts, 1 answer"),
        ("prompt not a string", "turn 2: found int"),
        ("empty answer", "turn 2"),
        ("empty prompt", "the list is empty"),
        ("answer missing", "no key 'a'"),
        ("not an answer to each prompt", "'a' holds no list, but str"),
        ("not an answer to each prompt", "'q' holds no list, but str"),
        ("lone surrogate", "'\\ud800'"),
    ]
