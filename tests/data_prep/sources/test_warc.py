"""WARC and WET, written by warcio: its reader is the reference for what is whole."""

from __future__ import annotations

import gzip
import io
import itertools
import re
from pathlib import Path

import pytest
import trafilatura
import zstandard
from warcio.archiveiterator import ArchiveIterator
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data_prep.config import SourceConfig
from data_prep.sources import html, readers
from data_prep.sources.compression import Compression
from data_prep.sources.documents import RawDocument, Reject
from data_prep.sources.inputs import InputFile

TEXTS = [f"page {n}\n" + "w\u00f6rd " * (n * 37 % 90) for n in range(40)]


def archive(*, gzip: bool) -> bytes:
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=gzip)
    writer.write_record(writer.create_warcinfo_record("x.warc", {"software": "test"}))
    for n, text in enumerate(TEXTS):
        add(writer, "conversion", text.encode(), "text/plain", n)
    return out.getvalue()


def add(writer: WARCWriter, kind: str, data: bytes, content: str, n: int) -> None:
    http = None
    if kind == "response":
        http = StatusAndHeaders("200 OK", [("Content-Type", content)], protocol="HTTP/1.1")
    record = writer.create_warc_record(
        f"http://example.org/{n}",
        kind,
        payload=io.BytesIO(data),
        http_headers=http,
        warc_content_type="" if http else content,
        warc_headers_dict={"WARC-Record-ID": f"<urn:{n}>"},
    )
    writer.write_record(record)


def input_file(path: Path, compression: Compression, limit: int = 1 << 30) -> InputFile:
    more = {"max_record_bytes": limit}
    return InputFile(SourceConfig("src", **more), str(path), path.name, "warc", compression)


def read(file: InputFile) -> list[RawDocument | Reject]:
    found = readers.survey(file, 1)
    assert len(found.cuts) == 1
    made = list(readers.records(file, found, (0, 1), found.size))
    assert sum(record.read for record in made) <= found.size
    return made


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
def test_conversions_are_documents_as_warcio_reads_them(
    compression: Compression, tmp_path: Path
) -> None:
    data = archive(gzip=compression == "gzip")
    with io.BytesIO(data) as stream:
        expected = [
            (record.rec_headers["WARC-Record-ID"], record.content_stream().read().decode())
            for record in ArchiveIterator(stream)
            if record.rec_type == "conversion"
        ]
    assert [text for _, text in expected] == TEXTS
    packed = zstandard.ZstdCompressor().compress(data) if compression == "zstd" else data
    (tmp_path / "a").write_bytes(packed)
    made = read(input_file(tmp_path / "a", compression))
    assert [(doc.id, doc.text) for doc in made if isinstance(doc, RawDocument)] == expected
    assert [doc.line for doc in made] == list(range(2, 42))
    if compression is None:
        assert all(data[doc.offset :].startswith(b"WARC/1.") for doc in made)


def test_pages_are_documents_as_trafilatura_reads_what_warcio_gives(tmp_path: Path) -> None:
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=True)
    for n in range(5):
        said = f"Sentence {n} of the page says caf\u00e9 and more. " * 9
        page = f"<html><body><nav>Menu</nav><article><p>{said}</p></article></body></html>"
        add(writer, "response", page.encode(), "text/html; charset=utf-8", n)
    (tmp_path / "a").write_bytes(out.getvalue())
    with io.BytesIO(out.getvalue()) as stream:
        pages = [record.content_stream().read() for record in ArchiveIterator(stream)]
    expected = [trafilatura.extract(page, favor_precision=True) for page in pages]
    made = read(input_file(tmp_path / "a", "gzip"))
    assert [doc.text for doc in made if isinstance(doc, RawDocument)] == expected
    assert all(text.startswith(f"Sentence {n} of") for n, text in enumerate(expected))
    assert [doc.id for doc in made if isinstance(doc, RawDocument)] == [
        f"<urn:{n}>" for n in range(5)
    ]


def test_responses_say_why_they_are_no_documents(tmp_path: Path) -> None:
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=True)
    add(writer, "request", b"GET /", "application/http", 0)
    add(writer, "response", b"<html>" + b"x" * html.LARGEST, "text/HTML; charset=utf-8", 1)
    add(writer, "response", b"\x89PNG", "image/png", 2)
    add(writer, "metadata", b"a: b", "application/warc-fields", 3)
    add(writer, "conversion", b"caf\xe9", "text/plain", 4)
    add(writer, "conversion", b"", "text/plain", 5)
    add(writer, "conversion", b"{}", "application/json", 7)
    add(writer, "conversion", b"kept", "text/plain", 8)
    (tmp_path / "a").write_bytes(out.getvalue())
    *rejects, kept = read(input_file(tmp_path / "a", "gzip"))
    found = [(one.line, one.reason) for one in rejects if isinstance(one, Reject)]
    assert found == [
        (2, "record too large"),
        (3, "not HTML"),
        (5, "invalid UTF-8"),
        (6, "empty text"),
        (7, "not plain text"),
    ]
    assert isinstance(kept, RawDocument)
    assert (kept.text, kept.id) == ("kept", "<urn:8>")


def test_resources_of_urls_are_pages_and_those_that_tell_of_the_crawl_are_none(
    tmp_path: Path,
) -> None:
    said = "Przep\u0142ywa\u0142 zatok\u0119 dwa razy, \u0142\u00f3d\u017a \u015bpi. " * 9
    page = f"<html><body><article><p>{said}</p></article></body></html>"
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + page.encode()
    kinds = [
        ("http://a.org/", "text/html", page.encode()),
        ("<https://a.org/1>", "text/html; charset=iso-8859-2", page.encode("iso8859-2")),
        ("file:///a", "application/http; msgtype=response", http),
        ("ftp://a.org/b", "image/png", b"\x89PNG"),
        ("http://a.org/2", "text/html", b"<html>" + b"x" * html.LARGEST),
        ("urn:text:http://a.org/", "text/plain", said.encode()),
        ("urn:view:http://a.org/", "text/html", page.encode()),
        ("metadata://gnu.org/software/wget/warc/wget.log", "text/plain", b"log"),
    ]
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=True)
    for uri, kind, data in kinds:
        writer.write_record(
            writer.create_warc_record(
                uri, "resource", payload=io.BytesIO(data), warc_content_type=kind
            )
        )
    (tmp_path / "a").write_bytes(out.getvalue())
    made = read(input_file(tmp_path / "a", "gzip"))
    assert [one.text for one in made if isinstance(one, RawDocument)] == [said.strip()] * 3
    assert [(one.line, one.reason) for one in made if isinstance(one, Reject)] == [
        (4, "not HTML"),
        (5, "record too large"),
    ]


@pytest.mark.parametrize("gzip", [True, False])
def test_a_cut_archive_keeps_what_came_before(gzip: bool, tmp_path: Path) -> None:
    data = archive(gzip=gzip)
    for size in range(len(data) // 2, len(data) // 2 + 60):
        (tmp_path / "a").write_bytes(data[:size])
        *kept, last = read(input_file(tmp_path / "a", "gzip" if gzip else None))
        if isinstance(last, Reject):
            assert last.reason == "truncated file"
            assert last.line == len(kept) + 2
        else:
            # Cut between two records: nothing says that there was more.
            kept.append(last)
        assert [doc.text for doc in kept if isinstance(doc, RawDocument)] == TEXTS[: len(kept)]


def packed(data: bytes, how: str) -> bytes:
    """The archive as it may be stored: each record is a member, all are one, or neither."""
    if how == "plain":
        return data
    parts = [data]
    if how.startswith("each"):
        heads = [match.start() for match in re.finditer(rb"(?<!page )(WARC/1\.0|JUNK)\r\n", data)]
        parts = [data[at:to] for at, to in itertools.pairwise([*heads, len(data)])]
    pack = zstandard.compress if how.endswith("zstd") else gzip.compress
    return b"".join(map(pack, parts))


WAYS = ["plain", "each gzip", "each zstd", "all gzip", "all zstd"]
KINDS: dict[str, Compression] = {"plain": None, "gzip": "gzip", "zstd": "zstd"}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        (b"Content-Length: ", b"Content-Length: 1", "does not end where its Content-Length"),
        (b"Content-Length: ", b"Content-Length: 99999", "the file ends before the record does"),
        (b"Content-Length: ", b"Content-Length: -", "Content-Length is '-"),
        (b"Content-Length: ", b"Content-Size: ", "Content-Length is ''"),
        (b"WARC/1.0\r\n", b"WARC/1.0\r\nX: " + b"y" * 70_000, "a header is too long"),
        (b"WARC/1.0\r\n", b"JUNK\r\n", "a WARC record should begin here"),
        (b"page 20", b"page twenty", "does not end where its Content-Length"),
        (b"page 20", b"page WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 1", "not end"),
        (b"w\xc3\xb6rd \r\n\r\nWARC/1.0", b"WARC/1.0", "does not end where its"),
    ],
)
def test_a_record_at_fault_costs_that_record(
    old: bytes, new: bytes, cause: str, how: str, tmp_path: Path
) -> None:
    data = archive(gzip=False)
    at = data.index(b"<urn:20>")
    at = data.index(old, at) if not old.startswith(b"WARC") else data.rindex(old, 0, at)
    (tmp_path / "a").write_bytes(packed(data[:at] + data[at:].replace(old, new, 1), how))
    made = read(input_file(tmp_path / "a", KINDS[how.split()[-1]]))
    rejects = [one for one in made if isinstance(one, Reject)]
    assert [doc.text for doc in made if isinstance(doc, RawDocument)] == TEXTS[:20] + TEXTS[21:]
    # What looks like a head inside of the record is told from one by members alone.
    assert len(rejects) == 1 + ("WARC-Type" in str(new) and not how.startswith("each"))
    assert (rejects[0].line, rejects[0].reason) == (22, "damaged file")
    assert cause in rejects[0].detail and "record 22 is lost" in rejects[0].detail


@pytest.mark.parametrize("how", WAYS)
def test_a_fault_in_a_record_that_is_no_document_costs_no_document(
    how: str, tmp_path: Path
) -> None:
    data = archive(gzip=False).replace(b"WARC-Type: warcinfo", b"WARC-Type: request", 1)
    at = data.index(b"Content-Length: ")
    for new in (b"Content-Length: 9", b"Content-Length: 99999", b"Content-Length: -"):
        (tmp_path / "a").write_bytes(
            packed(data[:at] + data[at:].replace(b"Content-Length: ", new, 1), how)
        )
        first, *made = read(input_file(tmp_path / "a", KINDS[how.split()[-1]]))
        assert isinstance(first, Reject) and (first.line, first.offset) == (1, 0)
        assert [doc.text for doc in made if isinstance(doc, RawDocument)] == TEXTS


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_damaged_member_costs_its_records(kind: Compression, tmp_path: Path) -> None:
    data = archive(gzip=False)
    heads = [match.start() for match in re.finditer(rb"WARC/1\.0\r\n", data)]
    records = [data[at:to] for at, to in itertools.pairwise([*heads, len(data)])]
    checked = zstandard.ZstdCompressor(write_checksum=True).compress
    members = [gzip.compress(r, mtime=0) if kind == "gzip" else checked(r) for r in records]
    for number in (1, 20, 40):
        for change in (lambda m: m[:-6] + bytes([m[-6] ^ 1]) + m[-5:], lambda m: m[: len(m) // 2]):
            if number == 40 and len(change(members[40])) < len(members[40]):
                continue  # a truncated file
            stored = [change(m) if n == number else m for n, m in enumerate(members)]
            (tmp_path / "a").write_bytes(b"".join(stored))
            made = read(input_file(tmp_path / "a", kind))
            texts = [doc.text for doc in made if isinstance(doc, RawDocument)]
            assert texts == TEXTS[: number - 1] + TEXTS[number:]
            (reject,) = [one for one in made if isinstance(one, Reject)]
            assert (reject.line, reject.reason) == (number + 1, "damaged file")
            begin = sum(map(len, stored[:number]))
            assert f"bytes {begin:,} to {begin + len(stored[number]):,}" in reject.detail


def test_a_text_never_reaches_across_a_member_that_is_left_out(tmp_path: Path) -> None:
    record = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n"
    whole = record % (40, b"0123456789" * 4)
    lost = gzip.compress(b"0123456789")
    parts = [gzip.compress(whole[:-34]), lost[:-5] + b"x" + lost[-4:], gzip.compress(whole[-34:])]
    (tmp_path / "a").write_bytes(b"".join([*parts, gzip.compress(record % (4, b"kept"))]))
    made = read(input_file(tmp_path / "a", "gzip"))
    assert [doc.text for doc in made if isinstance(doc, RawDocument)] == ["kept"]
    assert {one.reason for one in made if isinstance(one, Reject)} == {"damaged file"}


def test_a_conversion_is_read_in_the_encoding_that_it_states(tmp_path: Path) -> None:
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=True)
    add(
        writer,
        "conversion",
        "\u0142\u00f3d\u017a".encode("iso8859-2"),
        "text/plain; charset=iso-8859-2",
        1,
    )
    add(
        writer,
        "conversion",
        "\u65e5\u672c".encode("iso2022_jp"),
        "text/plain; charset=ISO-2022-JP",
        2,
    )
    add(writer, "conversion", "caf\u00e9".encode(), 'text/plain;charset="utf-8"', 3)
    add(writer, "conversion", b"caf\xe9", "text/plain; charset=utf-8", 4)
    add(writer, "conversion", b"caf\xe9", "text/plain; charset=iso-2022-jp", 5)
    add(writer, "conversion", b"cafe", "text/plain; charset=klingon", 6)
    add(writer, "conversion", b"cafe", "text/plain; charset=base64", 7)
    add(writer, "conversion", b"\xad\xa1\xa4\xa2", "text/plain; charset=euc-jp", 8)
    add(writer, "conversion", b"\xfe\xfe\xa4\xa2", "text/plain; charset=euc-jp", 9)
    (tmp_path / "a").write_bytes(out.getvalue())
    made = read(input_file(tmp_path / "a", "gzip"))
    assert [one.text if isinstance(one, RawDocument) else one.reason for one in made] == [
        *("\u0142\u00f3d\u017a", "\u65e5\u672c", "caf\u00e9"),
        *("invalid UTF-8", "not in its encoding", "unknown encoding"),
        *("not in its encoding", "\u2460\u3042", "not in its encoding"),
    ]


def test_what_is_not_read_says_so(tmp_path: Path) -> None:
    record = b"WARC/1.0\r\nWARC-Type: response\r\n%sContent-Length: 4\r\n\r\nabcd\r\n\r\n"
    for data, reason, detail in (
        (
            b"WARC/0.9 12 response x 2006 text/plain urn\r\n",
            "unsupported file",
            "WARC/0.9, is not read",
        ),
        (b"filedesc://a.arc 0.0.0.0 20060101 text/plain 9\n", "unsupported file", "an ARC archive"),
        (record % b"WARC-Segment-Number: 1\r\n", "unsupported record", "several segments"),
        (record % b"Content-Type: text/dns\r\n", "not HTML", "a response of type text/dns"),
    ):
        (tmp_path / "a").write_bytes(data)
        (reject,) = read(input_file(tmp_path / "a", None))
        assert isinstance(reject, Reject)
        assert reject.reason == reason and detail in reject.detail
    for version in (b"WARC/0.18", b"WARC/1.1"):
        data = record.replace(b"WARC/1.0", version).replace(b"response", b"conversion") % b""
        (tmp_path / "a").write_bytes(data.replace(b"\r\n", b"\n") * 2)
        assert [
            doc.text
            for doc in read(input_file(tmp_path / "a", None))
            if isinstance(doc, RawDocument)
        ] == ["abcd"] * 2


def plain_record(text: str, *, end: bytes = b"\r\n\r\n", eol: bytes = b"\r\n") -> bytes:
    """A record whose length is right, whatever ends it."""
    data = text.encode()
    head = (b"WARC/1.0", b"WARC-Type: conversion", b"Content-Length: %d" % len(data))
    return eol.join([*head, b"", data]) + end


@pytest.mark.parametrize("eol", [b"\r\n", b"\n"])
@pytest.mark.parametrize(
    "end", [b"", b"\n", b"\r\n", b"\n\n", b"\r\n\r\n", b"\r\n" * 3, b" \n\n\n"]
)
@pytest.mark.parametrize("how", ["plain", "each gzip", "all gzip"])
def test_a_record_of_the_right_length_is_sound_however_many_blank_lines_end_it(
    how: str, end: bytes, eol: bytes, tmp_path: Path
) -> None:
    records = [plain_record(text, end=end, eol=eol) for text in TEXTS]
    pack = gzip.compress if how == "each gzip" else bytes
    data = b"".join(map(pack, records))
    (tmp_path / "a").write_bytes(gzip.compress(data) if how == "all gzip" else data)
    made = read(input_file(tmp_path / "a", KINDS[how.split()[-1]]))
    assert [doc.text for doc in made if isinstance(doc, RawDocument)] == TEXTS
    assert (len(made), [doc.line for doc in made]) == (len(TEXTS), list(range(1, 41)))
    if end == b"\n\n" and how != "all gzip":
        with io.BytesIO(data) as stream:
            peer = [one.content_stream().read().decode() for one in ArchiveIterator(stream)]
        assert peer == TEXTS


def test_the_blank_line_between_paragraphs_ends_no_record(tmp_path: Path) -> None:
    record = plain_record("one\n\ntwo").replace(b"Length: 8", b"Length: 3")
    (tmp_path / "a").write_bytes(record + plain_record("kept"))
    lost, kept = read(input_file(tmp_path / "a", None))
    assert isinstance(lost, Reject) and "does not end where its Content-Length 3" in lost.detail
    assert isinstance(kept, RawDocument) and kept.text == "kept"


@pytest.mark.parametrize("how", WAYS)
def test_however_many_records_are_at_fault_each_costs_itself(how: str, tmp_path: Path) -> None:
    texts = [f"text {n}" + " of some words" * 80 for n in range(800)]
    faults = (b"%d more than its length says\r\n\r\n", b"\r\n\r\n")
    records = [plain_record(text, end=faults[n % 2]) for n, text in enumerate(texts)]
    records[::4] = [one.replace(b"Length: ", b"Length: 9000") for one in records[::4]]
    (tmp_path / "a").write_bytes(packed(b"".join(records), how))
    made = read(input_file(tmp_path / "a", KINDS[how.split()[-1]]))
    assert [doc.text for doc in made if isinstance(doc, RawDocument)] == texts[1::2]
    rejects = [one for one in made if isinstance(one, Reject)]
    assert [one.line for one in rejects] == list(range(1, 801, 2))
    assert {one.reason for one in rejects} == {"damaged file"}
    assert not any("no record is found" in one.detail for one in rejects)


def test_a_file_of_nothing_but_faults_is_read_in_bounded_time(tmp_path: Path) -> None:
    record = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 8000000\r\n\r\n" + b"x" * 9000
    (tmp_path / "a").write_bytes(gzip.compress(record * 1000))
    rejects = read(input_file(tmp_path / "a", "gzip"))
    assert all(isinstance(one, Reject) for one in rejects)
    assert 1 <= len(rejects) < 1000
    last, size = rejects[-1], 1000 * len(record)
    assert isinstance(last, Reject) and last.offset + last.read == size
    assert "no record is found" not in last.detail
    assert f"no other is looked for in the {size - last.offset:,} bytes from it" in last.detail


def test_behind_a_length_beyond_the_end_of_the_file_the_next_record_is_found(
    tmp_path: Path,
) -> None:
    record = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 900000000\r\n\r\n" + b"x" * 9000
    (tmp_path / "a").write_bytes(gzip.compress(record * 200))
    rejects = read(input_file(tmp_path / "a", "gzip"))
    assert [one.offset for one in rejects] == [n * len(record) for n in range(200)]
    assert isinstance(rejects[-1], Reject) and "no record is found behind it" in rejects[-1].detail
