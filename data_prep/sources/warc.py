"""WARC and WET: records of plain text (`conversion`) and of HTML are documents.

HTML is in `response` records or, as warcit writes it, in `resource` records of a URL; those of
other URIs (urn:, metadata:) tell of the crawl. Other records (warcinfo, request, metadata, revisit,
...) are not documents and are not counted. A record's `line` is its number in the file, of all
records, and its offset is where its header begins, after decompression. A record at fault is
rejected, and reading continues at the next: in a file whose records are compressed one by one at
the next member that begins as one, else at the next head of a record. The reader is our own since
warcio only warns of a wrong length, ends silently where a file is cut, and needs time that is
quadratic in the length of a line.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO

from data_prep.sources import compression, contents, documents, html, storage
from data_prep.sources.compression import UNSUPPORTED, DamageError, UnsupportedError
from data_prep.sources.documents import BadRecordError, RawDocument, Reject, Survey
from data_prep.sources.extractor import Extractor
from data_prep.sources.inputs import InputFile

_HEADER_BYTES = 1 << 16
_FIRST = re.compile(rb"WARC/(?:1\.|0\.1[78]\b)")
# The head of a record as it is looked for behind one at fault, where any text may stand.
_HEAD = re.compile(
    rb"WARC/(?:1\.\d|0\.1[78])[ \t]*\r?\n"
    rb"(?=(?:[\w-]+:[^\n]*\n(?:[ \t][^\n]*\n)*){0,40}?WARC-Type:)",
    re.IGNORECASE,
)
_HEAD_BYTES = 1 << 13
_OF_PAGES = ("response", "resource")
_URL = re.compile(r"(?:https?|ftps?|file):", re.IGNORECASE)
# Digits of a possible length: int() of more would be slow, or refused.
_DIGITS = 18
# Bytes that may be read again after faults, in sizes of the file: each could cost all of it.
_MOST_AGAIN, _LEAST_AGAIN = 16, 1 << 26
# Bytes that are held to be read again. For those further back a member is decompressed anew.
_KEPT = 1 << 20


def records(file: InputFile, found: Survey) -> Iterator[RawDocument | Reject]:
    """The documents and rejects of the whole file."""
    with storage.open_binary(file.path) as raw, Extractor() as extract:
        yield from _Records(file, found, _Archive(raw, file, found), extract)


class _Stream:
    """Data from an offset on, of which the last _KEPT bytes that were read can be read again.

    Where the data are damaged they end: `damage` says so from there on.
    """

    def __init__(self, blocks: Iterator[bytes], offset: int) -> None:
        self._blocks, self._data, self._first = blocks, bytearray(), offset
        self.offset, self.damage = offset, ""

    def has_more(self) -> bool:
        """Whether anything follows."""
        return self.offset < self._first + len(self._data) or self._grow()

    def _grow(self) -> bool:
        """Take in the next block, if there is one."""
        if (old := self.offset - self._first - _KEPT) > 0:
            del self._data[:old]
            self._first += old
        try:
            block = next(self._blocks, b"")
        except DamageError as error:
            block, self.damage = b"", str(error)
        self._data += block
        return bool(block)

    def read(self, size: int) -> bytes:
        """The next bytes: so many, or all that there are."""
        parts: list[bytes] = []
        while size > 0 and self.has_more():
            at = self.offset - self._first
            parts.append(bytes(self._data[at : at + size]))
            size -= len(parts[-1])
            self.offset += len(parts[-1])
        return b"".join(parts)

    def readline(self, most: int) -> bytes:
        """The next line, or so many bytes of it."""
        while True:
            at = self.offset - self._first
            end = self._data.find(b"\n", at, at + most) + 1
            if end or len(self._data) - at >= most or not self._grow():
                return self.read(end - at if end else most)

    def back(self, offset: int) -> bool:
        """Read on from this offset, if it is still held."""
        is_held = self._first <= offset
        if is_held:
            self.offset = offset
        return is_held


class _Archive:
    """The file after decompression, read forwards, or again from a place further back."""

    def __init__(self, raw: BinaryIO, file: InputFile, found: Survey) -> None:
        self._raw, self._compression, self._gaps = raw, file.compression, found.gaps
        # (offset, place in the file) of members, from the last one before what is read on.
        self._members: deque[tuple[int, int]] = deque([(0, 0)])
        self._again = _MOST_AGAIN * found.bytes + _LEAST_AGAIN
        self.has_given_up = False
        self._open(0, 0)

    def _open(self, offset: int, place: int) -> None:
        self._raw.seek(place)
        self._stream = _Stream(self._blocks(offset), offset)
        self.read, self.readline = self._stream.read, self._stream.readline

    def _blocks(self, offset: int) -> Iterator[bytes]:
        last = -1
        for place, block in compression.pieces(self._raw, self._compression, self._gaps):
            is_new = self._compression and place > last
            if is_new and offset > self._members[-1][0]:
                self._members.append((offset, place))
            last = place
            yield block
            offset += len(block)

    def tell(self) -> int:
        """The offset of what is read next."""
        return self._stream.offset

    def is_done(self) -> bool:
        """Whether nothing follows. Raises DamageError where the file ends inside of its data."""
        if self._stream.has_more():
            return False
        if self._stream.damage:
            raise DamageError(self._stream.damage)
        return True

    def forget(self, offset: int) -> None:
        """Nothing before this offset is to be read again."""
        while len(self._members) > 1 and self._members[1][0] <= offset:
            self._members.popleft()

    def is_member(self, offset: int) -> bool:
        """Whether a compressed member begins at this offset, which is not before the last one."""
        first = next((start for start, _ in self._members if start >= offset), None)
        return first == offset

    def ends_record(self, end: bytes) -> bool:
        """Whether a record ends here: by `end`, as it should, or by any blank lines, or none.

        Not all writers end records as they should; then a head, or the end of a member or of the
        file, has to follow. Reads over the blank lines. Raises DamageError.
        """
        blank = b""
        while not self.is_done() and not self.is_member(self.tell()):
            line = self.readline(_HEADER_BYTES)
            if line.strip():
                self._back(self.tell() - len(line))
                return blank == end or bool(_FIRST.match(line))
            blank = (blank + line)[: len(end)]
        return True

    def _back(self, offset: int) -> None:
        """Read on from this offset, which was read before. Raises DamageError."""
        if self._stream.back(offset):
            return
        start, place = (offset, offset) if self._compression is None else self._members[0]
        for member in self._members:
            if self._compression and member[0] <= offset:
                start, place = member
        self._again -= offset - start
        self._open(start, place)
        self.skip(offset - start)

    def skip(self, size: int) -> None:
        """Read over so many bytes. Raises DamageError where there are fewer."""
        while size:
            block = self.read(min(size, compression.BLOCK_BYTES))
            if not block:
                raise DamageError("truncated file")
            size -= len(block)

    def next_head(self, offset: int) -> int | None:
        """Where the next record begins behind the one at this offset; None: no more is found.

        What is read next is that record. After much reading again none is looked for:
        `has_given_up`.
        """
        if self._again <= 0:
            self.has_given_up = True
            return None
        # Where records are members, what looks like a head inside of one is its text.
        in_members = offset > 0 and self.is_member(offset)
        self._again -= self.tell() - offset
        self._back(offset + 1)
        at, data = offset + 1, b""
        while True:
            block = self.read(compression.BLOCK_BYTES)
            data += block
            # A head near the end is looked at again with what follows it.
            most = len(data) - _HEAD_BYTES if block else len(data)
            for found in _HEAD.finditer(data):
                place = at + found.start()
                if found.start() < most and (not in_members or self.is_member(place)):
                    self._back(place)
                    return place
            if not block:
                return None
            cut = max(most, 0)
            at, data = at + cut, data[cut:]


class _Records:
    """The records of an archive, one after the other."""

    def __init__(
        self, file: InputFile, found: Survey, archive: _Archive, extract: html.Extract
    ) -> None:
        self._file, self._found, self._archive = file, found, archive
        self._extract = extract
        self._gaps = deque(found.gaps)
        self._line, self._done = 1, 0

    def __iter__(self) -> Iterator[RawDocument | Reject]:
        while True:
            start = self._archive.tell()
            yield from self._passed_gaps(start)
            try:
                first = self._first_line()
                if first is None:
                    break
                start = self._archive.tell() - len(first)
                self._archive.forget(start)
                if made := self._record(start, first):
                    yield made
            except DamageError as error:
                following = self._archive.next_head(start)
                yield self._lost(start, error, following)
                if following is None:
                    break
            self._line += 1
        yield from self._passed_gaps(self._found.size)

    def _passed_gaps(self, offset: int) -> Iterator[Reject]:
        """What was left out of the compressed file up to here: a record each, or more."""
        while self._gaps and self._gaps[0].offset <= offset:
            gap = self._gaps.popleft()
            yield Reject(self._line, offset, "damaged file", gap.why)
            self._line += gap.is_loss

    def _first_line(self) -> bytes | None:
        """The line that begins the next record; None at the end."""
        while not self._archive.is_done():
            line = self._archive.readline(_HEADER_BYTES)
            if line.strip():
                return line
        return None

    def _record(self, offset: int, first: bytes) -> RawDocument | Reject | None:
        """The record at this offset, if it is meant to be a document. Raises DamageError."""
        _check_first(first)
        header = self._header(first)
        length, content = self._content(header, b"\r\n\r\n" if first.endswith(b"\r\n") else b"\n\n")
        if content is None:
            return None
        read, self._done = self._archive.tell() - self._done, self._archive.tell()
        try:
            documents.check_size(self._file, length)
            inside = itertools.takewhile(lambda gap: gap.offset < self._done, self._gaps)
            if any(offset < gap.offset and gap.is_loss for gap in inside):
                raise BadRecordError("damaged file", "a part of the record is left out")
            text = self._text(header, content, length)
        except BadRecordError as bad:
            return bad.at(self._line, offset, read)
        id = header.get("warc-record-id") or f"{self._file.relative}:{self._line}"
        return RawDocument(id, self._line, offset, read, text)

    def _lost(self, offset: int, error: DamageError, following: int | None) -> Reject:
        """The reject of the record at this offset, before the `following` one."""
        is_short, reason = str(error) == "truncated file", "damaged file"
        cause = "the file ends before the record does" if is_short else str(error)
        detail = f"{cause}: record {self._line} is lost"
        if isinstance(error, UnsupportedError):
            reason = UNSUPPORTED
        elif following is None and is_short:
            reason = "truncated file"
        if following is None:
            following = self._found.size
            detail += (
                ", and after so much damage no other is looked for in the "
                f"{following - offset:,} bytes from it to the end"
                if self._archive.has_given_up
                else ", and no record is found behind it"
            )
        read, self._done = following - self._done, following
        return Reject(self._line, offset, reason, detail, read)

    def _header(self, first: bytes) -> dict[str, str]:
        """The fields of a record's header, their names in lower case."""
        lines: list[bytes] = [first]
        while sum(map(len, lines)) < _HEADER_BYTES:
            line = self._archive.readline(_HEADER_BYTES)
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

    def _content(self, header: dict[str, str], end: bytes) -> tuple[int, bytes | None]:
        """(stated length, the beginning of the content as far as it may be held) of a record.

        Reads the record to its end. No content where it was never meant to be a document.
        """
        stated = header.get("content-length", "")
        if not (stated.isascii() and stated.isdecimal()) or len(stated) > _DIGITS:
            raise DamageError(f"a record's Content-Length is {stated[:40]!r}")
        kind, length = _kind(header), int(stated)
        if length > self._found.size - self._archive.tell():
            raise DamageError("truncated file")
        most = min(self._file.held_bytes, html.LARGEST) if kind in _OF_PAGES else 0
        kept = min(length, self._file.held_bytes if kind == "conversion" else most)
        content = self._archive.read(kept)
        if len(content) < kept:
            raise DamageError("truncated file")
        self._archive.skip(length - kept)
        if not self._archive.ends_record(end):
            raise DamageError(f"a record does not end where its Content-Length {stated} says")
        return length, content if kind in ("conversion", *_OF_PAGES) else None

    def _text(self, header: dict[str, str], content: bytes, length: int) -> str:
        said = header.get("content-type", "")
        kind = said.partition(";")[0].strip().lower()
        if "warc-segment-number" in header:
            raise BadRecordError("unsupported record", "a part of a record in several segments")
        if _kind(header) in _OF_PAGES:
            return self._page(header, content, length)
        if kind not in ("text/plain", ""):
            raise BadRecordError("not plain text", f"a conversion to {kind}")
        if not content:
            raise BadRecordError("empty text")
        return html.said_text(content, said) or documents.utf8(content)

    def _page(self, header: dict[str, str], content: bytes, length: int) -> str:
        said = header.get("content-type", "")
        kind = said.partition(";")[0].strip().lower()
        is_http = kind == "application/http" or (_kind(header) == "response" and not kind)
        if _kind(header) == "response" and not is_http:
            raise BadRecordError("not HTML", f"a response of type {kind}")
        if length > len(content):
            detail = f"{length} bytes; a page may have {html.LARGEST}"
            raise BadRecordError("record too large", detail)
        if is_http:
            known = header.get("warc-identified-payload-type", "")
            return html.text_of(content, self._extract, known)
        return html.text_of_resource(content, said, self._extract)


def _check_first(line: bytes) -> None:
    """Raise DamageError where this line does not begin a record that is read."""
    if _FIRST.match(line):
        return
    if found := re.match(rb"WARC/[0-9.]{1,9}(?=[ \r\n])", line):
        raise UnsupportedError(f"its version, {found[0].decode()}, is not read; convert it to 1.1")
    if (other := contents.binary(line)) and not line.startswith(b"WARC/"):
        raise UnsupportedError(f"it is {other}, not WARC as its name or `format` says")
    raise DamageError("a WARC record should begin here")


def _kind(header: dict[str, str]) -> str:
    """The record's type; none for a resource that is no page of a crawl, but tells of it."""
    kind = header.get("warc-type", "").lower()
    # WARC 1.0 has URIs in angle brackets.
    uri = header.get("warc-target-uri", "").lstrip("<")
    return "" if kind == "resource" and not _URL.match(uri) else kind
