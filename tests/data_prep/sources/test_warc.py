"""WARC and WET, written by warcio: its reader is the reference for what is whole."""

from __future__ import annotations

import io
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
        (3, "not plain text"),
        (5, "invalid UTF-8"),
        (6, "empty text"),
        (7, "not plain text"),
    ]
    assert isinstance(kept, RawDocument)
    assert (kept.text, kept.id) == ("kept", "<urn:8>")


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


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        (b"Content-Length: ", b"Content-Length: 1", "does not end where its Content-Length"),
        (b"Content-Length: ", b"Content-Length: -", "Content-Length is '-"),
        (b"Content-Length: ", b"Content-Size: ", "Content-Length is ''"),
        (b"WARC/1.0\r\n", b"WARC/1.0\r\nX: " + b"y" * 70_000, "a header is too long"),
        (b"WARC/1.0\r\n", b"JUNK\r\n", "a WARC record should begin here"),
    ],
)
def test_a_broken_record_ends_the_file_at_its_place(
    old: bytes, new: bytes, cause: str, tmp_path: Path
) -> None:
    data = archive(gzip=False)
    at = data.index(b"<urn:20>")
    at = data.index(b"Content-Length", at) if b"Content" in old else data.rindex(b"WARC/1.0", 0, at)
    (tmp_path / "a").write_bytes(data[:at] + data[at:].replace(old, new, 1))
    *kept, last = read(input_file(tmp_path / "a", None))
    assert [doc.text for doc in kept if isinstance(doc, RawDocument)] == TEXTS[:20]
    assert isinstance(last, Reject)
    assert cause in last.detail
