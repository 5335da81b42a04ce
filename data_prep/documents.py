"""Strict reading: every record of an input file is a document or a reject with its reason.

Nothing is repaired and nothing is lost in silence. A jsonl file ends records at `\\n` alone; its
records are numbered from line 1 and known by the byte offset of their line, after decompression.
The text is kept as it is: byte order marks, carriage returns and NULs belong to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import zstandard

from data_prep import inputs
from data_prep.inputs import InputFile

_READ_BYTES = 1 << 18
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawDocument:
    """A document before tokenization; its record begins at `offset` and has `read` bytes."""

    id: str
    line: int
    offset: int
    read: int
    text: str


@dataclass(frozen=True)
class Reject:
    """A record that is not used: where its line begins (`offset` in bytes), and why."""

    file: str
    line: int
    offset: int
    reason: str
    detail: str
    read: int = 0


@dataclass(frozen=True)
class Survey:
    """What one pass over an input file tells.

    `bytes`, `sha256` and `mtime_ns` are of the file as it lies on disk, `size` counts its bytes
    after decompression. `cuts` are (offset, line) of line starts at which reading can begin, the
    first of them (0, 1); `damage` is "", "truncated file" or "damaged file".
    """

    bytes: int
    sha256: str
    mtime_ns: int
    size: int
    cuts: list[tuple[int, int]]
    damage: str


class _BadRecordError(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail


class _DamageError(Exception):
    """The compressed stream ends early (its start is sound) or is wrong (nothing is)."""


def survey(file: InputFile, cut_bytes: int) -> Survey:
    """Hash the file, measure it, find line starts about every `cut_bytes` of decompressed text."""
    status = file.path.stat()
    digest = hashlib.sha256()
    size, line, damage = 0, 1, ""
    cuts = [(0, 1)]
    with file.path.open("rb") as raw:
        try:
            for block in _blocks(_Hashing(raw, digest), file.compression):
                if file.format == "jsonl":
                    while (target := cuts[-1][0] + cut_bytes) < size + len(block):
                        newline = block.find(b"\n", max(target - size, 0))
                        if newline < 0:
                            break
                        before = block.count(b"\n", 0, newline + 1)
                        cuts.append((size + newline + 1, line + before))
                    line += block.count(b"\n")
                size += len(block)
        except _DamageError as error:
            damage = str(error)
        while block := raw.read(_READ_BYTES):
            digest.update(block)
    if damage == "damaged file":
        cuts = cuts[:1]
    if cuts[-1][0] >= size and len(cuts) > 1:
        cuts.pop()
    return Survey(status.st_size, digest.hexdigest(), status.st_mtime_ns, size, cuts, damage)


def records(
    file: InputFile, found: Survey, start: tuple[int, int], stop: int
) -> Iterator[RawDocument | Reject]:
    """The records that begin at offsets from `start` = (offset, line) up to `stop`.

    Raises InputChangedError where the file is no longer the one that was surveyed.
    """
    status = file.path.stat()
    if (status.st_size, status.st_mtime_ns) != (found.bytes, found.mtime_ns):
        raise inputs.changed(file.path)
    if found.damage == "damaged file":
        detail = "its compressed data fail their check, so none of them is used"
        yield Reject(file.name, 1, 0, found.damage, detail, found.size)
        return
    offset, line = start
    cut_short = bool(found.damage) and stop == found.size
    for data in _lines(file, offset, stop):
        whole = data.endswith(b"\n") if file.format == "jsonl" else not found.damage
        if cut_short and not whole:
            break
        yield _record(file, data, line, offset)
        offset, line = offset + len(data), line + 1
    if cut_short:
        detail = "the compressed file ends here, inside of its data; the rest is lost"
        yield Reject(file.name, line, offset, found.damage, detail, found.size - offset)


def _record(file: InputFile, data: bytes, line: int, offset: int) -> RawDocument | Reject:
    try:
        id, text = _text_record(file, data) if file.format == "text" else _json(file, data, line)
    except _BadRecordError as bad:
        return Reject(file.name, line, offset, bad.reason, bad.detail, len(data))
    return RawDocument(id, line, offset, len(data), text)


def _text_record(file: InputFile, data: bytes) -> tuple[str, str]:
    if not data:
        raise _BadRecordError("empty text")
    return file.relative, _utf8(data)


def _json(file: InputFile, data: bytes, line: int) -> tuple[str, str]:
    # A byte order mark may head a jsonl file; inside of a text it is text.
    content = _utf8(data.removeprefix(_BOM) if line == 1 else data)
    if not content.strip():
        raise _BadRecordError("blank line")
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise _BadRecordError("broken JSON", f"{error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise _BadRecordError("broken JSON", str(error).splitlines()[0]) from None
    if not isinstance(value, dict):
        raise _BadRecordError("not an object", f"found {type(value).__name__}")
    text = value.get(file.text_field)
    if file.text_field not in value:
        raise _BadRecordError("text missing", f"no key {file.text_field!r}")
    if not isinstance(text, str):
        raise _BadRecordError("text not a string", f"found {type(text).__name__}")
    if not text:
        raise _BadRecordError("empty text")
    id = _id(value.get(file.id_field), f"{file.relative}:{line}")
    try:
        text.encode()
        id.encode()
    except UnicodeEncodeError as error:
        raise _BadRecordError("lone surrogate", f"{error.object[error.start]!r}") from None
    return id, text


def _id(value: Any, default: str) -> str:
    if isinstance(value, str) and value:
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else default


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        detail = f"byte {error.start + 1} of the record"
        raise _BadRecordError("invalid UTF-8", detail) from None


def _lines(file: InputFile, start: int, stop: int) -> Iterator[bytes]:
    """Lines that begin in [start, stop) with their ends; of a text file, its bytes as one."""
    with file.path.open("rb") as raw:
        blocks = _from(raw, file, start)
        if file.format == "text":
            parts: list[bytes] = []
            with contextlib.suppress(_DamageError):
                parts.extend(blocks)
            yield b"".join(parts)
            return
        yield from _split(blocks, start, stop)


def _split(blocks: Iterator[bytes], start: int, stop: int) -> Iterator[bytes]:
    pending: list[bytes] = []
    offset = start
    while offset < stop:
        try:
            block = next(blocks, b"")
        except _DamageError:
            block = b""
        if not block:
            break
        # A list: a line of many blocks is joined once, when it ends.
        first, *rest = block.split(b"\n")
        for part in rest:
            pending.append(first + b"\n")
            data = b"".join(pending)
            yield data
            offset += len(data)
            pending.clear()
            if offset >= stop:
                return
            first = part
        pending.append(first)
    tail = b"".join(pending)
    if tail and offset < stop:
        yield tail


def _from(raw: BinaryIO, file: InputFile, start: int) -> Iterator[bytes]:
    """Decompressed blocks from the offset `start` on."""
    if file.compression is None:
        raw.seek(start)
        yield from _blocks(raw, None)
        return
    skip = start
    for block in _blocks(raw, file.compression):
        if skip < len(block):
            yield block[skip:]
        skip = max(0, skip - len(block))


def expansion(file: InputFile, least: int) -> float:
    """Bytes after decompression for each byte on disk, over the first `least` bytes on disk."""
    size = read = 0
    with file.path.open("rb") as raw, contextlib.suppress(_DamageError):
        for block in _blocks(raw, file.compression):
            size, read = size + len(block), raw.tell()
            if read >= least:
                break
    return size / max(read, 1)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Hashing:
    """A file that hashes what is read of it."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest = file, digest

    def read(self, size: int, /) -> bytes:
        block = self._file.read(size)
        self._digest.update(block)
        return block


def _blocks(raw: _Readable, compression: str | None) -> Iterator[bytes]:
    """The file's bytes, decompressed, in blocks that are not empty. Raises _DamageError."""
    if compression is None:
        while block := raw.read(_READ_BYTES):
            yield block
        return
    data = raw.read(_READ_BYTES)
    if not data:
        raise _DamageError("truncated file")
    while data:
        data = yield from _member(raw, data, compression)
        data = data or raw.read(_READ_BYTES)
        # tar and tape tools pad with NULs, which gzip's readers allow.
        while data and not data.strip(b"\0"):
            data = raw.read(_READ_BYTES)


def _member(raw: _Readable, data: bytes, compression: str) -> Generator[bytes, None, bytes]:
    """One gzip member or zstd frame; returns what was read beyond it."""
    decoder: Any = (
        zlib.decompressobj(31)
        if compression == "gzip"
        else zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    )
    while True:
        try:
            block = decoder.decompress(data)
        except (zlib.error, zstandard.ZstdError):
            raise _DamageError("damaged file") from None
        if block:
            yield block
        if decoder.eof:
            return bytes(decoder.unused_data)
        data = raw.read(_READ_BYTES)
        if not data:
            raise _DamageError("truncated file")
