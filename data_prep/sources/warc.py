"""WARC and WET: `conversion` records of plain text and `response` records of HTML are documents.

Other records (warcinfo, request, metadata, ...) are not documents and are not counted. A record's
`line` is its number in the file, of all records, and its offset is where its header begins, after
decompression. The reader is our own since warcio only warns of a wrong length, ends silently where
a file is cut, and needs time that is quadratic in the length of a line.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from data_prep.dataset.blocks import BlockReader
from data_prep.sources import compression, documents, html, storage
from data_prep.sources.compression import DamageError
from data_prep.sources.documents import BadRecordError, RawDocument, Reject, Survey
from data_prep.sources.inputs import InputFile

_HEADER_BYTES = 1 << 16
_END = b"\r\n\r\n"
# Digits of a possible length: int() of more would be slow, or refused.
_DIGITS = 18


def records(file: InputFile, found: Survey) -> Iterator[RawDocument | Reject]:
    """The documents and rejects of the whole file."""
    line, done = 1, 0
    with storage.open_binary(file.path) as raw:
        source: Any = BlockReader(compression.blocks(raw.read, file.compression))
        stream = io.BufferedReader(source, compression.BLOCK_BYTES)
        try:
            while (first := _first_line(stream)) is not None:
                offset = stream.tell() - len(first)
                header = _header(stream, first)
                length, content = _content(file, stream, header)
                if content is not None:
                    read, done = stream.tell() - done, stream.tell()
                    id = header.get("warc-record-id") or f"{file.relative}:{line}"
                    try:
                        documents.check_size(file, length)
                        text = _text(header, content, length)
                    except BadRecordError as bad:
                        yield bad.at(line, offset, read)
                    else:
                        yield RawDocument(id, line, offset, read, text)
                line += 1
        except DamageError as error:
            reason = "truncated file" if str(error) == "truncated file" else "damaged file"
            detail = f"{error}: record {line} and what follows it are lost"
            yield Reject(line, stream.tell(), reason, detail, found.size - done)


def _first_line(stream: io.BufferedReader) -> bytes | None:
    """The line that begins the next record; None at the end."""
    while line := stream.readline(_HEADER_BYTES):
        if line.startswith(b"WARC/1."):
            return line
        if line.strip():
            raise DamageError("a WARC record should begin here")
    return None


def _header(stream: io.BufferedReader, first: bytes) -> dict[str, str]:
    """The fields of a record's header, their names in lower case."""
    lines: list[bytes] = [first]
    while sum(map(len, lines)) < _HEADER_BYTES:
        line = stream.readline(_HEADER_BYTES)
        if not line:
            raise DamageError("truncated file")
        if not line.strip():
            fields = (line.decode(errors="replace").partition(":") for line in lines[1:])
            return {name.strip().lower(): value.strip() for name, _, value in fields}
        if line[:1] in b" \t":
            lines[-1] = lines[-1].rstrip() + b" " + line.strip()
        else:
            lines.append(line)
    raise DamageError("a header is too long")


def _content(
    file: InputFile, stream: io.BufferedReader, header: dict[str, str]
) -> tuple[int, bytes | None]:
    """(stated length, the beginning of the content as far as it may be held) of a record.

    Reads the record to its end. No content where it was never meant to be a document.
    """
    stated = header.get("content-length", "")
    if not (stated.isascii() and stated.isdecimal()) or len(stated) > _DIGITS:
        raise DamageError(f"a record's Content-Length is {stated[:40]!r}")
    kind, length = _kind(header), int(stated)
    if kind not in ("conversion", "response"):
        _skip(stream, length)
        return length, None
    most = min(file.held_bytes, html.LARGEST) if kind == "response" else file.held_bytes
    kept = min(length, most)
    content = stream.read(kept)
    if len(content) < kept:
        raise DamageError("truncated file")
    _skip(stream, length - kept)
    if not _END.startswith(stream.read(len(_END))):
        raise DamageError(f"a record does not end where its Content-Length {stated} says")
    return length, content


def _kind(header: dict[str, str]) -> str:
    return header.get("warc-type", "").lower()


def _text(header: dict[str, str], content: bytes, length: int) -> str:
    if _kind(header) == "response":
        if length > len(content):
            detail = f"{length} bytes; a page may have {html.LARGEST}"
            raise BadRecordError("record too large", detail)
        return html.text_of(content, header.get("warc-identified-payload-type", ""))
    kind = header.get("content-type", "text/plain").partition(";")[0].strip().lower()
    if kind != "text/plain":
        raise BadRecordError("not plain text", f"a conversion to {kind}")
    if not content:
        raise BadRecordError("empty text")
    return documents.utf8(content)


def _skip(stream: io.BufferedReader, size: int) -> None:
    while size:
        block = stream.read(min(size, compression.BLOCK_BYTES))
        if not block:
            raise DamageError("truncated file")
        size -= len(block)
